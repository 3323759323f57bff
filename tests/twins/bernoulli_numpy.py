"""Independent decisions, one Philox call a decision, in Python loops."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from .philox_numpy import key_of
from .philox_numpy import philox


def kept(shape: tuple[int, ...], rate: float, seed: int, shared: str, rank: int) -> NDArray[np.bool_]:
    """The mask of a call with x of this shape, True = kept."""
    threshold = int(rate * 2**32)
    mask = np.empty(shape, dtype=bool)
    for sample, *cell in product(*(range(side) for side in shape)):
        index = 0
        if shared == "none":
            for place, side in zip(cell, shape[1:], strict=True):
                index = index * side + place
        elif shared == "map":
            index = cell[0]
        call = index // 4
        word = philox(call % 2**32, call // 2**32, sample, rank, key_of(seed))[index % 4]
        mask[(sample, *cell)] = int(word) >= threshold
    return mask


def scale(mask: NDArray[np.bool_], rate: float, normalize: str) -> float:
    """The float64 scale of a call that drew this mask."""
    if normalize == "mask":
        return mask.size / int(mask.sum()) if mask.any() else 0.0
    if normalize == "expected":
        return 0.0 if rate == 1 else 1 / (1 - rate)
    return 1.0
