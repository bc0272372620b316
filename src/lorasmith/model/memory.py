"""Keep freed memory instead of giving it back to the system after every step."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Tell glibc to keep big blocks for reuse; return whether this system could be told.

    By default it maps and unmaps every tensor over 128 KiB, so each step page-faults its activations anew.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return all(
        libc.mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 * 2**20))
    )
