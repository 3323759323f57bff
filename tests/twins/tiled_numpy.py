"""The tiled pattern from its definition: no atlas, no cache; every cell of every plane is put through the formulas.

Rates and scales are exact fractions until the definition rounds them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from .philox_numpy import below
from .philox_numpy import key_of
from .philox_numpy import philox

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ONE = 2**24  # the fixed point of the map from cells to the pattern's plane


@dataclass(frozen=True)
class Tiling:
    size: float
    stride: float = 0.0
    repeat: int = 1
    rotate: float = 0.0
    shear_x: float = 0.0
    shear_y: float = 0.0


def tile_and_gap(t: Tiling, side: int) -> tuple[int, int]:
    tile = math.floor(t.size * side + 0.5)
    gap = 0 if t.stride == 0 else max(1, math.floor(t.stride * side + 0.5))
    return tile, gap


def matrix(t: Tiling) -> tuple[int, int, int, int]:
    """M00, M01, M10, M11 in units of 2^-24."""
    a = math.radians(t.rotate)
    c = math.cos(a)
    s = math.sin(a)
    entries = (c - s * t.shear_x, c * t.shear_y - s, s + c * t.shear_x, s * t.shear_y + c)
    m00, m01, m10, m11 = (math.floor(m * ONE + 0.5) for m in entries)
    return m00, m01, m10, m11


def axis_dropped(u: Ints, tile: int, gap: int, repeat: int) -> Bools:
    """Whether the plane's coordinate `u` lies in a tile, on one axis."""
    period = tile + gap
    in_tile = np.mod(u, period) < tile  # np.mod of integers is the floor-mod
    if repeat == 0:
        return in_tile
    extent = repeat * period - gap
    return (u >= 0) & (u < extent) & in_tile


def dropped(t: Tiling, H: int, W: int, dy: ArrayLike, dx: ArrayLike) -> Bools:
    """Whether a cell at displacement (dy, dx) from the centre is dropped; `dy` and `dx` broadcast."""
    dy, dx = np.broadcast_arrays(np.asarray(dy, dtype=np.int64), np.asarray(dx, dtype=np.int64))
    tile_h, gap_h = tile_and_gap(t, H)
    tile_w, gap_w = tile_and_gap(t, W)
    if tile_h == 0 or tile_w == 0:
        return np.zeros(dy.shape, dtype=np.bool_)
    repeat_in_extent = max(1, t.repeat)  # unlimited: centred on one tile
    extent_h = repeat_in_extent * (tile_h + gap_h) - gap_h
    extent_w = repeat_in_extent * (tile_w + gap_w) - gap_w
    m00, m01, m10, m11 = matrix(t)
    u = (m00 * dy + m01 * dx + (extent_h - 1) * 2**23 + 2**23) >> 24
    v = (m10 * dy + m11 * dx + (extent_w - 1) * 2**23 + 2**23) >> 24
    return axis_dropped(u, tile_h, gap_h, t.repeat) & axis_dropped(v, tile_w, gap_w, t.repeat)


def dropped_around(t: Tiling, H: int, W: int, cy: int, cx: int) -> Bools:
    """The dropped cells (H, W) of one map whose pattern is centred at (cy, cx)."""
    y = np.arange(H)[:, None]
    x = np.arange(W)[None, :]
    return dropped(t, H, W, y - cy, x - cx)


def mask(t: Tiling, N: int, C: int, H: int, W: int, seed: int, share_c: bool = False, rank: int = 0) -> Bools:
    """The mask (N, C, H, W), True = kept."""
    sample = np.arange(N).reshape(N, 1, 1, 1)
    channel = np.arange(1 if share_c else C).reshape(1, -1, 1, 1)
    w0, w1, _, _ = philox(channel, 0, sample, rank, key_of(seed))
    cy = below(w0, H)
    cx = below(w1, W)
    y = np.arange(H).reshape(1, 1, H, 1)
    x = np.arange(W).reshape(1, 1, 1, W)
    return np.broadcast_to(~dropped(t, H, W, y - cy, x - cx), (N, C, H, W)).copy()


@functools.cache  # pure, and slow on large maps
def dropped_counts(t: Tiling, H: int, W: int) -> tuple[int, ...]:
    """The number of dropped cells for each of the H*W placements."""
    return tuple(int(dropped_around(t, H, W, cy, cx).sum()) for cy in range(H) for cx in range(W))


def expected_rate(t: Tiling, H: int, W: int) -> Fraction:
    """The expected dropped share of a map, over its H*W equally likely placements."""
    return Fraction(sum(dropped_counts(t, H, W)), (H * W) ** 2)


def rate_variance(t: Tiling, H: int, W: int) -> Fraction:
    """The variance of the dropped share of one map, over its H*W equally likely placements."""
    counts = dropped_counts(t, H, W)
    return Fraction(sum(k * k for k in counts), (H * W) ** 3) - expected_rate(t, H, W) ** 2


def mask_scale(kept: Bools) -> float:
    """Size(m) / Sum(m) as a float64; 0 when everything is dropped."""
    total = int(kept.sum())
    return float(Fraction(kept.size, total)) if total else 0.0


def expected_scale(rate: Fraction) -> float:
    """1 / (1 - rate) as a float64; 0 when everything is dropped."""
    return float(1 / (1 - rate)) if rate != 1 else 0.0


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest bfloat16, ties to even; infinities stay, NaN is not handled."""
    bits = values.view(np.uint32).astype(np.uint64)
    odd = (bits >> np.uint64(16)) & np.uint64(1)
    rounded = (bits + np.uint64(0x7FFF) + odd) & np.uint64(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def output(x: NDArray[np.float64], kept: Bools, scale: float, dtype: str) -> NDArray[np.float64]:
    """The op's result: `x` holds values of `dtype` (float64, float32, float16 or bfloat16) and so does the result."""
    # A product past the largest float16 is an infinity, and an infinity times a scale of 0 belongs to a dropped cell.
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float64":
            product = x * scale
        else:
            single = x.astype(np.float32) * np.float32(scale)
            if dtype == "float32":
                product = single.astype(np.float64)
            elif dtype == "float16":
                product = single.astype(np.float16).astype(np.float64)
            else:
                product = round_to_bfloat16(single).astype(np.float64)
    return np.where(kept, product, 0.0)
