"""Work that the ops share: slices that bound memory, the quotient that scales, the masked product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

# Cells masked at a time. The six int64 buffers of Philox then take 3 MB, few enough to stay in a cache.
SLICE_CELLS = 1 << 18


def boxes(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a shape into runs of at most `limit` neighbours in logical order (at least one), as leading index slices.

    All slices but the last hold one index, and the dimensions that follow are whole, so that a box is one contiguous
    run of logical indices.
    """
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) > limit:
        axis += 1
    step = max(1, limit // max(1, math.prod(shape[axis + 1 :])))
    for outer in product(*(range(side) for side in shape[:axis])):
        head = tuple(slice(i, i + 1) for i in outer)
        for start in range(0, shape[axis], step):
            yield (*head, slice(start, min(start + step, shape[axis])))


def scale_of_mask(size: int, kept: torch.Tensor) -> torch.Tensor:
    """Size / Sum of a mask as a 0-d float64 tensor on the device of `kept`, an integer tensor; 0 if nothing is kept."""
    total = torch.full((), size, dtype=torch.float64, device=kept.device)
    # torch.div of two tensors: `int / tensor` is a reciprocal and a product, rounded twice.
    return torch.where(kept > 0, torch.div(total, kept.to(torch.float64)), 0.0)


def host_scalar(value: float) -> torch.Tensor:
    """A 0-d float64 tensor of the CPU, in a fifth of the time that `torch.tensor` takes."""
    return torch.from_numpy(np.array(value, dtype=np.float64))


def scale_of_counts(size: int, dropped: int) -> float:
    """The same of numbers that the host knows."""
    return size / (size - dropped) if dropped < size else 0.0


def write_product(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> None:
    """`out = x * factor` (which broadcasts), formed in the compute type, that of `factor`, and then cast."""
    if x.dtype == factor.dtype:
        torch.mul(x, factor, out=out)
        return
    factor = factor.expand(x.shape)
    for box in boxes(x.shape, 4 * SLICE_CELLS):
        out[box] = x[box].to(factor.dtype).mul_(factor[box])


def write_masked(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, dropped: torch.Tensor) -> None:
    """`out = x * scale`, zero where `dropped` (which broadcasts), whatever stood there, NaN and Inf included.

    The scale is rounded once to the compute type, float32 or for float64 tensors float64.
    """
    factor = scale.to(compute_type(x))
    if dropped.numel() < x.numel() and x.is_cpu:
        # The mask of a few shared decisions costs nothing as a factor, but 0 * NaN is NaN: then zeros are written as
        # well. Asking another device would make the host wait.
        write_product(out, x, torch.where(dropped, 0.0, factor))
        if is_finite(out):
            return
    else:
        write_product(out, x, factor)
    out.masked_fill_(dropped, 0.0)


def is_finite(y: torch.Tensor) -> bool:
    """Whether no cell of y (not empty) is NaN or infinite, by one read. False may also mean a sum that overflows."""
    if y.dtype == compute_type(y):
        return bool(y.sum().isfinite())
    # In 16 bits a sum overflows, and one in another dtype first converts all of y. Both ends are NaN if any cell is.
    extent = 1 + sum((side - 1) * stride for side, stride in zip(y.shape, y.stride(), strict=True))
    # aminmax copies what is not contiguous, such as channels_last. Without gaps the order of cells does not matter.
    low, high = torch.aminmax(y.as_strided((extent,), (1,)) if extent == y.numel() else y)
    return bool(low.isfinite() & high.isfinite())


def compute_type(x: torch.Tensor) -> torch.dtype:
    """The type in which a product with the scale is formed, and to which the scale is rounded."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
