"""Compiled loops of Bernoulli dropout on the CPU (compiled.py): decisions of a run at a time, then their product.

The decisions of a run go to a small buffer, a byte each, in the order of their numbers; a second loop multiplies. Both
become vector instructions, which a loop that does both does not. In channels_last, where neighbours in memory are not
neighbours in number, a call of Philox for each channel gives its next four places.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from .bernoulli_form import Form
from .compiled import array
from .compiled import factor_of
from .compiled import loop
from .compiled import parallel_loop
from .compiled import run
from .compiled import scale_rest_
from .philox_numba import key
from .philox_numba import u32
from .philox_numba import u64
from .philox_numba import words

# Calls of Philox that are computed at a time: of fewer, each alone takes as long as all. More are drawn than are used.
VECTOR = 8

# Decisions of a run, and cells that share them: few enough for the first-level cache.
RUN = 1 << 12
CELLS = 1 << 14

# From so many cells to a decision on, each is looked up once, and what is dropped is not read.
WIDE = 64

# Places of a run in channels_last: their decisions are bits of a uint32, with up to three that come before them.
PLACES = 28

# Bytes whose product takes as long as the count of one decision, about.
COUNTED = 4


def dropped_of(samples: int, decisions: int, threshold: int, seed: int, rank: int) -> int:
    """How many of the decisions, so many in each sample, drop."""
    length = min(RUN, decisions)
    runs, size = samples * -(-decisions // length), samples * decisions * COUNTED
    kept = np.zeros(torch.get_num_threads(), np.int64)
    drawn_by = u64(threshold), rank, *key(seed)
    run(_count, _count_in_threads, runs, size, kept, runs, decisions, length, *drawn_by)
    return samples * decisions - int(kept.sum())


def draw(samples: slice, first: int, count: int, threshold: int, seed: int, rank: int) -> torch.Tensor:
    """Decisions first..first+count-1 of some samples: bool (samples, count), True = kept."""
    kept = np.empty((samples.stop - samples.start, _room(first % 4 + count)), np.uint8)
    for sample, row in enumerate(kept, samples.start):
        _draw(row, first // 4, first % 4 + count, u32(sample), u64(threshold), rank, *key(seed))
    return torch.from_numpy(kept)[:, first % 4 :][:, :count].view(torch.bool)


def apply(x: torch.Tensor, y: torch.Tensor, form: Form, threshold: int, seed: int, scale: float, rank: int) -> None:
    """Writes the masked product to y, which is dense and laid out as x."""
    factor, size = factor_of(x, scale), x.numel() * x.element_size()
    source, target = (array(t.as_strided((t.numel(),), (1,))) for t in (x, y))
    drawn_by = u64(threshold), rank, *key(seed)
    sides: tuple[int, ...]
    if form.places:
        sides = form.samples, form.places, form.decisions // form.places
        runs = form.samples * -(-form.places // PLACES)
        run(_places, _places_in_threads, runs, size, source.reshape(sides), target.reshape(sides), factor, *drawn_by)
    else:
        sides = form.samples, form.outer, form.decisions, form.inner
        length = min(form.decisions, max(4, CELLS // form.inner // 4 * 4), RUN)
        runs = form.samples * -(-form.decisions // length) * form.outer
        cells = source.reshape(sides), target.reshape(sides)
        run(_runs, _runs_in_threads, runs, size, *cells, length, factor, *drawn_by)
    scale_rest_(y, scale)


@loop
def _room(count):
    """Bytes that `_draw` writes for so many decisions."""
    return (count + 4 * VECTOR - 1) // (4 * VECTOR) * (4 * VECTOR)


@loop
def _draw(kept, call, count, sample, threshold, rank, low, high):
    """Writes whether decisions 4 * call..4 * call + count - 1 of a sample are kept, and some more."""
    for i in range(_room(count) // 4):
        w0, w1, w2, w3 = words(u32(call + i), u32((call + i) >> 32), sample, rank, low, high)
        kept[4 * i] = w0 >= threshold
        kept[4 * i + 1] = w1 >= threshold
        kept[4 * i + 2] = w2 >= threshold
        kept[4 * i + 3] = w3 >= threshold


@loop
def _count(counts, runs, decisions, length, threshold, rank, low, high, begin, end):
    """Writes to counts[0] how many decisions of the runs begin..end-1 are kept."""
    in_sample = (decisions + length - 1) // length
    kept = np.empty(_room(length), np.uint8)
    total = np.int64(0)
    for part in range(begin, end):
        first = part % in_sample * length
        count = min(length, decisions - first)
        _draw(kept, first // 4, count, u32(part // in_sample), threshold, rank, low, high)
        for i in range(count):
            total += kept[i]
    counts[0] = total


@parallel_loop
def _count_in_threads(counts, runs, decisions, length, threshold, rank, low, high, threads):
    for t in prange(threads):
        begin, end = runs * t // threads, runs * (t + 1) // threads
        _count(counts[t:], runs, decisions, length, threshold, rank, low, high, begin, end)


@loop
def _runs(x, y, length, factor, threshold, rank, low, high, begin, end):
    """Runs begin..end-1 of x (samples, outer, decisions, inner): `length` decisions of a sample, at one of `outer`.

    Runs are counted in the order (sample, decisions, outer): those of the same decisions follow each other.
    """
    outer, decisions, inner = x.shape[1:]
    runs = (decisions + length - 1) // length
    zero = x.dtype.type(0)
    kept = np.empty(_room(length), np.uint8)
    kept_cells = kept if inner == 1 else np.empty(length * min(inner, WIDE), np.uint8)
    drawn = np.int64(-1)
    for part in range(begin, end):
        decided, at = part // outer, part % outer
        sample, first = decided // runs, decided % runs * length
        count = min(length, decisions - first)
        if decided != drawn:
            _draw(kept, first // 4, count, u32(sample), threshold, rank, low, high)
            drawn = decided
            if 1 < inner < WIDE:
                for d in range(count):
                    for i in range(inner):
                        kept_cells[d * inner + i] = kept[d]
        sources, targets = x[sample, at, first : first + count], y[sample, at, first : first + count]
        if inner < WIDE:
            source, target = sources.reshape(count * inner), targets.reshape(count * inner)
            for i in range(count * inner):
                product = source[i] * factor
                target[i] = product if kept_cells[i] else zero
        else:
            for d in range(count):
                source, target = sources[d], targets[d]
                if kept[d]:
                    for i in range(inner):
                        target[i] = source[i] * factor
                else:
                    for i in range(inner):
                        target[i] = zero


@parallel_loop
def _runs_in_threads(x, y, length, factor, threshold, rank, low, high, threads):
    runs = x.shape[0] * x.shape[1] * ((x.shape[2] + length - 1) // length)
    for t in prange(threads):
        _runs(x, y, length, factor, threshold, rank, low, high, runs * t // threads, runs * (t + 1) // threads)


@loop
def _places(x, y, factor, threshold, rank, low, high, begin, end):
    """Runs begin..end-1 of x (samples, places, channels), whose decision number is channel * places + place."""
    places, channels = x.shape[1:]
    in_sample = (places + PLACES - 1) // PLACES
    zero = x.dtype.type(0)
    room = (channels + VECTOR - 1) // VECTOR * VECTOR
    bits = np.empty(room, np.uint32)
    for part in range(begin, end):
        sample, first = part // in_sample, part % in_sample * PLACES
        count = min(PLACES, places - first)
        # Places begin at decision channel * places + first, which may lie amid a call.
        calls = (count + 3) // 4 + (1 if places % 4 else 0)
        for c in range(room):
            bits[c] = 0
        for k in range(calls):
            shift = u32(4 * k)
            for c in range(room):
                call = (c * places + first) // 4 + k
                w0, w1, w2, w3 = words(u32(call), u32(call >> 32), u32(sample), rank, low, high)
                four = (
                    u32(w0 >= threshold)
                    | u32(w1 >= threshold) << u32(1)
                    | u32(w2 >= threshold) << u32(2)
                    | u32(w3 >= threshold) << u32(3)
                )
                bits[c] |= four << shift
        for c in range(room):
            bits[c] >>= u32((c * places + first) % 4)
        for place in range(count):
            source, target = x[sample, first + place], y[sample, first + place]
            bit = u32(1 << place)
            for c in range(channels):
                product = source[c] * factor
                target[c] = product if bits[c] & bit else zero


@parallel_loop
def _places_in_threads(x, y, factor, threshold, rank, low, high, threads):
    runs = x.shape[0] * ((x.shape[1] + PLACES - 1) // PLACES)
    for t in prange(threads):
        _places(x, y, factor, threshold, rank, low, high, runs * t // threads, runs * (t + 1) // threads)
