"""What a result has to say about where it was measured, and a process's peak memory."""

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "llamafactory")
_GPU_PACKAGES = ("flash-attn", "liger-kernel", "kernels", "triton")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, load and time; and the GPUs, where torch sees any."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def describe_packages() -> dict[str, str]:
    """Return the version of Python and of each package, among those that matter, that this process can import."""
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_GPU_PACKAGES, "lorasmith"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def has_package(name: str) -> bool:
    """Return whether ``name`` is installed beside this interpreter."""
    return name in describe_packages()


def forget_peak_memory() -> None:
    """Let peak memory count from now: loading a model is not training it. Without /proc, it counts from the start."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # proc(5): reset the peak resident set to the present one


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process, VmHWM where there is a /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if unit in flags]
    return f"{name} ({', '.join(units) or 'no vector units named'})"
