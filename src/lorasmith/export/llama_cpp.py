"""llama.cpp itself, from the xllamacpp wheel: it answers prompts, and packs the types that only it can pack.

The only module that imports xllamacpp.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasmith.errors import ExportError, MissingExtraError
from lorasmith.export.proof import ANSWER_TOKENS


def require_llama_cpp(needed_for: str) -> None:
    """Raise MissingExtraError unless llama.cpp is installed."""
    _import(needed_for)


def answer_with_llama_cpp(
    file: Path, prompts: Sequence[Sequence[int]], lora: Path | None = None
) -> list[str]:
    """Return llama.cpp's greedy answer to each prompt of token ids.

    Raises:
        ExportError: llama.cpp does not open the file.
    """
    xllamacpp = _import("Asking llama.cpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = max(map(len, prompts)) + ANSWER_TOKENS + 8
    params.n_parallel = 1
    params.verbosity = -1
    params.warmup = False
    # Rounding of its own, such as a cache in float16, would part answers that the file's weights do not part.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as fault:
        raise ExportError(
            f"llama.cpp does not open {file.name}: {fault} Why, it says itself: export without --prove, then run "
            "llama-cli -m FILE. A chat template that it cannot read is left out by its option --no-jinja."
        ) from fault
    answers = []
    for prompt in prompts:
        asked = {"prompt": list(prompt), "n_predict": ANSWER_TOKENS, "temperature": 0, "cache_prompt": False}
        answers.append(server.handle_completions(asked)["choices"][0]["text"])
    return answers


def pack_with_llama_cpp(values: np.ndarray, kind: int, byte_shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 ``values`` [rows, D] packed as ggml's type ``kind``, by ggml_quantize_chunk of ggml.h.

    Raises:
        ExportError: the wheel does not export that function.
    """
    xllamacpp = _import("Packing k-quants")
    try:
        pack = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    except AttributeError as fault:
        raise ExportError(
            f"xllamacpp {xllamacpp.__version__} does not export llama.cpp's quantiser. Export with --quant f16, then "
            "run llama.cpp's own tool: llama-quantize FILE.gguf OUT.gguf q4_k_m. Or take q8_0 or q4_0."
        ) from fault
    number = ctypes.c_int64
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p]
    pack.restype = ctypes.c_size_t
    values = np.ascontiguousarray(values, np.float32)
    packed = np.empty(byte_shape, np.uint8)
    start, importance = 0, None
    written = pack(kind, values.ctypes.data, packed.ctypes.data, start, *values.shape, importance)
    if written != packed.nbytes:
        raise ExportError(
            f"llama.cpp packed {values.shape} numbers into {written} bytes; {packed.nbytes} are expected."
        )
    return packed


def _import(needed_for: str) -> Any:
    try:
        import xllamacpp
    except ImportError as fault:
        raise MissingExtraError(needed_for, "xllamacpp", "llama-cpp") from fault
    return xllamacpp
