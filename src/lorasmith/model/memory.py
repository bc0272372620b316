"""What memory there is, what a computation takes of it at its peak, and keeping or giving back what was freed.

On Linux the system promises more memory than it has and kills the process that touches too much: no exception
comes. So what is free is asked before, and the peak is measured by the kernel's own high-water mark.
"""

import contextlib
import ctypes
import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**30
_SAMPLE_SECONDS = 0.005
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2^63


def keep_freed_memory() -> bool:
    """Tell glibc to keep big blocks for reuse; return whether this system could be told.

    By default it maps and unmaps every tensor over 128 KiB, so each step page-faults its activations anew.
    CUDA's allocator keeps blocks by itself; it is told to let them grow, since packs come in many sizes.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at its first allocation
    libc = _glibc()
    return libc is not None and all(
        libc.mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 * 2**20))
    )


def give_back_freed_memory() -> None:
    """Return to the system what Python, glibc and torch's CUDA cache hold without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def in_gib(num_bytes: float) -> str:
    """Return ``num_bytes`` in words, as every command tells memory."""
    return f"{num_bytes / 2**30:.2f} GiB"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take on ``device`` without being refused or killed.

    On a CPU the least of: what the system has available, what every memory cgroup above the process leaves
    (containers, batch systems), and what ``ulimit -v`` leaves. On CUDA what the device has free, with the part
    that torch holds but does not use.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return max(0, min([psutil.virtual_memory().available, *_cgroup_room(), *_address_room()]))


@dataclass
class Peak:
    """Bytes of this process on the device: ``before`` a computation, and at most ``during`` it."""

    before: int
    during: int
    how: str  # what was read

    @property
    def taken(self) -> int:
        return max(0, self.during - self.before)


@contextlib.contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block; the value is filled in when the block ends.

    On a CPU: Linux's high-water mark of resident memory (VmHWM), put back through /proc/self/clear_refs; where
    that is not allowed, and on other systems, resident memory sampled every 5 ms. On CUDA: torch's reserved bytes.
    """
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        peak = Peak(before, before, "torch.cuda.max_memory_reserved")
        yield peak
        torch.cuda.synchronize(device)
        peak.during = torch.cuda.max_memory_reserved(device)
        return
    before = psutil.Process().memory_info().rss
    if _reset_high_water_mark():
        peak = Peak(before, before, "VmHWM of /proc/self/status")
        yield peak
        peak.during = _high_water_mark()
        return
    peak = Peak(before, before, "resident memory, sampled every 5 ms")
    with _sampling(lambda rss: setattr(peak, "during", max(peak.during, rss))):
        yield peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocator's refusal: torch's on CUDA and on the CPU, or Python's own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate" in text
        or "DefaultCPUAllocator: not enough memory" in text  # the same on Windows
        or "MPS backend out of memory" in text
    )


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libc.so.6")


def _reset_high_water_mark() -> bool:
    """Set VmHWM to what is resident now (man 5 proc, /proc/pid/clear_refs, value 5); whether it could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water_mark() > 0
    except (OSError, ValueError):
        return False


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no VmHWM")


@contextlib.contextmanager
def _sampling(see: Callable[[int], None]) -> Iterator[None]:
    process, done = psutil.Process(), threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            see(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        see(process.memory_info().rss)


def _cgroup_room(proc: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> list[int]:
    """Return what each limited memory cgroup of this process leaves; page cache that can be dropped counts as free."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            place, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            place = root / "memory"
        else:
            continue
        # Inside a container the path may be the host's and not be there; the root is then the container's own.
        group = place / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder == place.parent:
                break
            room = _room_of(folder, *names)
            if room is not None:
                found.append(room)
    return found


def _room_of(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        usage = int((folder / usage_name).read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        )
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))


def _address_room() -> list[int]:
    """Return what ``ulimit -v`` leaves, if it is set."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]
