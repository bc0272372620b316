"""Choose where the model runs and in which number format, with the reason in words."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import cast, get_args

import torch

from lorasmith.errors import SettingsError
from lorasmith.model.settings import Dtype

# bfloat16 rounds to 8 bits: it must earn that with speed, and timing noise must not decide.
CLEARLY_FASTER = 1.3


@dataclass(frozen=True)
class DeviceChoice:
    """Where the base's weights live and what they are; ``reason`` is one line for the screen."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_device(device: str = "auto", dtype: str = "auto") -> DeviceChoice:
    """Return the device and dtype to load a base with; explicit wishes are honoured or refused, never bent.

    "auto" takes the first of CUDA, MPS, CPU. On a CPU, bfloat16 is chosen only where a matrix product,
    measured once a process (0.02 to 0.3 s), is clearly faster than in float32.

    Raises:
        SettingsError: the device is not there, or cannot compute in the dtype.
    """
    where = _find_device(device)
    if dtype not in get_args(Dtype):
        raise SettingsError(f'base.dtype is "{dtype}"; it can be {", ".join(get_args(Dtype))}.')
    if dtype != "auto":
        kind = cast(torch.dtype, getattr(torch, dtype))
        if where.type == "cuda" and kind is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise SettingsError(
                f"base.dtype is bfloat16, and {torch.cuda.get_device_name(where)} cannot compute in it. "
                "Use base.dtype=float16, float32 or auto."
            )
        return DeviceChoice(where, kind, f"{where}: {dtype}, as asked")
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DeviceChoice(where, torch.bfloat16, f"{name}: computes bfloat16, so bfloat16")
        return DeviceChoice(where, torch.float32, f"{name}: has no bfloat16, so float32")
    if where.type == "mps":
        return DeviceChoice(where, torch.float32, "Apple GPU: float32")
    speeds = measure_cpu()
    gain = speeds.bfloat16 / speeds.float32
    if gain >= CLEARLY_FASTER:
        return DeviceChoice(where, torch.bfloat16, f"bfloat16: {gain:.1f}x faster than float32 on this CPU")
    verdict = f"{1 / gain:.1f}x slower than" if gain < 0.95 else "hardly faster than"
    return DeviceChoice(where, torch.float32, f"bfloat16: {verdict} float32 on this CPU, so float32")


@dataclass(frozen=True)
class CpuSpeeds:
    """Measured matrix-product speeds of this CPU, in GFLOP/s."""

    float32: float
    bfloat16: float


@lru_cache(maxsize=1)
def measure_cpu() -> CpuSpeeds:
    """Return this CPU's speed on a small model's MLP product (128 x 576 x 1536); once a process."""
    M, K, N = 128, 576, 1536
    generator = torch.Generator().manual_seed(0)  # the user's random stream must not move
    factors = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # In turns, so that a busy moment of the machine strikes both; the best of each is the least disturbed.
    # The first round also builds the kernels.
    for _ in range(4):
        for dtype in best:
            a, b = (factor.to(dtype) for factor in factors)
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return CpuSpeeds(*(2 * M * K * N / best[dtype] / 1e9 for dtype in (torch.float32, torch.bfloat16)))


def _find_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise SettingsError(
            f'base.device is "{device}", which names no device. It can be auto, cpu, cuda, cuda:1 or mps.'
        ) from None
    if where.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= found:
            raise SettingsError(
                f'base.device is "{device}", and this torch ({torch.__version__}) sees {found} CUDA devices. '
                "Use base.device=auto, or run lorasmith doctor to see what is missing."
            )
    elif where.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError('base.device is "mps", and this machine has no Apple GPU. Use base.device=auto.')
    elif where.type not in ("cpu", "mps"):
        raise SettingsError(f'base.device is "{device}"; lorasmith runs on cpu, cuda and mps.')
    return where
