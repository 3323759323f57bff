"""The token pattern from its definition, one element at a time, and the three methods that are its special cases."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from .philox_numpy import below
from .philox_numpy import key_of
from .philox_numpy import philox

Bools = NDArray[np.bool_]

# Frozen: N = 2, T = 12, C = 6, size 3, stride 2, rate .5, seed 2^40 + 8, rank 3; T x C, tokens separated by blanks,
# `#` dropped. (share_t, sample) -> rows.
GOLDEN = {
    (True, 1): "###... ...... ...... ....#. ....#. ....#. ...... ...... ..###. ..###. ..###. ......",
    (False, 0): "##.#.# ...... ...... ####.. ##..#. #..#.. ...... ...... ..#.## ...... ###### ......",
}


def phase(sample: int, T: int, size: int, stride: int, seed: int, rank: int) -> int:
    if size >= T:
        return 0
    return int(below(philox(0, 0, sample, rank, key_of(seed))[0], size + stride))


def dropped(
    N: int,
    T: int,
    C: int,
    size: int,
    stride: int,
    rate: float,
    seed: int,
    share_t: bool = False,
    share_c: bool = False,
    rank: int = 0,
) -> Bools:
    """The mask (N, T, C), True = dropped."""
    threshold = int(rate * 2**32)
    period = size + stride
    mask = np.zeros((N, T, C), dtype=bool)
    for n in range(N):
        start = phase(n, T, size, stride, seed, rank)
        for t in range(T):
            span, within = divmod(t + start, period)
            if within >= size:
                continue
            for c in range(C):
                cell_t, cell_c = span if share_t else t, 0 if share_c else c
                word = philox(cell_c // 4, 1 + cell_t, n, rank, key_of(seed))[cell_c % 4]
                mask[n, t, c] = int(word) < threshold
    return mask


def in_layout(mask: Bools, layout: str, heads: int) -> Bools:
    """A mask (N, T, C) as one of the shape that the layout spells; C is heads * D, or heads * queries."""
    N, T, C = mask.shape
    if layout == "NTC":
        return mask
    if layout == "TNC":
        moved = np.empty((T, N, C), dtype=bool)
        for t, n in product(range(T), range(N)):
            moved[t, n] = mask[n, t]
        return moved
    width = C // heads
    moved = np.empty((N, heads, T, width) if layout == "NHTD" else (N, heads, width, T), dtype=bool)
    for n, t, c in product(range(N), range(T), range(C)):
        head, inner = divmod(c, width)
        if layout == "NHTD":
            moved[n, head, t, inner] = mask[n, t, c]
        else:
            moved[n, head, inner, t] = mask[n, t, c]
    return moved


def scale(mask: Bools, T: int, size: int, stride: int, rate: float, normalize: str) -> float:
    """The float64 scale of a call that drew this mask (True = dropped)."""
    if normalize == "mask":
        kept = mask.size - int(mask.sum())
        return mask.size / kept if kept else 0.0
    if normalize == "expected":
        coverage = 1.0 if size >= T else size / (size + stride)
        return 0.0 if rate * coverage == 1 else 1 / (1 - rate * coverage)
    return 1.0


# ---- the methods that are special cases, each from its own description ----------------------------------------------


def words(seed: int, rank: int, counters: list[tuple[int, int, int]]) -> NDArray[np.uint64]:
    """All four words of the counters (c0, c1, c2, rank), as (counters, 4)."""
    columns = [np.array(column, dtype=np.uint64) for column in zip(*counters, strict=True)]
    return np.stack(philox(*columns, rank, key_of(seed)), axis=1)


def dropout(N: int, T: int, C: int, rate: float, seed: int, rank: int) -> Bools:
    """Dropout (Srivastava et al. 2014): every element is dropped by itself; four neighbours in c share a call."""
    calls = (C + 3) // 4
    drawn = words(seed, rank, [(call, 1 + t, n) for n in range(N) for t in range(T) for call in range(calls)])
    return (drawn < rate * 2**32).reshape(N, T, 4 * calls)[:, :, :C]


def word_dropout(N: int, T: int, C: int, rate: float, seed: int, rank: int) -> Bools:
    """Word dropout (Gal & Ghahramani 2016): a token is dropped with all its channels."""
    drawn = words(seed, rank, [(0, 1 + t, n) for n in range(N) for t in range(T)])[:, 0]
    return np.repeat((drawn < rate * 2**32).reshape(N, T, 1), C, axis=2)


def variational_dropout(N: int, T: int, C: int, rate: float, seed: int, rank: int) -> Bools:
    """Variational dropout (Gal & Ghahramani 2016): a channel is dropped for the whole sequence of a sample."""
    calls = (C + 3) // 4
    drawn = words(seed, rank, [(call, 1, n) for n in range(N) for call in range(calls)])
    channels = (drawn < rate * 2**32).reshape(N, 1, 4 * calls)[:, :, :C]
    return np.repeat(channels, T, axis=1)
