"""Fold a LoRA adapter into its base, tensor by tensor, from one set of safetensors files to another.

    W' = W + scaling * B A        in float32, then in the dtype of the merged model

    base/model-00001-of-00002.safetensors --+
    base/model-00002-of-00002.safetensors --+--> one tensor at a time --> merged/ in shards of at most 2 GB
    adapter/adapter_model.safetensors ------+

Memory holds the adapter and one shard, never the model. What cannot be folded so (DoRA, adapters on
embeddings, weights that transformers renames or joins on loading, other PEFT methods) goes through PEFT's own
merge on the loaded model.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorasmith.errors import MergeError
from lorasmith.model.adapter import load_adapter, read_adapter_weights
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.adapter_kinds import VIRTUAL_TOKENS
from lorasmith.model.base import ResolvedBase, load_base, weight_files
from lorasmith.model.device import DeviceChoice
from lorasmith.model.quiet import quiet_loading

SHARD_BYTES = 2 * 10**9
SHARD_BY_SHARD, THROUGH_PEFT = "shard by shard", "through PEFT, with the model in memory"

_ADAPTER_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

# Settings of an adapter that leave W + scaling * B A as the whole truth about it.
_PLAIN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping"),
    *("loftq_config", "eva_config", "corda_config", "runtime_config", "megatron_core"),
}


@dataclass(frozen=True)
class Update:
    """What one linear layer gains: scaling * B A, with A [R, D_in] and B [D_out, R]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    is_transposed: bool  # GPT-2's Conv1D keeps W as [D_in, D_out]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` plus the update, in float32."""
        delta = (self.B.float() @ self.A.float()) * self.scaling
        return weight.float() + (delta.T if self.is_transposed else delta)


def fold(
    base: ResolvedBase,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the merged weights and config.json into the empty folder ``out``; return which way it was done.

    Without ``dtype`` every tensor keeps the dtype it has in the base.

    Raises:
        MergeError: the base is quantised, the adapter is of a kind that cannot be merged, numbers overflow.
    """
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise MergeError(
            f"The base {base.ref.id} is quantised on disk: a merge into it would round the adapter away. "
            "Pass the unquantised model that it was made from as the base."
        )
    if (kind := read_adapter_config(adapter)["peft_type"]) in VIRTUAL_TOKENS:
        raise MergeError(
            f"The adapter {adapter} is of the kind {kind}: it stands before the text as virtual tokens and changes no "
            "weight, so there is nothing to fold in. Use it beside its base, or train with method.name=lora."
        )
    updates = plan_updates(base, adapter, config, trust_remote_code)
    if updates is None:
        _merge_in_memory(base, adapter, out, dtype, trust_remote_code, shard_bytes)
        return THROUGH_PEFT
    _Fold(base, updates, out, dtype, shard_bytes).run(config)
    return SHARD_BY_SHARD


def plan_updates(
    base: ResolvedBase, adapter: Path, base_config: dict[str, Any], trust_remote_code: bool
) -> dict[str, Update] | None:
    """Return the update of each weight by its name on disk, or None where only PEFT can merge it."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D

    config = read_adapter_config(adapter)
    defaults = LoraConfig().to_dict()
    unusual = [
        key
        for key, value in config.items()
        if key not in _PLAIN and value != defaults.get(key, value or None)
    ]
    starts_plain = config.get("init_lora_weights", True) in (True, False, "gaussian")
    if (
        config["peft_type"] != "LORA"
        or [key for key in unusual if key != "init_lora_weights"]
        or not starts_plain
    ):
        return None
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_adapter_weights(adapter).items():
        if key.endswith(".base_layer.weight"):  # PEFT saves the base's head beside an adapter on it
            continue
        matched = _ADAPTER_KEY.fullmatch(key)
        if matched is None or tensor.dim() != 2:
            return None
        found.setdefault(matched[1], {})[matched[2]] = tensor

    modules = dict(_empty_model(base, trust_remote_code).named_modules())
    on_disk = _tensor_names(base.folder)
    is_tied = base_config.get("tie_word_embeddings", False)
    updates = {}
    for path, pair in found.items():
        module = modules.get(path)
        name = f"{path}.weight"
        is_tied_head = is_tied and path == "lm_head" and name not in on_disk
        if pair.keys() != {"A", "B"} or not isinstance(module, (torch.nn.Linear, Conv1D)):
            return None
        if name not in on_disk and not is_tied_head:
            return None
        A, B = pair["A"], pair["B"]
        r, alpha = A.shape[0], config.get("lora_alpha", defaults["lora_alpha"])
        if pattern := config.get("alpha_pattern"):
            alpha = pattern.get(get_pattern_key(pattern.keys(), path), alpha)
        scaling = alpha / r**0.5 if config.get("use_rslora") else alpha / r
        updates[name] = Update(A, B, scaling, isinstance(module, Conv1D))
    return updates


def _empty_model(base: ResolvedBase, trust_remote_code: bool) -> torch.nn.Module:
    """Return the model's modules without memory behind them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_loading(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            base.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


class _Fold:
    """The pass over the base's files, and the shard that is being filled."""

    def __init__(
        self,
        base: ResolvedBase,
        updates: dict[str, Update],
        out: Path,
        dtype: torch.dtype | None,
        shard_bytes: int,
    ) -> None:
        self._base, self._updates, self._out, self._dtype = base, updates, out, dtype
        self._shard_bytes = shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._files: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._total_bytes = 0

    def run(self, config: dict[str, Any]) -> None:
        waiting = set(self._updates)
        head_is_tied = "lm_head.weight" not in _tensor_names(self._base.folder)
        dtypes = set()
        for file in weight_files(self._base.folder):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is not a dict)
                    weight = tensors.get_tensor(name)
                    merged = self._merged(name, weight)
                    waiting.discard(name)
                    if head_is_tied and "lm_head.weight" in waiting and name.endswith("embed_tokens.weight"):
                        # The head was the embedding under another name; with an update it is its own matrix.
                        self._add("lm_head.weight", self._merged("lm_head.weight", weight))
                        config["tie_word_embeddings"] = False
                        waiting.discard("lm_head.weight")
                    dtypes.add(merged.dtype)
                    self._add(name, merged)
        if waiting:
            raise MergeError(
                f"The base {self._base.ref.id} has no tensor {min(waiting)}; the adapter changes it."
            )
        self._close_shard()
        self._name_shards()
        config.pop("torch_dtype", None)
        if len(dtypes) == 1:
            config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        (self._out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return weight
        dtype = self._dtype or weight.dtype
        update = self._updates.get(name)
        result = (weight if update is None else update.apply(weight)).to(dtype)
        if not torch.isfinite(result).all():
            kind = str(dtype).removeprefix("torch.")
            raise MergeError(
                f"After the merge {name} has numbers beyond the range of {kind}. "
                "Merge with --dtype bfloat16 or float32."
            )
        return result.contiguous()

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        held = sum(t.nbytes for t in self._shard.values())
        if self._shard and held + tensor.nbytes > self._shard_bytes:
            self._close_shard()
        self._shard[name] = tensor
        self._shard_of[name] = len(self._files)
        self._total_bytes += tensor.nbytes

    def _close_shard(self) -> None:
        file = self._out / f"part-{len(self._files)}.safetensors"
        save_file(self._shard, file, metadata={"format": "pt"})
        self._files.append(file)
        self._shard = {}

    def _name_shards(self) -> None:
        """Give the shards their final names, which hold their number and so are known only now."""
        if len(self._files) == 1:
            self._files[0].rename(self._out / "model.safetensors")
            return
        count = len(self._files)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for file, name in zip(self._files, names, strict=True):
            file.rename(self._out / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: names[shard] for name, shard in sorted(self._shard_of.items())},
        }
        (self._out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _merge_in_memory(
    base: ResolvedBase,
    adapter: Path,
    out: Path,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    shard_bytes: int,
) -> None:
    """Merge by PEFT; without ``dtype`` all tensors get the dtype of the base's first."""
    kept = dtype or _stored_dtype(base.folder)
    model = load_base(
        base,
        DeviceChoice(torch.device("cpu"), torch.float32, "for the merge"),
        trust_remote_code=trust_remote_code,
    )
    adapted = load_adapter(model, adapter)
    kind = read_adapter_config(adapter)["peft_type"]
    with quiet_loading():
        try:
            merged: Any = adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        except (ValueError, NotImplementedError, RuntimeError) as fault:
            raise MergeError(f"PEFT cannot merge the {kind} adapter {adapter}: {fault}") from fault
        merged.to(kept).save_pretrained(out, max_shard_size=shard_bytes)
    # The proof must find greedy defaults of our own, not what save_pretrained copied.
    (out / "generation_config.json").unlink(missing_ok=True)


def _stored_dtype(folder: Path) -> torch.dtype:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name).dtype
    raise MergeError(f"{folder} holds no tensors.")


def copy_remote_code(base: ResolvedBase, out: Path) -> None:
    """Copy the model's own Python files, without which its config.json cannot be loaded."""
    for file in base.folder.glob("*.py"):
        shutil.copyfile(file, out / file.name)
