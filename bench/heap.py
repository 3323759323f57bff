"""A heap on which no contender waits for pages that another one's luck spared it.

glibc gives freed memory back to the system as soon as 42 MB of it lie at the end of the heap, which are two results of
21 MB: forward and backward of `x * 2`. Both then fault their pages in at every call, and take 4 to 8 units where they
take 2.4 when the pages are there (docs/cpu-speed.md). And blocks above 32 MB are new pages in every call, but for one
if the heap has a gap as large: then one result costs a sixth, and two do not.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # glibc takes no larger threshold for mmap

_in_gaps: list[int] = []  # blocks that nobody uses


def keep_freed_memory() -> None:
    """From here on what is freed stays, in a heap without large gaps. Does nothing where the C library is not glibc."""
    glibc = ctypes.CDLL(None)
    if not (hasattr(glibc, "mallopt") and hasattr(glibc, "malloc_trim")):
        return
    glibc.malloc.restype, glibc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    glibc.free.argtypes = [ctypes.c_void_p]
    glibc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    while _in_gaps:
        glibc.free(_in_gaps.pop())
    glibc.malloc_trim(0)
    while not _is_mapped(block := glibc.malloc(_LARGEST + 1)):
        _in_gaps.append(block)
    glibc.free(block)


def _is_mapped(block: int) -> bool:
    """Whether it is pages of its own: a flag that glibc keeps beside the size, in front of the block."""
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)
