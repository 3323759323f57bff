"""Compiled loops of batch norm, pattern, ReLU on the CPU (compiled.py): what comes after the normalisation, in place.

For activations in the compute type, contiguous or channels_last; the normalisation is PyTorch's. Masks are read as in
tiled_numba.py.
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
from .tiled_numba import fragments
from .tiled_numba import gather
from .tiled_numba import number_of_fragments
from .tiled_numba import windows


def relu_(bn: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: float) -> None:
    """`bn = relu(bn) * mask * scale`; NaN stays, where it is not dropped."""
    size, factor = bn.numel() * bn.element_size(), factor_of(bn, scale)
    if bn.is_contiguous():
        planes, *masks = windows(bn, atlas, array(starts))
        run(_relu, _relu_in_threads, len(planes), size, planes, *masks, factor)
    else:
        pixels, *masks = fragments(bn, atlas, array(starts))
        run(_relu_cl, _relu_cl_in_threads, number_of_fragments(pixels), size, pixels, *masks, factor)


def gradient_(bn: torch.Tensor, grad: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: float) -> None:
    """`bn = grad * mask * scale * (bn > 0)`, the gradient of bn; that of NaN is the one of a positive number.

    grad is laid out as bn.
    """
    size, factor = bn.numel() * bn.element_size(), factor_of(bn, scale)
    if bn.is_contiguous():
        planes, *masks = windows(bn, atlas, array(starts))
        grads = array(grad).reshape(planes.shape)
        run(_gradient, _gradient_in_threads, len(planes), size, planes, grads, *masks, factor)
    else:
        pixels, *masks = fragments(bn, atlas, array(starts))
        grads = array(grad.permute(0, 2, 3, 1)).reshape(pixels.shape)
        run(_gradient_cl, _gradient_cl_in_threads, number_of_fragments(pixels), size, pixels, grads, *masks, factor)


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


# ---- channels_last ---------------------------------------------------------------------------------------------------


@loop
def _relu_cl(x, bytes_of, first, step, pitch, apart, factor, begin, end):
    """Fragments begin..end-1 of x (samples, rows, cells, channels), as `tiled_numba._fragments`."""
    rows, cells, channels = x.shape[1:]
    in_row = (cells + 7) // 8
    zero = x.dtype.type(0)
    word = np.empty(channels, np.uint8)
    for fragment in range(begin, end):
        sample, r, at = fragment // (rows * in_row), fragment // in_row % rows, fragment % in_row
        gather(word, bytes_of, first[sample], step, r * pitch + at * apart)
        for b in range(min(8, cells - 8 * at)):
            values = x[sample, r, 8 * at + b]
            bit = np.uint8(1 << b)
            for c in range(channels):
                value = values[c]
                product = value * factor
                values[c] = product if (word[c] & bit != 0) & (not value < zero) else zero


@parallel_loop
def _relu_cl_in_threads(x, bytes_of, first, step, pitch, apart, factor, threads):
    fragments = number_of_fragments(x)
    for t in prange(threads):
        begin, end = fragments * t // threads, fragments * (t + 1) // threads
        _relu_cl(x, bytes_of, first, step, pitch, apart, factor, begin, end)


@loop
def _gradient_cl(x, grad, bytes_of, first, step, pitch, apart, factor, begin, end):
    """The same with gradients of x's shape."""
    rows, cells, channels = x.shape[1:]
    in_row = (cells + 7) // 8
    zero = x.dtype.type(0)
    word = np.empty(channels, np.uint8)
    for fragment in range(begin, end):
        sample, r, at = fragment // (rows * in_row), fragment // in_row % rows, fragment % in_row
        gather(word, bytes_of, first[sample], step, r * pitch + at * apart)
        for b in range(min(8, cells - 8 * at)):
            values, gradients = x[sample, r, 8 * at + b], grad[sample, r, 8 * at + b]
            bit = np.uint8(1 << b)
            for c in range(channels):
                product = gradients[c] * factor
                values[c] = product if (word[c] & bit != 0) & (not values[c] <= zero) else zero


@parallel_loop
def _gradient_cl_in_threads(x, grad, bytes_of, first, step, pitch, apart, factor, threads):
    fragments = number_of_fragments(x)
    for t in prange(threads):
        begin, end = fragments * t // threads, fragments * (t + 1) // threads
        _gradient_cl(x, grad, bytes_of, first, step, pitch, apart, factor, begin, end)
