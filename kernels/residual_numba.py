"""The compiled loop of `residual + tiled dropout` on the CPU (compiled.py), for contiguous float32 and float64.

Masks are read as in tiled_numba.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from .atlas import Atlas
from .compiled import array
from .compiled import factor_of
from .compiled import loop
from .compiled import parallel_loop
from .compiled import run
from .tiled_numba import windows


def add_tiled(
    x: torch.Tensor, residual: torch.Tensor, y: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: float
) -> None:
    """Writes residual + x * mask * scale to y."""
    planes, *masks = windows(x, atlas, array(starts))
    others = (array(t).reshape(planes.shape) for t in (residual, y))
    size = x.numel() * x.element_size()
    run(_planes, _planes_in_threads, len(planes), size, planes, *others, *masks, factor_of(x, scale))


@loop
def _planes(x, residual, y, kept, first, step, pitch, factor, begin, end):
    """Planes begin..end-1 of x (planes, runs, cells), as `tiled_numba._planes`."""
    sharing = x.shape[0] // first.shape[0]
    cells = x.shape[2]
    zero = x.dtype.type(0)
    for plane in range(begin, end):
        start = np.int64(first[plane // sharing]) * step
        for r in range(x.shape[1]):
            source, other, target = x[plane, r], residual[plane, r], y[plane, r]
            mask = kept[start + r * pitch : start + r * pitch + cells]
            for i in range(cells):
                product = source[i] * factor
                target[i] = other[i] + (product if mask[i] else zero)


@parallel_loop
def _planes_in_threads(x, residual, y, kept, first, step, pitch, factor, threads):
    planes = x.shape[0]
    for t in prange(threads):
        begin, end = planes * t // threads, planes * (t + 1) // threads
        _planes(x, residual, y, kept, first, step, pitch, factor, begin, end)
