"""Compile the decoder's layers, where that earns back the time it takes.

torch.compile fuses what stands between the matrix products of a layer: norms, rotary positions, the gated
activation, residuals. All layers are alike, so one compilation serves all of them; sizes are left open, so it
serves every pack; and the kernels are kept in lorasmith's cache for the next run.
"""

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.data.cache import cache_dir
from lorasmith.engine.frozen import first_adapted_layer

# Measured with SmolLM2-135M (30 layers, hidden 576, intermediate 1536) on two CPU cores, docs/results.md: 0.5 ms a
# token saved, which is memory traffic and so grows with layers times width; 35 to 100 s to compile.
_SAVED_SECONDS = 0.5e-3 / (30 * (576 + 1536))
_WARM_UP_SECONDS = 100.0
_CLEARLY_MORE = 2.0


def why_not_compile(decoder: nn.Module, device: torch.device) -> str | None:
    """Return why ``decoder`` cannot be compiled for ``device``, in words, or None if it can."""
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        return "this model keeps its layers where they are not found"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler on this machine"
    if device.type == "mps":
        return "torch.compile is not tried on Apple GPUs"
    return None


def choose_compilation(model: PreTrainedModel, num_tokens: int) -> tuple[bool, str]:
    """Return whether to compile ``model`` for a run of ``num_tokens`` in all, and the reason in words."""
    config, device = model.config.get_text_config(), model.device
    if reason := why_not_compile(model.get_decoder(), device):
        return False, reason
    if device.type != "cpu":
        return False, f"its gain on {device.type} is not measured yet; engine.compile=true tries it"
    width = config.hidden_size + (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    saved = num_tokens * config.num_hidden_layers * width * _SAVED_SECONDS
    if saved < _CLEARLY_MORE * _WARM_UP_SECONDS:
        return False, f"would save about {saved:.0f} s of this run and cost up to {_WARM_UP_SECONDS:.0f} s"
    return True, f"saves about {saved / 60:.0f} min of this run"


def compile_layers(decoder: Any) -> None:
    """Let the layers of ``decoder`` be compiled at their first training pass.

    The first adapted layer stays as it is: its input needs no gradient, so it would be compiled all over again.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for layer in decoder.layers[first_adapted_layer(decoder) + 1 :]:
        layer.compile(dynamic=True)


def restore_layers(decoder: Any) -> None:
    """Take :func:`compile_layers` back."""
    for layer in getattr(decoder, "layers", ()):
        layer._compiled_call_impl = None
