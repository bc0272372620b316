"""What an adapter folder says, found out before anything of it is loaded: it may be a stranger's.

    files      regular ones that lie in the folder itself; where there is a SHA256SUMS, they are as it says
    config     for a causal language model; nothing in it makes PEFT import, open or copy something else
    header     of the weights: every tensor has its place in the file, a name that the method gives, a finite value
    both       sizes agree; of LoRA, each adapted layer has A [R, D_in], B [D_out, R], and the R that the config says

PEFT makes the tensors that the config asks for before it looks into the file, and puts whatever the file holds
into the model: a rank of a billion, or a tensor named like one of the base's, would be taken at its word.
"""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorasmith.data.sources import HUB_ID
from lorasmith.errors import AdapterError
from lorasmith.files import CHECKSUMS, find_damage, recover_folder
from lorasmith.model.adapter_kinds import KINDS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MAX_CONFIG_BYTES = 1 << 20
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PAIR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?")
# Beside A and B: DoRA's lengths, a bias of B, rows of an embedding, and the base's head where an adapter is on it.
_BESIDE = re.compile(
    re.escape(PREFIX) + r".+\.(lora_magnitude_vector(\.weight)?|lora_B\.bias|trainable_tokens_delta"
    r"|base_layer\.weight)"
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as a dict, once everything that can be told without the base is found right.

    Raises:
        AdapterError: it is not; names what, and the way out.
    """
    recover_folder(folder)
    if not folder.is_dir():
        raise AdapterError(
            f"There is no adapter folder {folder}. A run keeps it in adapter/ once it has been trained."
        )
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        if pickles := sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern)):
            raise AdapterError(
                f"{folder} holds {pickles[0]}, a Python pickle: opening one can run any code its author put in. "
                f"lorasmith reads {WEIGHTS} only. If you trust the author, save it again with a current PEFT."
            )
        raise AdapterError(f"{folder} is not complete: {WEIGHTS} is missing.")
    for name in (CONFIG, WEIGHTS):
        _check_place(folder / name)
    if (folder / CHECKSUMS).exists() and (damage := find_damage(folder, needed=(CONFIG, WEIGHTS))):
        raise AdapterError(
            f"The adapter {folder} is damaged: {', '.join(damage)}. Copy it again. If you changed it on purpose, "
            f"remove {folder / CHECKSUMS}."
        )
    config = _read_config(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    _check_tensors(folder / WEIGHTS, config)
    return config


def named_base(config: dict[str, Any], folder: Path) -> str:
    """Return the base that a plain PEFT folder names: a Hub id or an absolute path, and nothing cleverer.

    The folder may be a stranger's, so its text must not steer us to places relative to here or other hosts.

    Raises:
        AdapterError: it names none, or something else.
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{folder / CONFIG} names no base model. Pass the base it was trained on.")
    parts = base.replace("\\", "/").split("/")
    if (
        ".." in parts
        or "~" in base
        or "\0" in base
        or not (Path(base).is_absolute() or HUB_ID.fullmatch(base))
    ):
        raise AdapterError(
            f"{folder / CONFIG} names the base {base!r}, which is neither a Hub id nor an absolute path. "
            "Pass the base it was trained on yourself."
        )
    return base


def _check_place(file: Path) -> None:
    """Refuse a link out of the folder. The Hub's cache keeps its files so: snapshots/COMMIT/x -> blobs/SUM."""
    folder, target = file.parent.resolve(), file.resolve()
    in_hub_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.with_name("blobs")
    if target.parent != folder and not in_hub_cache:
        raise AdapterError(
            f"{file} is a link to {target}, outside its folder. Put the file itself there, if it is yours."
        )


def _read_config(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{file} has {file.stat().st_size:,} bytes, which no PEFT config has.")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise AdapterError(f"{file} is damaged: {fault}") from fault
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{file} is not a PEFT config: it names no peft_type.")
    return config


def _check_config(config: dict[str, Any], file: Path) -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    def refuse(what: str, way_out: str) -> None:
        raise AdapterError(f"{file} {what}. {way_out}")

    kind = config["peft_type"]
    if kind != "LORA" and kind not in KINDS:
        refuse(f"is of the method {kind[:40]}", f"lorasmith opens LORA, {', '.join(KINDS)}.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        refuse(f"is for the task {config['task_type']!r:.40}", "lorasmith opens CAUSAL_LM adapters only.")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and not str(library).startswith("transformers.models."):
        refuse(
            f"wants Python code from {library!r:.60} (auto_mapping)",
            "lorasmith runs no code of an adapter. Remove the entry if it is yours.",
        )
    for key in ("megatron_config", "layer_replication"):
        if config.get(key):
            refuse(f"sets {key}", "That changes the base itself, and lorasmith does not do it.")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    if unknown := [key for key, value in config.items() if key not in known and value]:
        refuse(
            f"sets {unknown[0]!r:.60}, which this version of PEFT does not know",
            "Left out, the adapter might mean something else: install a newer peft.",
        )
    if kind == "LORA":
        _check_ranks(config, file, refuse)
    for key in ("target_modules", "modules_to_save"):
        names = config.get(key)
        listed = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        if not (names is None or listed or (isinstance(names, str) and key == "target_modules")):
            refuse(f"has {names!r:.60} as {key}", "They are names of layers.")


def _check_ranks(config: dict[str, Any], file: Path, refuse: Callable[[str, str], None]) -> None:
    from peft import LoraConfig

    ranks = [config.get("r", LoraConfig.r), *_values(config, "rank_pattern", file)]
    if bad := [r for r in ranks if type(r) is not int or r < 1]:
        refuse(f"has the rank {bad[0]!r:.40}", "A rank is a whole number from 1.")
    alphas = [config.get("lora_alpha", LoraConfig.lora_alpha), *_values(config, "alpha_pattern", file)]
    if bad := [a for a in alphas if type(a) not in (int, float) or not abs(a) < 1e9]:
        refuse(f"has the lora_alpha {bad[0]!r:.40}", "It is a finite number.")


def _values(config: dict[str, Any], key: str, file: Path) -> list[Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file} has {pattern!r:.60} as {key}. It maps names of layers to numbers.")
    return list(pattern.values())


def _check_tensors(file: Path, config: dict[str, Any]) -> None:
    """Check names, shapes and values one tensor at a time; memory holds the largest of them."""
    if config["peft_type"] != "LORA":
        _check_kind(file, config)
        return
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    kept_whole = tuple(config.get("modules_to_save") or ())
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                part = tensors.get_slice(key)
                if part.get_dtype() not in _FLOATS:
                    raise AdapterError(f"{file} holds {key!r:.200} as {part.get_dtype()}; LoRA's are floats.")
                if pair := _PAIR.fullmatch(key):
                    pairs.setdefault(pair[1], {})[pair[2]] = tuple(part.get_shape())
                elif not _BESIDE.fullmatch(key) and not (
                    # PEFT keeps whole the modules that end so: "norm" means input_layernorm as well.
                    key.startswith(PREFIX) and any(part.endswith(kept_whole) for part in key.split(".")[:-1])
                ):
                    raise AdapterError(
                        f"{file} holds {key!r:.200}, which is no part of a LoRA adapter: it would replace a weight "
                        "of the base. Take it out, or merge the adapter where it was made."
                    )
            for path, shapes in pairs.items():
                _check_pair(path, shapes, config, file)
            for key in tensors.keys():  # noqa: SIM118
                check_finite(key, tensors.get_tensor(key), f"The adapter {file.parent}")
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{file} is damaged: {fault}. Copy it again.") from fault
    if not pairs:
        raise AdapterError(f"{file} holds no lora_A and lora_B: there is no adapter in it.")


def _check_kind(file: Path, config: dict[str, Any]) -> None:
    """Check the tensors of an adapter that is no LoRA."""
    name = config["peft_type"]
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                part, matched = tensors.get_slice(key), KINDS[name].tensor.fullmatch(key)
                if part.get_dtype() not in _FLOATS or matched is None:
                    raise AdapterError(
                        f"{file} holds {key!r:.200} as {part.get_dtype()}, which is no part of a {name} adapter. Take "
                        "it out, or train the adapter again."
                    )
                if not KINDS[name].fits(config, matched[1], tuple(part.get_shape())):
                    raise AdapterError(
                        f"The adapter {file.parent} does not fit together: {key[:200]} is {part.get_shape()}, and "
                        f"{CONFIG} asks for another size. Copy it again."
                    )
                check_finite(key, tensors.get_tensor(key), f"The adapter {file.parent}")
                shapes[key] = tuple(part.get_shape())
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{file} is damaged: {fault}. Copy it again.") from fault
    if not shapes:
        raise AdapterError(f"{file} holds no tensor: there is no adapter in it.")
    if what := KINDS[name].misfit(config, shapes):
        raise AdapterError(f"The adapter {file.parent} does not fit together: {what}. Copy it again.")


def _check_pair(path: str, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], file: Path) -> None:
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    if shapes.keys() != {"A", "B"}:
        raise AdapterError(
            f"The adapter {file.parent} is not complete: of {path[:200]} it has only lora_{min(shapes)}. "
            "Copy it again."
        )
    pattern = config.get("rank_pattern") or {}
    r = pattern.get(get_pattern_key(list(pattern), path), config.get("r", LoraConfig.r))
    A, B = shapes["A"], shapes["B"]
    if len(A) < 2 or len(A) != len(B) or A[0] != B[1] or A[0] != r:
        raise AdapterError(
            f"The adapter {file.parent} does not fit together: {path[:200]} has lora_A {list(A)} and lora_B "
            f"{list(B)}, and {CONFIG} says r={r}. A is [r, inputs] and B [outputs, r]."
        )
    if r > max(A[1], B[0]):
        raise AdapterError(
            f"The adapter {file.parent} has rank {r:,} on {path[:200]}, a layer of {A[1]:,} inputs and {B[0]:,} "
            "outputs. A rank above both adds nothing but memory."
        )


def check_finite_weights(files: list[Path]) -> None:
    """Raise AdapterError if one of the safetensors files holds NaN or infinite numbers."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                check_finite(key, tensors.get_tensor(key), f"The model {file.parent}")


def check_finite(key: str, tensor: Any, subject: str) -> None:
    """Raise AdapterError if a tensor holds NaN or infinite numbers."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise AdapterError(
            f"{subject} holds NaN or infinite numbers in {key}. Go back to an earlier checkpoint; a "
            "lower learning_rate usually keeps training finite."
        )
