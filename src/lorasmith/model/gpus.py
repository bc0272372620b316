"""GPUs that can be rented or bought: memory and peak rates, as their makers state them.

Rates are TFLOP/s of dense products with float32 accumulation (data sheets also print the double, "with sparsity").
Memory is what the driver leaves of the nominal size: cards of GDDR6 with error correction keep a sixteenth of it.

Compared with public tables of the makers' numbers: the rates of T4, V100, A10, A40, A100, L4, L40S, H100 and H200, and
the float32 rates of A10G, RTX3090 and RTX5090. The other rates, and the memory that a driver leaves, were not compared
with a source and not measured: an estimate from them is computed, and says so.
"""

import difflib
from dataclasses import dataclass

from lorasmith.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float
    half_tflops: float  # bfloat16, or float16 where there is no bfloat16
    float32_tflops: float
    has_bfloat16: bool = True

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * 2**30)

    @property
    def best_dtype(self) -> str:
        """What base.dtype=auto means on it."""
        return "bfloat16" if self.has_bfloat16 else "float32"

    def peak_flops(self, dtype: str) -> float:
        """Return the peak rate in FLOP/s for products in ``dtype``."""
        return 1e12 * (self.float32_tflops if dtype == "float32" else self.half_tflops)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15.0, 65, 8.1, has_bfloat16=False),
        Gpu("V100-16GB", 15.8, 125, 15.7, has_bfloat16=False),
        Gpu("V100-32GB", 31.7, 125, 15.7, has_bfloat16=False),
        Gpu("RTX3090", 24.0, 71, 35.6),
        Gpu("RTX4090", 24.0, 165, 82.6),
        Gpu("RTX5090", 31.8, 209, 104.8),
        Gpu("A10", 22.5, 125, 31.2),
        Gpu("A10G", 22.5, 70, 35.0),
        Gpu("L4", 22.5, 121, 30.3),
        Gpu("A40", 45.0, 149.7, 37.4),
        Gpu("L40S", 45.0, 362, 91.6),
        Gpu("RTX-A6000", 48.0, 154.8, 38.7),
        Gpu("RTX-6000-Ada", 48.0, 364, 91.1),
        Gpu("A100-40GB", 39.6, 312, 19.5),
        Gpu("A100-80GB", 79.3, 312, 19.5),
        Gpu("H100", 79.6, 989, 67),
        Gpu("H200", 140.4, 989, 67),
        Gpu("B200", 178.0, 2250, 75),
    )
}


def find_gpu(words: str) -> tuple[Gpu, int]:
    """Return the GPU and the number of them that ``NAME`` or ``NAME:N`` asks for; capitals do not matter.

    Raises:
        SettingsError: there is no such name in the table, or N is no number above 0.
    """
    name, separator, number = words.partition(":")
    if separator and not (number.isdecimal() and int(number) > 0):
        raise SettingsError(
            f'--gpu {words}: behind the colon stands "{number}"; a number of GPUs, such as {name}:2.'
        )
    by_name = {_plain(known): gpu for known, gpu in GPUS.items()}
    gpu = by_name.get(_plain(name))
    if gpu is None:
        near = difflib.get_close_matches(_plain(name), by_name, n=1, cutoff=0.5)
        hint = f"Did you mean {by_name[near[0]].name}? " if near else ""
        raise SettingsError(
            f"--gpu {words}: no GPU of that name is in the table. {hint}It has {', '.join(GPUS)}."
        )
    return gpu, int(number) if separator else 1


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
