"""Independent decisions, one Philox call a decision, in Python loops."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from .philox_numpy import key_of
from .philox_numpy import philox


def kept(shape: tuple[int, ...], rate: float, seed: int, shared: str | tuple[int, ...], rank: int) -> NDArray[np.bool_]:
    """The mask of a call with x of this shape, True = kept."""
    threshold = int(rate * 2**32)
    mask = np.empty(shape, dtype=bool)
    for cell in product(*(range(side) for side in shape)):
        if shared == "none":
            own = list(range(1, len(shape)))
        elif shared == "map":
            own = [1]
        elif shared == "sample":
            own = []
        else:
            own = [dim for dim in range(1, len(shape)) if dim not in shared]
        index = 0
        for dim in own:
            index = index * shape[dim] + cell[dim]
        sample = cell[0] if isinstance(shared, str) or 0 not in shared else 0
        call = index // 4
        word = philox(call % 2**32, call // 2**32, sample, rank, key_of(seed))[index % 4]
        mask[cell] = int(word) >= threshold
    return mask


def scale(mask: NDArray[np.bool_], rate: float, normalize: str) -> float:
    """The float64 scale of a call that drew this mask."""
    if normalize == "mask":
        return mask.size / int(mask.sum()) if mask.any() else 0.0
    if normalize == "expected":
        return 0.0 if rate == 1 else 1 / (1 - rate)
    return 1.0
