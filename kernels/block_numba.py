"""Compiled loops of DropBlock on the CPU (compiled.py): one over the blocks drawn, one over the activation.

A plane, or in channels_last a sample, is multiplied and then zeros are written over its blocks while it is in the
cache. So the mask exists nowhere, and takes no second read of the activation. The blocks of a few planes are drawn at a
time, in loops over their counters that the compiler turns into vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from .compiled import array
from .compiled import factor_of
from .compiled import loop
from .compiled import parallel_loop
from .compiled import run
from .compiled import scale_rest_
from .philox_numba import below
from .philox_numba import key
from .philox_numba import u32
from .philox_numba import u64
from .philox_numba import words

if TYPE_CHECKING:
    from .block import Geometry

# Philox calls that are drawn at a time, if all planes have as many blocks as they can: 100 KB of numbers.
CALLS_AT_ONCE = 2048

ALL = u64(0xFFFFFFFFFFFFFFFF)


def count_dropped(shape: Sequence[int], blocks: Geometry, seed: int, share_c: bool, rank: int) -> int:
    """The dropped cells of a call with x of this shape."""
    n, c, height, width = shape
    planes = 1 if share_c else c
    total = np.zeros(1, np.int64)
    if len(blocks.thresholds):
        how = planes, *_arguments(blocks, seed, rank)
        size = n * planes * height * width // 8  # of the bits; where cores are busy a second thread may wait for 8 ms
        run(_count, _count_in_threads, n * planes, size, n * planes, height, width, *how, total)
    return int(total[0]) * (c if share_c else 1)


def apply(
    x: torch.Tensor, y: torch.Tensor, blocks: Geometry, seed: int, scale: float, share_c: bool, rank: int
) -> None:
    """Writes the masked product to y, which is contiguous or channels_last, and laid out as x."""
    n, c, height, width = x.shape
    how = 1 if share_c else c, *_arguments(blocks, seed, rank), factor_of(x, scale)
    size = x.numel() * x.element_size()
    if x.is_contiguous():
        planes = (array(t.view(n * c, height * width)) for t in (x, y))
        run(_planes, _planes_in_threads, n * c, size, *planes, c if share_c else 1, width, *how)
    else:
        by_row = (array(t.permute(0, 2, 3, 1).view(n * height, width * c)) for t in (x, y))
        run(_rows, _rows_in_threads, n * height, size, *by_row, height, width, *how)
    scale_rest_(y, scale)


def _arguments(blocks: Geometry, seed: int, rank: int) -> tuple[object, ...]:
    low, high = key(seed)
    return array(blocks.thresholds), blocks.block, blocks.positions, rank, low, high


@loop
def _lists(thresholds):
    """What `_draw` writes to: see there. Its `number` says how many planes it takes at a time."""
    most = max(1, (len(thresholds) + 1) // 2)
    planes = max(1, CALLS_AT_ONCE // most)
    calls = planes * most
    # Arrays of one axis: with the rows of a larger one the loops over counters are not turned into vectors.
    number, corners = np.empty(planes, np.int64), (np.empty(2 * calls, np.int32), np.empty(2 * calls, np.int32))
    of_planes = np.empty(planes, np.uint32), np.empty(planes, np.uint32), np.empty(planes, np.uint32)
    of_calls = np.empty(calls, np.uint32), np.empty(calls, np.uint32), np.empty(calls, np.uint32)
    return number, corners, of_planes, of_calls


@loop
def _draw(lists, first, planes, channels, thresholds, positions, rank, low, high):
    """The blocks of `planes` planes from `first` on, of `channels` a sample.

    Plane i has number[i] blocks. Their tops and lefts begin at an even place after those of the plane before: two
    blocks share a call of Philox, which for an odd number draws one too many.
    """
    number, (tops, lefts), (channel, sample, word), (c0, c1, c2) = lists
    if len(thresholds) == 0:
        number[:planes] = 0
        return
    n, c = first // channels, first % channels
    for i in range(planes):
        channel[i], sample[i] = c, n
        c += 1
        if c == channels:
            n, c = n + 1, 0
    for i in range(planes):
        word[i] = words(channel[i], u32(0), sample[i], rank, low, high)[0]
    calls = 0
    for i in range(planes):
        number[i] = 0
        if word[i] >= thresholds[0]:  # on small maps most planes have no block
            number[i] = np.searchsorted(thresholds, np.int64(word[i]), side="right")
            for call in range((number[i] + 1) // 2):
                c0[calls], c1[calls], c2[calls] = channel[i], 1 + call, sample[i]
                calls += 1
    for i in range(calls):
        w0, w1, w2, w3 = words(c0[i], c1[i], c2[i], rank, low, high)
        tops[2 * i], tops[2 * i + 1] = below(w0, positions[0]), below(w2, positions[0])
        lefts[2 * i], lefts[2 * i + 1] = below(w1, positions[1]), below(w3, positions[1])


@loop
def _planes(x, y, sharing, width, channels, thresholds, block, positions, rank, low, high, factor, begin, end):
    """Planes begin..end-1 of x (planes, cells), `sharing` of which have the same blocks."""
    zero = x.dtype.type(0)
    lists = _lists(thresholds)
    number, (tops, lefts) = lists[0], lists[1]
    last = (end - 1) // sharing
    for first in range(begin // sharing, last + 1, len(number)):
        drawn = min(len(number), last + 1 - first)
        _draw(lists, first, drawn, channels, thresholds, positions, rank, low, high)
        at = 0
        for i in range(drawn):
            for plane in range(max(begin, (first + i) * sharing), min(end, (first + i + 1) * sharing)):
                source, target = x[plane], y[plane]
                for cell in range(len(source)):
                    target[cell] = source[cell] * factor
                for b in range(at, at + number[i]):
                    corner = tops[b] * width + lefts[b]
                    for r in range(block[0]):
                        row = target[corner + r * width : corner + r * width + block[1]]
                        for cell in range(len(row)):
                            row[cell] = zero
            at += (number[i] + 1) // 2 * 2


@parallel_loop
def _planes_in_threads(x, y, sharing, width, channels, thresholds, block, positions, rank, low, high, factor, threads):
    planes = x.shape[0]
    for t in prange(threads):
        begin, end = planes * t // threads, planes * (t + 1) // threads
        _planes(x, y, sharing, width, channels, thresholds, block, positions, rank, low, high, factor, begin, end)


@loop
def _rows(x, y, height, width, channels, thresholds, block, positions, rank, low, high, factor, begin, end):
    """Rows begin..end-1 of x (samples * height, width * channels of x), with blocks for `channels` of a sample, or 1.

    The rows of a sample may be shared between two threads, which both draw its blocks.
    """
    zero = x.dtype.type(0)
    lists = _lists(thresholds)
    number, (tops, lefts) = lists[0], lists[1]
    cell = x.shape[1] // width  # elements: all channels
    shared = channels == 1
    for n in range(begin // height, (end - 1) // height + 1):
        first_row, end_row = max(begin, n * height), min(end, (n + 1) * height)
        for r in range(first_row, end_row):
            source, target = x[r], y[r]
            for i in range(len(source)):
                target[i] = source[i] * factor
        for c in range(0, channels, len(number)):
            drawn = min(len(number), channels - c)
            _draw(lists, n * channels + c, drawn, channels, thresholds, positions, rank, low, high)
            at = 0
            for i in range(drawn):
                for b in range(at, at + number[i]):
                    top = n * height + tops[b]
                    for r in range(max(first_row, top), min(end_row, top + block[0])):
                        target = y[r]
                        if shared:
                            target[lefts[b] * cell : (lefts[b] + block[1]) * cell] = zero
                        else:
                            for column in range(lefts[b], lefts[b] + block[1]):
                                target[column * cell + c + i] = zero
                at += (number[i] + 1) // 2 * 2


@parallel_loop
def _rows_in_threads(x, y, height, width, channels, thresholds, block, positions, rank, low, high, factor, threads):
    rows = x.shape[0]
    for t in prange(threads):
        begin, end = rows * t // threads, rows * (t + 1) // threads
        _rows(x, y, height, width, channels, thresholds, block, positions, rank, low, high, factor, begin, end)


@loop
def _count(planes, height, width, channels, thresholds, block, positions, rank, low, high, total, begin, end):
    """Adds the dropped cells of the planes begin..end-1 to total[0]. Blocks that may overlap are drawn as bits."""
    lists = _lists(thresholds)
    number, (tops, lefts) = lists[0], lists[1]
    bits = np.empty((height, (width + 63) // 64), np.uint64)
    dropped = np.int64(0)
    for first in range(begin, end, len(number)):
        drawn = min(len(number), end - first)
        _draw(lists, first, drawn, channels, thresholds, positions, rank, low, high)
        at = 0
        for i in range(drawn):
            if number[i] == 1:
                dropped += block[0] * block[1]
            elif number[i] > 1:
                bits[:] = 0
                for b in range(at, at + number[i]):
                    left, right = lefts[b], lefts[b] + block[1]
                    for k in range(left // 64, (right - 1) // 64 + 1):
                        ones = ALL >> u64(64 - min(right - 64 * k, 64)) & ALL << u64(max(left - 64 * k, 0))
                        for r in range(tops[b], tops[b] + block[0]):
                            bits[r, k] |= ones
                flat = bits.reshape(-1)
                for k in range(len(flat)):
                    dropped += _ones(flat[k])
            at += (number[i] + 1) // 2 * 2
    total[0] += dropped


@loop
def _ones(word):
    """The number of bits that are 1, by sums of neighbours: of 2, of 4, of 8, then of the 8 bytes."""
    word -= word >> u64(1) & u64(0x5555555555555555)
    word = (word & u64(0x3333333333333333)) + (word >> u64(2) & u64(0x3333333333333333))
    word = word + (word >> u64(4)) & u64(0x0F0F0F0F0F0F0F0F)
    return np.int64(word * u64(0x0101010101010101) >> u64(56))


@parallel_loop
def _count_in_threads(planes, height, width, channels, thresholds, block, positions, rank, low, high, total, threads):
    totals = np.zeros((threads, 8), np.int64)  # a line of the cache for each thread
    for t in prange(threads):
        begin, end = planes * t // threads, planes * (t + 1) // threads
        _count(planes, height, width, channels, thresholds, block, positions, rank, low, high, totals[t], begin, end)
    total[0] = totals[:, 0].sum()
