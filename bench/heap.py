"""A heap on which no contender waits for pages that another one's luck spared it.

glibc gives freed memory back to the system as soon as 42 MB of it lie at the end of the heap, which are two results of
21 MB: forward and backward of `x * 2`. In every second process both then fault 10,000 pages in at every call, and take
5 to 8 units where they take 2.4 in the others (docs/cpu-speed.md). Blocks above 32 MB are new pages in every call, of
whomever.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # glibc takes no larger threshold for mmap


def keep_freed_memory() -> None:
    """From an empty heap on, what is freed stays there. Does nothing where the C library is not glibc."""
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt") and hasattr(glibc, "malloc_trim"):
        glibc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        glibc.malloc_trim(0)
