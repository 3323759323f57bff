"""`residual + dropout(x)` in float64, and how far a result in fewer digits may be from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def add(x: Floats, residual: Floats, kept: NDArray[np.bool_], scale: float) -> Floats:
    """kept broadcasts to x; where it is False the residual stays, whatever x holds."""
    return np.where(kept, residual + np.where(kept, x, 0) * scale, residual)


def bound(x: Floats, residual: Floats, kept: NDArray[np.bool_], scale: float, compute: float, result: float) -> Floats:
    """With unit roundoffs of the compute type and of the result's type.

    The scale, the product (unless it is part of a fused multiply-add) and the sum are rounded to the compute type, the
    result once more to its own. Where x is dropped the residual comes back exactly.
    """
    product = np.where(kept, np.abs(x), 0) * abs(scale)
    total = np.abs(residual) + product
    return np.where(kept, (2 * product + total) * compute * (1 + 4 * compute) + (1 + 4 * compute) * total * result, 0)
