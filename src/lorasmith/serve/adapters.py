"""Many adapters on one base, a different one for each row of a batch.

The adapters in use stand side by side, so that a layer needs two products for all of them; each row is let
through its own adapter's ranks only. Three rows, adapters p (rank 2) and q (rank 1), the third row the bare base:

    A x       p p q            mask      1 1 0       row 0, adapter p
              p p q                      0 0 1       row 1, adapter q
              p p q                      0 0 0       row 2, base

    y = W x + B (mask * A x)                   A [sum of R, D_in], B [D_out, sum of R], lora_alpha / r folded into B

PEFT's own ``generate(adapter_names=...)`` gives the same answers. It enters every layer anew for each forward, which
takes longer than a token of a small model.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch.nn import functional
from transformers import PreTrainedModel

from lorasmith.errors import AdapterError
from lorasmith.model.adapter import read_adapter_weights
from lorasmith.model.adapter_folder import PREFIX, read_adapter_config
from lorasmith.model.adapter_kinds import VIRTUAL_TOKENS

MAX_SIDE_BY_SIDE = 8  # adapters that stay in the block after their rows have left; a new one clears the rest

_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """What an adapter adds: for each layer's path A [R, D_in] and B [D_out, R], the scaling folded into B."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int  # the largest of its layers


def read_lora(model: PreTrainedModel, folder: Path) -> LoraWeights:
    """Return the weights of an adapter folder in float32, checked against the layers of ``model``.

    Raises:
        AdapterError: it is broken, does not fit, or is of a kind that cannot share a batch.
    """
    values = read_adapter_config(folder)
    _check_kind(values, folder)
    config = LoraConfig(**{key: value for key, value in values.items() if key in _MEANING})
    weights = read_adapter_weights(folder)
    modules = {
        path: module.base if isinstance(module, _AdaptedLinear) else module
        for path, module in model.named_modules()
    }
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        found = _NAME.fullmatch(key)
        if found is None:
            raise AdapterError(_refusal(folder, f"it holds {key[:120]}"))
        path, side = found.groups()
        if not isinstance(modules.get(path), torch.nn.Linear):
            raise AdapterError(
                f"The adapter {folder} changes {path}, which is no linear layer of this base. Serve it on the base it "
                "was trained on."
            )
        pairs.setdefault(path, {})[side] = tensor.to(model.device, torch.float32)
    layers = {}
    for path, pair in pairs.items():
        layer = modules[path]
        assert isinstance(layer, torch.nn.Linear)
        wide = (pair["A"].shape[1], pair["B"].shape[0])
        if wide != (layer.in_features, layer.out_features):
            raise AdapterError(
                f"The adapter {folder} does not fit this base: {path} is {layer.in_features} to {layer.out_features} "
                f"numbers wide here, and the adapter was made for {wide[0]} to {wide[1]}."
            )
        layers[path] = (pair["A"], pair["B"] * _scaling(config, path, len(pair["A"])))
    return LoraWeights(layers, max(len(A) for A, _ in layers.values()))


_MEANING = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora")


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _check_kind(values: dict, folder: Path) -> None:
    if values["peft_type"] in VIRTUAL_TOKENS:
        raise AdapterError(
            f"The adapter {folder} is of the kind {values['peft_type']}: virtual tokens before the text, and this "
            "server adds plain LoRA to linear layers. They cannot be merged either. Ask it with lorasmith ask or "
            "lorasmith chat, or train with method.name=lora."
        )
    if values["peft_type"] != "LORA":
        raise AdapterError(_refusal(folder, f"its method is {values['peft_type']}"))
    start = values.get("init_lora_weights", True)
    if str(start).split("_")[0].lower() in ("pissa", "olora", "corda", "loftq"):
        raise AdapterError(_refusal(folder, f"it changes the base itself ({start})"))
    for key, what in (
        ("use_dora", "it is a DoRA adapter"),
        ("modules_to_save", "it keeps whole layers of its own (modules_to_save)"),
        ("trainable_token_indices", "it trains single tokens"),
        ("lora_bias", "it has biases"),
        ("alora_invocation_tokens", "it is an activated LoRA"),
        ("use_qalora", "it is a QALoRA adapter"),
    ):
        if values.get(key):
            raise AdapterError(_refusal(folder, what))


def _refusal(folder: Path, what: str) -> str:
    return (
        f"The adapter {folder} cannot share a batch with others: {what}, and this server adds plain LoRA to linear "
        "layers. Merge it and serve the merged folder: lorasmith merge, then lorasmith serve --base MERGED."
    )


class AdaptedRows:
    """Adapters side by side in a model's linear layers, and which row takes which. Used by one thread.

    A model has one of these at a time: what another one put beside its layers is taken away.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        for path, module in list(model.named_modules()):
            if isinstance(module, _AdaptedLinear):
                self._replace(path, module.base)
        self._layers: dict[str, _AdaptedLinear] = {}
        self._starts: dict[LoraWeights, int] = {}  # where each adapter's ranks begin, in the block's order
        self.mask: torch.Tensor | None = None  # [B, 1, sum of R]; None: every row takes all of ``ranks``
        self.ranks: slice | None = None  # None: no row takes any

    def choose(self, rows: Sequence[LoraWeights | None]) -> None:
        """Say which adapter each row of the next forward takes."""
        wanted = list(dict.fromkeys(adapter for adapter in rows if adapter is not None))
        if any(adapter not in self._starts for adapter in wanted):
            self._lay_side_by_side(wanted)
        self.mask = self.ranks = None
        if len(wanted) == 1 and None not in rows:
            self.ranks = self._ranks_of(wanted[0])
        elif wanted:
            self.ranks = slice(sum(adapter.rank for adapter in self._starts))
            mask = torch.zeros(len(rows), 1, self.ranks.stop)
            for row, adapter in enumerate(rows):
                if adapter is not None:
                    mask[row, :, self._ranks_of(adapter)] = 1
            self.mask = mask.to(self._model.device)

    def _ranks_of(self, adapter: LoraWeights) -> slice:
        return slice(self._starts[adapter], self._starts[adapter] + adapter.rank)

    def _lay_side_by_side(self, wanted: Sequence[LoraWeights]) -> None:
        staying = [] if len(self._starts) >= MAX_SIDE_BY_SIDE else list(self._starts)
        adapters = list(dict.fromkeys([*staying, *wanted]))
        self._starts = {}  # until all layers have them: if memory runs out half way, they are laid anew
        for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
            if path not in self._layers:
                self._layers[path] = self._wrap(path)
        for path, layer in self._layers.items():
            layer.lay(path, adapters)
        starts = itertools.accumulate((adapter.rank for adapter in adapters), initial=0)
        self._starts = dict(zip(adapters, starts, strict=False))

    def _wrap(self, path: str) -> "_AdaptedLinear":
        layer = _AdaptedLinear(self._model.get_submodule(path), self)
        self._replace(path, layer)
        return layer

    def _replace(self, path: str, layer: torch.nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, layer)

    def forget(self, adapter: LoraWeights) -> None:
        """Drop an adapter's copy; it comes back by itself if a row wants it."""
        if adapter in self._starts:
            self._starts.pop(adapter)
            self._lay_side_by_side([])


class _AdaptedLinear(torch.nn.Module):
    """A linear layer of the base with the adapters beside it."""

    def __init__(self, base: torch.nn.Module, rows: AdaptedRows) -> None:
        super().__init__()
        self.base = base
        self._rows = rows
        self._down: torch.Tensor | None = None  # A of all [sum of R, D_in]; None: none changes this layer
        self._up: torch.Tensor | None = None  # B of all, transposed [sum of R, D_out]

    def lay(self, path: str, adapters: Sequence[LoraWeights]) -> None:
        pairs = [adapter.layers.get(path) for adapter in adapters]
        like = next((pair for pair in pairs if pair is not None), None)
        if like is None:
            self._down = self._up = None
            return
        total = sum(adapter.rank for adapter in adapters)
        down, up = like[0].new_zeros(total, like[0].shape[1]), like[1].new_zeros(total, like[1].shape[0])
        start = 0
        for adapter, pair in zip(adapters, pairs, strict=True):
            if pair is not None:
                own = slice(start, start + len(pair[0]))
                down[own], up[own] = pair[0], pair[1].T
            start += adapter.rank
        self._down, self._up = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        ranks, mask = self._rows.ranks, self._rows.mask
        if ranks is None or self._down is None or self._up is None:
            return out
        inner = functional.linear(x.to(self._down.dtype), self._down[ranks])
        if mask is not None:
            inner = inner * mask
        return (out + inner @ self._up[ranks]).to(out.dtype)
