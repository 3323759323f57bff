"""Compiled loops of tiled pattern dropout on the CPU (compiled.py): one over the placements, one over the activation.

Contiguous maps read their mask as a byte a cell: a plane is one run of the flat table (`Atlas.kept_flat`), or, on maps
too large for it, a run of the atlas for each row. In channels_last every channel reads another place of the table, so
there a byte holds 8 cells (`DeviceTables.fragments`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import prange

from .atlas import Atlas
from .compiled import array
from .compiled import factor_of
from .compiled import loop
from .compiled import parallel_loop
from .compiled import run
from .compiled import scale_rest_
from .masking import compute_type
from .philox_numba import below
from .philox_numba import key
from .philox_numba import u32
from .philox_numba import words
from .placements import fixed_scale

# x (planes, runs, cells); cells of mask, 1 = kept, in which run r of plane p begins at first[p] * step + r * pitch.
Windows = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], int, int]

# x (samples, rows, cells, channels); bytes of mask, a bit for each of 8 cells, 1 = kept, of which fragment f of row r
# in channel c of sample n has first[n, c] * step + r * pitch + f * apart.
Fragments = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], int, int, int]


# ---- draw ----------------------------------------------------------------------------------------------------------


def draw(
    atlas: Atlas, samples: int, planes: int, normalize: str, seed: int, rank: int
) -> tuple[npt.NDArray[Any], float]:
    """The starts, int32 (samples, planes), and the scale.

    On one thread: 81,920 planes take 0.16 ms, and where other programs use the cores, starting a second one may take 8.
    """
    starts = np.empty((samples, planes), np.int32)
    return starts, _draw(starts, *_drawing(atlas, normalize, seed, rank))


def _drawing(atlas: Atlas, normalize: str, seed: int, rank: int) -> tuple[Any, ...]:
    """What `_draw` takes besides the starts."""
    fixed = -1.0 if normalize == "mask" else fixed_scale(atlas, normalize)
    return atlas.on_cpu.counts, atlas.height, atlas.width, rank, *key(seed), fixed


@loop
def _draw(starts, counts, height, width, rank, low, high, fixed):
    """Writes the starts. Returns the scale: `fixed`, or if that is negative the one of the mask."""
    dropped = np.int64(0)
    for n in range(starts.shape[0]):
        row = starts[n]
        for c in range(row.shape[0]):
            w0, w1, _, _ = words(u32(c), u32(0), u32(n), rank, low, high)
            row[c] = below(w1, width) * (2 * height - 1) + height - 1 - below(w0, height)
        for c in range(row.shape[0]):
            dropped += counts[u32(row[c])]  # unsigned: not asked whether it counts from the end
    if fixed >= 0.0:
        return fixed
    size = starts.size * height * width
    return size / (size - dropped) if dropped < size else 0.0


# ---- apply ---------------------------------------------------------------------------------------------------------


def apply(x: torch.Tensor, y: torch.Tensor, atlas: Atlas, starts: npt.NDArray[Any], scale: float) -> None:
    """Writes the masked product to y, which is dense and laid out as x."""
    factor = factor_of(x, scale)
    size = x.numel() * x.element_size()
    if x.is_contiguous():
        planes, *masks = windows(x, atlas, starts)
        run(_planes, _planes_in_threads, len(planes), size, planes, array(y).reshape(planes.shape), *masks, factor)
    else:
        pixels, *masks = fragments(x, atlas, starts)
        others = array(y.permute(0, 2, 3, 1)).reshape(pixels.shape)
        run(_fragments, _fragments_in_threads, number_of_fragments(pixels), size, pixels, others, *masks, factor)
    scale_rest_(y, scale)


def windows(x: torch.Tensor, atlas: Atlas, starts: npt.NDArray[Any]) -> Windows:
    """A contiguous x as planes, and where they find their masks."""
    table = atlas.on_cpu
    planes = array(x).reshape(-1, table.rows, table.row_cells)
    return planes, table.kept, _first_cells(atlas, starts).reshape(-1), table.step, table.pitch


def fragments(x: torch.Tensor, atlas: Atlas, starts: npt.NDArray[Any]) -> Fragments:
    """An x in channels_last as rows of pixels, and where their fragments of 8 find their masks."""
    tables = atlas.on(x.device)
    pixels = array(x.permute(0, 2, 3, 1)).reshape(x.shape[0], tables.rows, tables.row_cells, x.shape[1])
    first, step = _first_cells(atlas, starts), tables.start_step if tables.flat else 1
    return pixels, array(tables.fragments), first, step, tables.pitch, tables.step


@loop
def number_of_fragments(x):
    """Of x (samples, rows, cells, channels)."""
    return x.shape[0] * x.shape[1] * ((x.shape[2] + 7) // 8)


def _first_cells(atlas: Atlas, starts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Starts, or without a flat table the first cell of their window in the atlas."""
    if atlas.kept_flat is not None:
        return starts
    height, width = atlas.height, atlas.width
    top, column = starts % (2 * height - 1), starts // (2 * height - 1)
    return top.astype(np.int64) * (2 * width - 1) + width - 1 - column


@loop
def _planes(x, y, kept, first, step, pitch, factor, begin, end):
    """Planes begin..end-1 of x (planes, runs, cells); run r of a plane reads its mask r * pitch cells further on."""
    sharing = x.shape[0] // first.shape[0]
    cells = x.shape[2]
    zero = x.dtype.type(0)
    for plane in range(begin, end):
        start = np.int64(first[plane // sharing]) * step
        for r in range(x.shape[1]):
            source, target = x[plane, r], y[plane, r]
            mask = kept[start + r * pitch : start + r * pitch + cells]
            for i in range(cells):
                product = source[i] * factor
                target[i] = product if mask[i] else zero


@parallel_loop
def _planes_in_threads(x, y, kept, first, step, pitch, factor, threads):
    planes = x.shape[0]
    for t in prange(threads):
        _planes(x, y, kept, first, step, pitch, factor, planes * t // threads, planes * (t + 1) // threads)


@loop
def _fragments(x, y, bytes_of, first, step, pitch, apart, factor, begin, end):
    """Fragments begin..end-1 of x (samples, rows, cells, channels): runs of 8 cells in a row, with all channels.

    A byte of `bytes_of` holds the mask of a fragment in one channel. So the scattered reads are an eighth of the cells,
    and the loop over channels, which follow each other in memory, reads its bytes in order.
    """
    rows, cells, channels = x.shape[1:]
    in_row = (cells + 7) // 8
    zero = x.dtype.type(0)
    word = np.empty(channels, np.uint8)
    for fragment in range(begin, end):
        sample, r, at = fragment // (rows * in_row), fragment // in_row % rows, fragment % in_row
        gather(word, bytes_of, first[sample], step, r * pitch + at * apart)
        for b in range(min(8, cells - 8 * at)):
            source, target = x[sample, r, 8 * at + b], y[sample, r, 8 * at + b]
            bit = np.uint8(1 << b)
            for c in range(channels):
                product = source[c] * factor
                target[c] = product if word[c] & bit else zero


@loop
def gather(word, bytes_of, first, step, place):
    """Writes the byte of a fragment in every channel; first is of their sample, for all channels or one."""
    sharing = len(word) // len(first)
    for c in range(len(word)):
        word[c] = bytes_of[np.int64(first[c // sharing]) * step + place]


@parallel_loop
def _fragments_in_threads(x, y, bytes_of, first, step, pitch, apart, factor, threads):
    fragments = number_of_fragments(x)
    for t in prange(threads):
        begin, end = fragments * t // threads, fragments * (t + 1) // threads
        _fragments(x, y, bytes_of, first, step, pitch, apart, factor, begin, end)


# ---- draw and apply ------------------------------------------------------------------------------------------------


def drop(
    x: torch.Tensor, atlas: Atlas, planes: int, normalize: str, seed: int, rank: int
) -> tuple[torch.Tensor, npt.NDArray[Any], float]:
    """The masked product of an x that is dense and not empty, starts (samples, planes) and scale.

    In one call where the starts are what the loop reads. A second one takes 0.04 ms once other work has emptied the
    cache, a thirtieth of an activation of 21 MB.
    """
    y = torch.empty_like(x)
    if not x.is_contiguous() or atlas.kept_flat is None:
        starts, scale = draw(atlas, len(x), planes, normalize, seed, rank)
        apply(x, y, atlas, starts, scale)
        return y, starts, scale
    starts = np.empty((len(x), planes), np.int32)
    source, *masks = windows(x, atlas, starts)
    target, carries_scale = array(y).reshape(source.shape), x.dtype == compute_type(x)
    arguments = source, target, *masks, carries_scale, starts, *_drawing(atlas, normalize, seed, rank)
    scale = run(_drop, _drop_in_threads, len(source), x.numel() * x.element_size(), *arguments)
    scale_rest_(y, scale)
    return y, starts, scale


@loop
def _drop(
    x, y, kept, first, step, pitch, carries_scale, starts, counts, height, width, rank, low, high, fixed, begin, end
):
    scale = _draw(starts, counts, height, width, rank, low, high, fixed)
    _planes(x, y, kept, first, step, pitch, x.dtype.type(scale if carries_scale else 1.0), begin, end)
    return scale


@loop
def _drop_in_threads(
    x, y, kept, first, step, pitch, carries_scale, starts, counts, height, width, rank, low, high, fixed, threads
):
    scale = _draw(starts, counts, height, width, rank, low, high, fixed)
    _planes_in_threads(x, y, kept, first, step, pitch, x.dtype.type(scale if carries_scale else 1.0), threads)
    return scale
