"""The tiled pattern on a sequence (N, C, L) from its definition, position by position in Python integers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .philox_numpy import below
from .philox_numpy import key_of
from .philox_numpy import philox


def is_dropped(displacement: int, size: float, stride: float, repeat: int, length: int) -> bool:
    """Whether the position so far from the centre lies in a tile."""
    tile = math.floor(size * length + 0.5)
    if tile == 0:
        return False
    gap = 0 if stride == 0 else max(1, math.floor(stride * length + 0.5))
    extent = (repeat or 1) * (tile + gap) - gap
    u = displacement + extent // 2
    if repeat and not 0 <= u < extent:
        return False
    return u % (tile + gap) < tile


def centre(sample: int, channel: int, length: int, seed: int, rank: int) -> int:
    words = philox(channel, 0, sample, rank, key_of(seed))
    return int(below(words[1], length))


def mask(
    size: float,
    stride: float,
    repeat: int,
    shape: tuple[int, int, int],
    seed: int,
    share_c: bool = False,
    rank: int = 0,
) -> NDArray[np.bool_]:
    """True = kept."""
    kept = np.empty(shape, dtype=np.bool_)
    n, c, length = shape
    for i in range(n):
        for j in range(c):
            cx = centre(i, 0 if share_c else j, length, seed, rank)
            kept[i, j] = [not is_dropped(t - cx, size, stride, repeat, length) for t in range(length)]
    return kept
