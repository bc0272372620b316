"""Rehearse a pack without computing it: what it would allocate at its peak, and how many operations it takes.

The model stands on torch's meta device, where tensors have shapes and no numbers. The same forward and backward
pass as in training then runs over a real pack, and every storage that is made counts from its birth to its
death. No formula is involved, so what is found is true of any architecture and of the engine as it is. What a
kernel takes inside itself, and what an allocator wastes, is not seen.
"""

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorasmith.engine.attention import why_not_packed
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import BaseModelError
from lorasmith.model.method_settings import FullSettings, LoraSettings, MethodSettings
from lorasmith.model.methods import attach_adapter, num_virtual_tokens, train_all_weights
from lorasmith.model.quantized import bytes_saved, frozen_linear_sizes
from lorasmith.model.settings import Quantization
from lorasmith.packing.trie import Pack, Segment


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What one pack takes beyond the model, the adapter's gradients and the optimizer."""

    peak_bytes: int
    flops: int  # of matrix products, forward and backward
    num_operations: int  # a GPU cannot start them in no time


def copy_without_weights(model: PeftModel | PreTrainedModel) -> PeftModel | PreTrainedModel:
    """Return a copy of ``model`` on the meta device; its weights are shapes only and take no memory."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    shapes |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, shapes)


def build_without_weights(
    folder: Path,
    method: MethodSettings,
    dtype: str,
    *,
    seed: int,
    num_steps: int,
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
) -> PeftModel | PreTrainedModel:
    """Return the model that ``folder``'s config.json describes, as the method trains it, on the meta device.

    For a quantised base it is in float32: that is what goes from layer to layer there, whatever the products are in.

    Raises:
        BaseModelError: transformers knows no causal language model of that config.
    """
    shown = dtype if quantization == "none" else "float32"
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, shown), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError) as fault:
        raise BaseModelError(f"{folder}/config.json describes no model that can be built: {fault}") from fault
    if isinstance(method, FullSettings):
        return train_all_weights(model)
    # What starts inside the base's weights takes what LoRA takes; there are no weights to take the start out of.
    if method.changes_base:
        method = LoraSettings(**method.model_dump(include=LoraSettings.model_fields.keys() - {"name"}))
    return attach_adapter(model.requires_grad_(False), method, seed=seed, num_steps=num_steps)


class Rehearsal:
    """Rehearses packs for a model without weights, each pack and setting once."""

    def __init__(
        self,
        sketch: PeftModel | PreTrainedModel,
        engine: EngineSettings,
        quantization: Quantization = "none",
    ) -> None:
        """``sketch`` is on the meta device, see :func:`copy_without_weights`; a quantised base's in float32."""
        self.model = sketch.train()
        self._quantization: Quantization = quantization
        self.weight_bytes = sum(p.numel() * p.element_size() for p in sketch.parameters())
        self.weight_bytes -= bytes_saved(sketch, quantization)
        # A pass makes each quantised weight anew when it comes to it, one at a time.
        sizes = frozen_linear_sizes(sketch) if quantization != "none" else []
        self._made_anew_bytes = 4 * max((D_out * D_in for D_out, D_in in sizes), default=0)
        # Compiled layers and CUDA's kernels keep less alive than buckets computed eagerly, so this is the upper end.
        base: Any = sketch.get_base_model() if isinstance(sketch, PeftModel) else sketch
        is_padded = engine.attention == "padded" or why_not_packed(base) or num_virtual_tokens(sketch)
        attention = "padded" if is_padded else "bucketed"
        plain = {"attention": attention, "compile": False, "gradient_checkpointing": False}
        self.forward = PackForward(sketch, engine.model_copy(update=plain))
        assert self.forward.device.type == "meta", "a rehearsal with weights would be the real thing"
        self._known: dict[tuple[tuple[Segment, ...], int, bool], Rehearsed] = {}

    def weight_bytes_of_share(self, count: int) -> int:
        """Return the bytes of weights in one of ``count`` processes that share the base's layers (sharding.py).

        Its part of every layer, two gathered ones (the next comes while one computes), and the rest whole.
        """
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        layers = base.get_decoder().layers
        cut = sum(p.numel() * p.element_size() for p in layers.parameters() if not p.requires_grad)
        cut -= bytes_saved(self.model, self._quantization)
        return self.weight_bytes - cut + round(cut / count + 2 * cut / len(layers))

    def of(self, pack: Pack, *, checkpointing: bool) -> Rehearsed:
        """Return what the forward and backward pass of ``pack`` takes."""
        key = (pack.segments, len(pack.targets), checkpointing)
        if key not in self._known:
            self.forward.set_checkpointing(checkpointing)
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # in a step of many packs they are there from the second on
                    parameter.grad = torch.zeros_like(parameter)
            with _Ledger() as ledger:
                self.forward.summed_loss(pack).backward()
            self._known[key] = Rehearsed(
                ledger.peak_bytes + self._made_anew_bytes, ledger.flops, ledger.num_operations
            )
        return self._known[key]


class _Ledger(TorchDispatchMode):
    """Counts the storages that operations make, from birth to death, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self.num_operations = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): there is no number, so any will do
            return torch.zeros((), dtype=args[0].dtype).item()
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.num_operations += not func.is_view
        old = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in old:
                self._open(tensor.untyped_storage())
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _open(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._close, key, size)

    def _close(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.live_bytes -= size
