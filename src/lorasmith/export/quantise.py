"""Choose ggml's type for each tensor of a Llama, and pack its numbers.

f32 to q4_0 are packed by the gguf package. The types of q4_k_m are packed by llama.cpp itself, in the mix that its
llama-quantize makes: Q4_K, with Q6_K for the head and for half of the v and down projections.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quantize

from lorasmith.errors import ExportError
from lorasmith.export.llama_cpp import pack_with_llama_cpp, require_llama_cpp

_F32, _F16, _BF16, _Q8_0, _Q4_0, _Q4_K, _Q5_0, _Q6_K = (
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_0", "Q6_K")
)


@dataclass(frozen=True)
class Quantisation:
    """ggml's type of matrices, of the output head, of some sensitive ones; the whole's name. Vectors stay float32."""

    matrices: GGMLQuantizationType
    head: GGMLQuantizationType
    sensitive: GGMLQuantizationType
    file_type: LlamaFileType


# At 4 bits the head costs more quality than it saves room: llama-quantize spares it too (for q4_0 with Q6_K).
QUANTS = {
    "f32": Quantisation(_F32, _F32, _F32, LlamaFileType.ALL_F32),
    "f16": Quantisation(_F16, _F16, _F16, LlamaFileType.MOSTLY_F16),
    "bf16": Quantisation(_BF16, _BF16, _BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Quantisation(_Q8_0, _Q8_0, _Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": Quantisation(_Q4_0, _Q8_0, _Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_k_m": Quantisation(_Q4_K, _Q6_K, _Q6_K, LlamaFileType.MOSTLY_Q4_K_M),
}
# For rows that are no multiple of a k-quant's 256 numbers: what llama-quantize takes then.
_INSTEAD = {_Q4_K: _Q5_0, _Q6_K: _Q8_0}
_BY_LLAMA_CPP = (_Q4_K, _Q5_0, _Q6_K)


def check_quant(quant: str) -> None:
    """Raise ExportError for an unknown quantisation, MissingExtraError for one whose packer is not installed."""
    if quant not in QUANTS:
        raise ExportError(f"--quant is {quant}; it can be {', '.join(QUANTS)}.")
    if QUANTS[quant].matrices in _BY_LLAMA_CPP:
        require_llama_cpp(quant)


def kind_of(
    name: str, tensor: torch.Tensor, quant: str, num_layers: int, *, is_tied: bool
) -> GGMLQuantizationType:
    """Return the type of the tensor that ggml calls ``name``; ``is_tied``: the embedding is the output head too."""
    if tensor.dim() == 1:
        return _F32
    kinds = QUANTS[quant]
    match name.split("."):
        case ["token_embd" | "output" as part, "weight"] if part == "output" or is_tied:
            kind = kinds.head
        case ["blk", layer, "attn_v" | "ffn_down", "weight"] if _is_sensitive(int(layer), num_layers):
            kind = kinds.sensitive
        case _:
            kind = kinds.matrices
    for finer in (kind, _INSTEAD.get(kind, _F16)):
        if tensor.shape[-1] % GGML_QUANT_SIZES[finer][0] == 0:
            return finer
    return _F16


def _is_sensitive(layer: int, num_layers: int) -> bool:
    """Say whether llama-quantize spends more bits on v and down here: the first and last eighth, each third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def byte_shape(tensor: torch.Tensor, kind: GGMLQuantizationType) -> tuple[int, ...]:
    """Return the shape of the packed bytes."""
    values, size = GGML_QUANT_SIZES[kind]
    return (*tensor.shape[:-1], tensor.shape[-1] // values * size)


def pack(tensor: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the numbers of ``tensor`` as bytes of that type; float32 ones as they are."""
    values = tensor.float().contiguous().numpy()
    if kind == _F32:
        return values
    if kind in _BY_LLAMA_CPP:
        return pack_with_llama_cpp(values, kind, byte_shape(tensor, kind))
    return quantize(values, kind)
