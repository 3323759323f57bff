"""Large outputs on the CPU, in huge pages.

A new tensor of some megabytes is memory that the system has yet to give: page by page, each zeroed and entered at the
first write. With pages of 4 KiB that takes longer than the product itself (docs/cpu-speed.md), with pages of 2 MiB,
for which Linux lets programs ask, far less. NumPy asks for its arrays, PyTorch does not by default; as there,
`NUMPY_MADVISE_HUGEPAGE=0` in the environment turns it off.

For ops that memory bounds. Where arithmetic takes longer there is little to gain, and something to lose on a virtual
machine that hands free memory back to its host, which then has to give every huge page anew.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import lru_cache

import torch

HUGE_PAGE = 1 << 21
# Bytes from which a tensor is sure to contain a whole huge page.
LARGE = 2 * HUGE_PAGE

Advise = Callable[[int, int], int]  # address, bytes; both multiples of a page


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like(x)`; if it is large and on the CPU, with a request for huge pages where Linux takes one.

    A request: what the system does not grant changes nothing. Pages that the tensor shares with its neighbours in
    memory are left out.
    """
    y = torch.empty_like(x)
    if y.device.type == "cpu" and y.nbytes >= LARGE and (advise := _huge_pages()) is not None:
        begin = -(-y.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (y.data_ptr() + y.nbytes) // HUGE_PAGE * HUGE_PAGE
        advise(begin, end - begin)
    return y


@lru_cache(maxsize=1)
def _huge_pages() -> Advise | None:
    """madvise(address, bytes, MADV_HUGEPAGE) of the C library; None where there is no such advice, or is to be none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or os.environ.get("NUMPY_MADVISE_HUGEPAGE") == "0":
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address, length: int(madvise(address, length, advice))
