"""The atlas of a tiled pattern on a map: every mask it can produce, in one small bitmap (docs/definitions.md).

A placed pattern drops cell (y, x) when the pattern plane is dropped at the displacement (y - cy, x - cx) from its
centre. So one bitmap of (2H-1) x (2W-1) displacements holds all H*W placements, each as a window. It is computed once
per pattern and map on the host, in integers; kernels only look things up, and no rounding can differ between devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from functools import lru_cache
from numbers import Integral
from numbers import Real
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .checks import check_fields

FIELDS = ("size", "stride", "repeat", "rotate", "shear_x", "shear_y")
RANGES = {"size": (0.0, 2.0), "stride": (0.0, 4.0), "repeat": (0, 64), "shear_x": (-2.0, 2.0), "shear_y": (-2.0, 2.0)}

# Atlases kept: a network has tens of sites and few map sizes; a schedule that changes a pattern every step must not
# fill the memory.
CACHED = 256

# The flat table holds 8 times a GPU's need and serves maps up to 80x80; larger ones are masked plane by plane.
FLAT_CELLS = 1 << 20

FRACTION_BITS = 24
HALF = 1 << (FRACTION_BITS - 1)


class Atlas:
    """The atlas of one tiled pattern on an H x W map, or on a sequence. Made by `of` and `of_sequence`, which cache.

    Attributes:
        fields: float64 tensor of 6 on the CPU: size, stride, repeat, rotate, shear_x, shear_y.
        sides: (H, W) of a map, (L,) of a sequence.
        height, width: the map; of a sequence 1 and L.
        dropped: bool array (2H-1, 2W-1), True where the plane is dropped at displacement (row - (H-1), column - (W-1)).
        counts: int64 array (H, W), dropped cells of the map when the centre is at (cy, cx).
        expected_rate: exact expected share of dropped cells, over the uniform placement.
    """

    def __init__(self, values: tuple[float, ...], sides: tuple[int, ...]) -> None:
        # Cached, and saved for backward: an ordinary tensor, also where inference mode is on when it is made.
        with torch.inference_mode(False):
            self.fields = torch.from_numpy(np.array(values, dtype=np.float64))
        self.sides = sides
        self.height, self.width = sides if len(sides) == 2 else (1, *sides)
        self.dropped = _dropped(values, *sides) if len(sides) == 2 else _dropped_of_sequence(values, *sides)
        self.counts = _window_sums(self.dropped, self.height, self.width)
        self._on_device: dict[torch.device, DeviceTables] = {}

    @classmethod
    def of(
        cls,
        size: float,
        stride: float,
        repeat: int,
        rotate: float,
        shear_x: float,
        shear_y: float,
        height: int,
        width: int,
    ) -> Atlas:
        """The atlas of these fields on a height x width map.

        Raises:
            TypeError: a field that is no number, a side that is no integer.
            ValueError: a field out of its range (the message names it), unlimited repeat without stride, an empty map.
        """
        return _checked_atlas((size, stride, repeat, rotate, shear_x, shear_y), height=height, width=width)

    @classmethod
    def of_sequence(cls, size: float, stride: float, repeat: int, length: int) -> Atlas:
        """The atlas of these fields on a sequence of so many positions: the map of one row on whose columns they tile.

        Raises:
            TypeError, ValueError: as `of`.
        """
        return _checked_atlas((size, stride, repeat, 0.0, 0.0, 0.0), length=length)

    @property
    def expected_dropped(self) -> int:
        """Dropped cells summed over all H*W placements; divided by (H*W)^2 it is the expected rate."""
        return int(self.counts.sum())

    @property
    def expected_rate(self) -> float:
        return self.expected_dropped / (self.height * self.width) ** 2

    @cached_property
    def kept_flat(self) -> torch.Tensor | None:
        """The atlas once per column offset: bool (W * (2H-1) * W), True = kept; None if too large.

        In copy `cx` the rows of the atlas are cut to the W columns that a window centred in column cx sees. A window
        is then one contiguous run of H*W cells that begins in cell `start * W` with `start = cx * (2H-1) + H-1-cy`,
        and the mask of a plane is one row of a strided view, without any arithmetic on coordinates.
        """
        height, width = self.height, self.width
        if width * (2 * height - 1) * width > FLAT_CELLS:
            return None
        windows = np.lib.stride_tricks.sliding_window_view(~self.dropped, width, axis=1)  # (2H-1, W, W)
        by_centre = windows[:, ::-1].transpose(1, 0, 2)  # the window of centre column cx begins at W-1-cx
        return torch.from_numpy(by_centre.flatten())

    @cached_property
    def counts_by_start(self) -> torch.Tensor:
        """`counts` in the order of starts, `cx * (2H-1) + H-1-cy`: int32 (W * (2H-1)), 0 where no centre starts."""
        by_start = np.zeros((self.width, 2 * self.height - 1), dtype=np.int32)
        by_start[:, : self.height] = self.counts[::-1].T
        return torch.from_numpy(by_start.reshape(-1))

    @cached_property
    def on_cpu(self) -> HostTables:
        """What the loops over contiguous activations need (see tiled_numba.py)."""
        height, width, flat = self.height, self.width, self.kept_flat
        counts = self.counts_by_start.numpy()
        if flat is None:
            return HostTables(counts, ~self.dropped.reshape(-1), 1, height, width, 2 * width - 1)
        return HostTables(counts, flat.numpy(), width, 1, height * width, 0)

    def on(self, device: torch.device) -> DeviceTables:
        """What a kernel on `device` needs, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = DeviceTables(self, device)
        return self._on_device[device]


class HostTables(NamedTuple):
    """The atlas in the form that the compiled loops of the CPU read.

    Attributes:
        counts: `Atlas.counts_by_start`.
        kept: cells of mask, 1 = kept.
        step: cells from one start to the next in `kept`.
        rows, row_cells: runs of cells that make a plane, and their length. One while the flat table fits.
        pitch: cells of mask from one run to the next.
    """

    counts: npt.NDArray[np.int32]
    kept: npt.NDArray[np.bool_]
    step: int
    rows: int
    row_cells: int
    pitch: int


class DeviceTables:
    """The atlas in the form that the Triton kernels read (see tiled_triton.py).

    Attributes:
        counts: int32 tensor, `Atlas.counts_by_start`.
        fragments: uint8 tensor; bit b of a byte is set when cell b of its fragment of 8 cells is kept. 8 KB for 32x32,
            44 KB for 56x56, 0.6 KB for 7x7.
        rows: rows of fragments per plane. 1 while the flat table fits: a plane is then one row of H*W cells.
        row_cells: cells in such a row.
        pitch: bytes from one row of fragments to the next.
        step: bytes from one fragment to the next.
        start_step: bytes from one start to the next in the flat table; 0 otherwise.
    """

    def __init__(self, atlas: Atlas, device: torch.device) -> None:
        height, width = atlas.height, atlas.width
        self.counts = atlas.counts_by_start.to(device)
        self.flat = atlas.kept_flat is not None
        self._atlas = atlas
        self._device = device
        self._fragments: dict[int, torch.Tensor] = {}
        self.fragments, grain = self.fragments_of(8)
        if self.flat:
            self.rows, self.row_cells, self.pitch = 1, height * width, 0
            self.step, self.start_step = 8 // grain, width // grain
        else:
            self.rows, self.row_cells, self.pitch = height, width, 2 * width - 1
            self.step, self.start_step = 8, 0

    def fragments_of(self, lanes: int) -> tuple[torch.Tensor, int]:
        """Bytes for fragments of 8, 4 or 2 cells that begin at multiples of it, and how many cells they are apart.

        Windows begin at multiples of W in the flat table: only every gcd(W, lanes)-th byte is ever read.
        """
        grain = math.gcd(self._atlas.width, lanes) if self.flat else 1
        if lanes not in self._fragments:
            kept = self._atlas.kept_flat
            packed = _fragments(~self._atlas.dropped if kept is None else kept.numpy(), lanes).reshape(-1)[::grain]
            self._fragments[lanes] = torch.from_numpy(packed.copy()).to(self._device)
        return self._fragments[lanes], grain


def atlas_of(fields: torch.Tensor, sides: Sequence[int]) -> Atlas:
    """The atlas of a fields tensor, as the ops receive it, on a map (H, W) or a sequence (L,).

    Raises:
        TypeError, ValueError: fields is not a float64 tensor of 6 numbers on the CPU, or a number is out of its range.
    """
    check_atlas_fields(fields)
    return _cached_atlas(tuple(fields.tolist()), tuple(sides))


def check_atlas_fields(fields: torch.Tensor) -> None:
    """Refuse what is not a fields tensor; reads no value, so it can be traced."""
    check_fields(fields, FIELDS, "atlas must be an Atlas or")


def _checked_atlas(values: tuple[float, ...], **sides: int) -> Atlas:
    for name, value in zip(FIELDS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    for name, side in sides.items():
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"{name} must be an integer, got {side!r} of type {type(side).__name__}")
    return _cached_atlas(values, tuple(sides.values()))


@lru_cache(maxsize=CACHED)
def _cached_atlas(values: tuple[float, ...], sides: tuple[int, ...]) -> Atlas:
    if min(sides) < 1:
        names = "height and width" if len(sides) == 2 else "length"
        raise ValueError(f"{names} must be at least 1, got {' and '.join(map(str, sides))}")
    for name, value in zip(FIELDS, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    if values[2] != int(values[2]):
        raise ValueError(f"repeat must be a whole number, got {values[2]}")
    if values[2] == 0 and values[1] == 0:
        raise ValueError("stride must be above 0 when repeat is 0 (unlimited): stride 0 would drop everything")
    if len(sides) == 1:
        for name, value in zip(FIELDS[3:], values[3:], strict=True):
            if value:
                raise ValueError(f"{name} must be 0 on a sequence (N, C, L), which has one axis, got {value}")
    return Atlas(values, sides)


def _cells(size: float, stride: float, side: int) -> tuple[int, int]:
    """Tile and gap in cells on an axis of `side` cells."""
    tile = math.floor(size * side + 0.5)
    gap = 0 if stride == 0 else max(1, math.floor(stride * side + 0.5))
    return tile, gap


def _dropped(values: Sequence[float], height: int, width: int) -> npt.NDArray[np.bool_]:
    size, stride, _, rotate, shear_x, shear_y = values
    repeat = int(values[2])
    tile_h, gap_h = _cells(size, stride, height)
    tile_w, gap_w = _cells(size, stride, width)
    if tile_h == 0 or tile_w == 0:
        return np.zeros((2 * height - 1, 2 * width - 1), dtype=np.bool_)

    angle = math.radians(rotate)
    c, s = math.cos(angle), math.sin(angle)
    m00, m01, m10, m11 = (
        math.floor(m * (1 << FRACTION_BITS) + 0.5)
        for m in (c - s * shear_x, c * shear_y - s, s + c * shear_x, s * shear_y + c)
    )
    dy = np.arange(-(height - 1), height, dtype=np.int64)[:, None]
    dx = np.arange(-(width - 1), width, dtype=np.int64)[None, :]

    rows = _in_tiles(m00 * dy + m01 * dx, tile_h, gap_h, repeat)
    return rows & _in_tiles(m10 * dy + m11 * dx, tile_w, gap_w, repeat)


def _dropped_of_sequence(values: Sequence[float], length: int) -> npt.NDArray[np.bool_]:
    tile, gap = _cells(values[0], values[1], length)
    displacements = np.arange(-(length - 1), length, dtype=np.int64)[None]
    if tile == 0:
        return np.zeros_like(displacements, dtype=np.bool_)
    return _in_tiles(displacements << FRACTION_BITS, tile, gap, int(values[2]))


def _in_tiles(place: npt.NDArray[np.int64], tile: int, gap: int, repeat: int) -> npt.NDArray[np.bool_]:
    """Dropped on one axis of the pattern plane, at these fixed-point places relative to the centre."""
    period = tile + gap
    extent = max(repeat, 1) * period - gap
    u = (place + (extent - 1) * HALF + HALF) >> FRACTION_BITS
    inside = u % period < tile
    return inside if repeat == 0 else inside & (u >= 0) & (u < extent)


def _window_sums(dropped: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.int64]:
    """Dropped cells of the window of every centre, by a summed-area table."""
    area = np.zeros((2 * height, 2 * width), dtype=np.int64)
    area[1:, 1:] = dropped.cumsum(0, dtype=np.int64).cumsum(1)
    sums = area[height:, width:] - area[:height, width:] - area[height:, :width] + area[:height, :width]
    # The window at the top left belongs to the centre at the bottom right.
    return np.ascontiguousarray(sums[::-1, ::-1])


def _fragments(kept: npt.NDArray[np.bool_], lanes: int) -> npt.NDArray[np.uint8]:
    """For every cell of the last axis the byte whose bit b < lanes says if the cell b further is kept (0 beyond)."""
    bits = np.zeros(kept.shape, dtype=np.uint8)
    for b in range(lanes):
        bits[..., : max(0, kept.shape[-1] - b)] |= kept[..., b:].astype(np.uint8) << b
    return bits
