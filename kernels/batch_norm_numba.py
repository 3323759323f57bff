"""Compiled loops of batch norm, pattern, ReLU on the CPU (compiled.py): what comes after the normalisation, in place.

For contiguous activations in the compute type; the normalisation is PyTorch's. Masks are read as in tiled_numba.py.
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


def relu_(bn: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: float) -> None:
    """`bn = relu(bn) * mask * scale`; NaN stays, where it is not dropped."""
    planes, kept, first, step, pitch = windows(bn, atlas, starts)
    size, factor = bn.numel() * bn.element_size(), factor_of(bn, scale)
    run(_relu, _relu_in_threads, len(planes), size, planes, kept, first, step, pitch, factor)


def gradient_(bn: torch.Tensor, grad: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: float) -> None:
    """`bn = grad * mask * scale * (bn > 0)`, the gradient of bn; that of NaN is the one of a positive number."""
    planes, kept, first, step, pitch = windows(bn, atlas, starts)
    size, factor = bn.numel() * bn.element_size(), factor_of(bn, scale)
    grads = array(grad).reshape(planes.shape)
    run(_gradient, _gradient_in_threads, len(planes), size, planes, grads, kept, first, step, pitch, factor)


@loop
def _relu(x, kept, first, step, pitch, factor, begin, end):
    """Planes begin..end-1 of x (planes, runs, cells), as `tiled_numba._planes`."""
    sharing = x.shape[0] // first.shape[0]
    cells = x.shape[2]
    zero = x.dtype.type(0)
    for plane in range(begin, end):
        start = np.int64(first[plane // sharing]) * step
        for r in range(x.shape[1]):
            values = x[plane, r]
            mask = kept[start + r * pitch : start + r * pitch + cells]
            for i in range(cells):
                value = values[i]
                product = value * factor
                values[i] = product if mask[i] & (not value < zero) else zero


@parallel_loop
def _relu_in_threads(x, kept, first, step, pitch, factor, threads):
    planes = x.shape[0]
    for t in prange(threads):
        _relu(x, kept, first, step, pitch, factor, planes * t // threads, planes * (t + 1) // threads)


@loop
def _gradient(x, grad, kept, first, step, pitch, factor, begin, end):
    """The same with gradients of x's shape."""
    sharing = x.shape[0] // first.shape[0]
    cells = x.shape[2]
    zero = x.dtype.type(0)
    for plane in range(begin, end):
        start = np.int64(first[plane // sharing]) * step
        for r in range(x.shape[1]):
            values, gradients = x[plane, r], grad[plane, r]
            mask = kept[start + r * pitch : start + r * pitch + cells]
            for i in range(cells):
                product = gradients[i] * factor
                values[i] = product if mask[i] & (not values[i] <= zero) else zero


@parallel_loop
def _gradient_in_threads(x, grad, kept, first, step, pitch, factor, threads):
    planes = x.shape[0]
    for t in prange(threads):
        _gradient(x, grad, kept, first, step, pitch, factor, planes * t // threads, planes * (t + 1) // threads)
