"""DropBlock with a Poisson number of blocks, one plane and one block at a time.

lambda is found by bisection, on a sum that runs over all cells and counts their covering positions one by one.
"""

from __future__ import annotations

from decimal import ROUND_FLOOR
from decimal import Context
from decimal import Decimal
from decimal import localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .philox_numpy import below
from .philox_numpy import key_of
from .philox_numpy import philox


@lru_cache(maxsize=64)
def cover_counts(height: int, width: int, block_size: int) -> tuple[tuple[int, int], ...]:
    """(k, number of cells that k positions of a block cover), by laying a block on every position."""
    b_h, b_w = min(block_size, height), min(block_size, width)
    covers = np.zeros((height, width), dtype=int)
    for top in range(height - b_h + 1):
        for left in range(width - b_w + 1):
            covers[top : top + b_h, left : left + b_w] += 1
    return tuple((int(k), int(n)) for k, n in zip(*np.unique(covers, return_counts=True), strict=True))


@lru_cache(maxsize=64)
def mean_blocks(height: int, width: int, rate: float, block_size: int) -> Decimal:
    """lambda, rounded to 24 significant digits."""
    positions = (height - min(block_size, height) + 1) * (width - min(block_size, width) + 1)
    with localcontext(Context(prec=60, Emin=-999999, Emax=999999)):
        target = Decimal(rate) * height * width

        def dropped(mean: Decimal) -> Decimal:
            counts = cover_counts(height, width, block_size)
            return sum((n * (1 - (-mean * k / positions).exp()) for k, n in counts), Decimal(0))

        low, high = Decimal(0), Decimal(1)
        while dropped(high) < target:
            high *= 2
        while high - low > high.scaleb(-40):
            middle = (low + high) / 2
            low, high = (middle, high) if dropped(middle) < target else (low, middle)
        return Context(prec=24).plus(high)


@lru_cache(maxsize=64)
def thresholds(mean: Decimal) -> tuple[int, ...]:
    """floor(P(K <= k) * 2^32 + 1/2), up to the first that is 2^32."""
    with localcontext(Context(prec=60, Emin=-999999, Emax=999999)):
        table: list[int] = []
        probability, total = (-mean).exp(), Decimal(0)
        while not table or table[-1] < 2**32:
            total += probability
            table.append(int((total * 2**32 + Decimal("0.5")).to_integral_value(ROUND_FLOOR)))
            probability = probability * mean / len(table)
        return tuple(table)


def corners(
    height: int, width: int, rate: float, block_size: int, seed: int, sample: int, channel: int, rank: int
) -> list[tuple[int, int]]:
    """The top-left corners of the blocks of a plane, in the order in which they are drawn."""
    key = key_of(seed)
    word = int(philox(channel, 0, sample, rank, key)[0])
    number = 0
    for threshold in thresholds(mean_blocks(height, width, rate, block_size)):
        number += threshold <= word
    places = []
    for j in range(number):
        words = philox(channel, 1 + j // 2, sample, rank, key)
        top = below(words[2 * (j % 2)], height - min(block_size, height) + 1)
        left = below(words[2 * (j % 2) + 1], width - min(block_size, width) + 1)
        places.append((int(top), int(left)))
    return places


def kept(
    shape: tuple[int, int, int, int], rate: float, block_size: int, seed: int, share_c: bool, rank: int
) -> NDArray[np.bool_]:
    """The mask of a call with x of this shape, True = kept."""
    N, C, H, W = shape
    mask = np.ones(shape, dtype=bool)
    for n in range(N):
        for c in range(C):
            for top, left in corners(H, W, rate, block_size, seed, n, 0 if share_c else c, rank):
                mask[n, c, top : top + block_size, left : left + block_size] = False
    return mask


def scale(mask: NDArray[np.bool_], rate: float, normalize: str) -> float:
    """The float64 scale of a call that drew this mask."""
    if normalize == "mask":
        return mask.size / int(mask.sum()) if mask.any() else 0.0
    return 1 / (1 - rate) if normalize == "expected" else 1.0
