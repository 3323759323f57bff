"""Compiled loops of token patterns on the CPU (compiled.py): they decide for a row of memory, then multiply it.

A row holds the channels of a token, or, in attention weights, the tokens (keys) of a channel. There the rows of four
channels are taken together, since these share their calls of Philox. Decisions are bytes of a row, 1 = kept, which stay
in the cache; where all channels of a token share one, they are a byte for each token of the call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
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
from .philox_numba import words

# Channels, or tokens, of a row that are decided at a time.
PIECE = 1 << 14


# What decides, as the loops take it: phases of the samples, int32; tokens, size (0: nothing is covered) and period; the
# largest word that drops; share_t; rank and key. A plain tuple, since Numba keeps compiled code by the types it is for.
Pattern = tuple[npt.NDArray[np.int32], int, int, int, np.uint32, bool, int, int, int]


def pattern(
    samples: int, tokens: int, size: int, period: int, threshold: int, share_t: bool, seed: int, rank: int
) -> Pattern:
    phases = np.zeros(samples, np.int32)
    low, high = key(seed)
    if size < tokens:
        _phases(phases, period, rank, low, high)
    last = u32(max(0, threshold - 1))
    return phases, tokens, size if threshold else 0, period, last, share_t, rank, low, high


@loop
def _phases(phases, period, rank, low, high):
    for n in range(len(phases)):
        phases[n] = below(words(u32(0), u32(0), u32(n), rank, low, high)[0], period)


def count_dropped(how: Pattern, channels: int, share_c: bool) -> int:
    """The dropped elements of a call."""
    cells = len(how[0]) * how[1]
    if share_c:
        return channels * (cells - int(_kept_tokens(how).sum()))
    total = np.zeros(1, np.int64)
    # As if a decision were a bit: where cores are busy, a second thread may wait for longer than few of them take.
    run(_count, _count_in_threads, cells, cells * channels // 8, channels, how, total)
    return int(total[0])


def order(by_token: torch.Tensor) -> tuple[int, ...] | None:
    """How (n, t, a, b), as token.by_token gives it, lies in memory without gaps, if the loops take it so."""
    orders = (0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 2, 3, 1)
    return next((order for order in orders if by_token.permute(order).is_contiguous()), None)


def apply(x: torch.Tensor, y: torch.Tensor, order: tuple[int, ...], how: Pattern, scale: float, share_c: bool) -> None:
    """Writes the masked product to y. Both are views (n, t, a, b), channel a * B + b, that lie in memory in `order`."""
    factor = factor_of(x, scale)
    n, t, a, b = x.shape
    size = x.numel() * x.element_size()
    by_key = order == (0, 2, 3, 1)
    shape = (n, a * b, t) if by_key else (n * a * t, b) if order == (0, 2, 1, 3) else (n * t, a * b)
    both = [array(v.permute(order).reshape(shape)) for v in (x, y)]
    if by_key and share_c:
        run(_columns, _columns_in_threads, n * a * b, size, *both, _kept_tokens(how), factor)
    elif by_key:
        run(_keys, _keys_in_threads, n * ((a * b + 3) // 4), size, *both, how, factor)
    else:
        kept = _kept_tokens(how) if share_c else np.empty((0, 0), np.uint8)
        run(_rows, _rows_in_threads, len(both[0]), size, *both, order == (1, 0, 2, 3), how, kept, factor)
    scale_rest_(y, scale)


# ---- rows of channels ------------------------------------------------------------------------------------------------


@loop
def _rows(x, y, tokens_first, how, kept_tokens, factor, begin, end):
    """Rows begin..end-1 of x (samples * heads * tokens, or tokens * samples; channels of a head)."""
    phases, tokens, size, period, _, share_t, _, _, _ = how
    samples, width = len(phases), x.shape[1]
    heads = x.shape[0] // (samples * tokens)
    zero = x.dtype.type(0)
    kept = np.empty(min(width, PIECE) + 6, np.uint8)  # up to 3 words more on each side
    drawn = (-1, -1, -1)
    for r in range(begin, end):
        if tokens_first:
            n, head, t = r % samples, 0, r // samples
        else:
            n, head, t = r // tokens // heads, r // tokens % heads, r % tokens
        source, target = x[r], y[r]
        if len(kept_tokens):
            covered, dropped = False, kept_tokens[n, t] == 0
        else:
            place = t + np.int64(phases[n])
            span = place // period
            covered, dropped = place - span * period < size, False
        if dropped:
            target[:] = zero
            continue
        if not covered:
            for c in range(width):
                target[c] = source[c] * factor
            continue
        cell = span if share_t else t
        for c in range(0, width, PIECE):
            first, number = head * width + c, min(PIECE, width - c)
            if drawn != (n, cell, first):
                _decide(kept, first // 4, (first + number + 3) // 4, cell, n, how)
                drawn = (n, cell, first)
            part, to, mask = source[c : c + number], target[c : c + number], kept[first % 4 : first % 4 + number]
            for i in range(number):
                product = part[i] * factor
                to[i] = product if mask[i] else zero


@parallel_loop
def _rows_in_threads(x, y, tokens_first, how, kept_tokens, factor, threads):
    rows = x.shape[0]
    for t in prange(threads):
        _rows(x, y, tokens_first, how, kept_tokens, factor, rows * t // threads, rows * (t + 1) // threads)


@loop
def _decide(kept, first, end, cell, n, how):
    """The decisions of the calls first..end-1, which are for four channels each."""
    _, _, _, _, last, _, rank, low, high = how
    c1, c2 = u32(1 + cell), u32(n)
    for i in range(end - first):
        w0, w1, w2, w3 = words(u32(first + i), c1, c2, rank, low, high)
        kept[4 * i], kept[4 * i + 1], kept[4 * i + 2], kept[4 * i + 3] = w0 > last, w1 > last, w2 > last, w3 > last


@loop
def _count(channels, how, total, begin, end):
    """Adds the dropped elements of the tokens begin..end-1 of all samples to total[0]."""
    phases, tokens, size, period, last, share_t, rank, low, high = how
    dropped, of_cell = np.int64(0), np.int64(0)
    drawn = (-1, -1)
    for p in range(begin, end):
        n, t = p // tokens, p % tokens
        place = t + np.int64(phases[n])
        span = place // period
        if place - span * period >= size:
            continue
        cell = span if share_t else t
        if drawn != (n, cell):
            drawn = (n, cell)
            c1, c2 = u32(1 + cell), u32(n)
            number = u32(0)
            for call in range(channels // 4):
                w0, w1, w2, w3 = words(u32(call), c1, c2, rank, low, high)
                number += u32(w0 <= last) + u32(w1 <= last) + u32(w2 <= last) + u32(w3 <= last)
            rest = channels % 4
            w0, w1, w2, _ = words(u32(channels // 4), c1, c2, rank, low, high)
            number += u32(rest > 0 and w0 <= last) + u32(rest > 1 and w1 <= last) + u32(rest > 2 and w2 <= last)
            of_cell = np.int64(number)
        dropped += of_cell
    total[0] += dropped


@parallel_loop
def _count_in_threads(channels, how, total, threads):
    cells = len(how[0]) * how[1]
    totals = np.zeros((threads, 8), np.int64)  # a line of the cache for each thread
    for t in prange(threads):
        _count(channels, how, totals[t], cells * t // threads, cells * (t + 1) // threads)
    total[0] = totals[:, 0].sum()


# ---- rows of tokens --------------------------------------------------------------------------------------------------


@loop
def _covered(n, first, end, how, at, which, cells):
    """Lists the covered ones of the tokens first..end-1 of a sample, from `first` on, and the cells that decide.

    Token at[i] has the cell cells[which[i]]. Returns how many there are of both.
    """
    phases, _, size, period, _, share_t, _, _, _ = how
    number, different = 0, 0
    place = first + np.int64(phases[n])
    span = place // period
    start = first - (place - span * period)  # of the span, perhaps before `first`
    while start < end:
        for t in range(max(first, start), min(end, start + size)):
            if not share_t or t == start or number == 0:
                cells[different] = u32(span if share_t else t)
                different += 1
            at[number], which[number] = t - first, different - 1
            number += 1
        start += period
        span += 1
    return number, different


@loop
def _keys(x, y, how, factor, begin, end):
    """Groups begin..end-1 of four channels, the last of a sample perhaps of fewer, of x (samples, channels, tokens)."""
    channels, tokens = x.shape[1:]
    groups = (channels + 3) // 4
    zero = x.dtype.type(0)
    _, _, _, _, last, _, rank, low, high = how
    most = min(tokens, PIECE)
    at, which, cells = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.uint32)
    drawn = np.empty(most, np.uint8), np.empty(most, np.uint8), np.empty(most, np.uint8), np.empty(most, np.uint8)
    kept = np.empty(most, np.uint8)
    number, different = 0, 0
    listed = (-1, -1)
    for group in range(begin, end):
        n, call = group // groups, group % groups
        for first in range(0, tokens, PIECE):
            length = min(PIECE, tokens - first)
            if listed != (n, first):
                listed = (n, first)
                number, different = _covered(n, first, first + length, how, at, which, cells)
                kept[:] = 1
            d0, d1, d2, d3 = drawn
            for i in range(different):
                w0, w1, w2, w3 = words(u32(call), u32(1) + cells[i], u32(n), rank, low, high)
                d0[i], d1[i], d2[i], d3[i] = w0 > last, w1 > last, w2 > last, w3 > last
            for j in range(min(4, channels - 4 * call)):
                decisions = drawn[j]
                for i in range(number):
                    kept[at[i]] = decisions[which[i]]
                source = x[n, 4 * call + j, first : first + length]
                target = y[n, 4 * call + j, first : first + length]
                for i in range(length):
                    product = source[i] * factor
                    target[i] = product if kept[i] else zero


@parallel_loop
def _keys_in_threads(x, y, how, factor, threads):
    groups = x.shape[0] * ((x.shape[1] + 3) // 4)
    for t in prange(threads):
        _keys(x, y, how, factor, groups * t // threads, groups * (t + 1) // threads)


# ---- one decision for all channels -----------------------------------------------------------------------------------


def _kept_tokens(how: Pattern) -> npt.NDArray[Any]:
    """A byte for each token of each sample, 1 = kept."""
    kept = np.ones((len(how[0]), how[1]), np.uint8)
    _decide_tokens(kept, how)
    return kept


@loop
def _decide_tokens(kept, how):
    _, _, _, _, last, _, rank, low, high = how
    samples, tokens = kept.shape
    most = min(tokens, PIECE)
    at, which, cells = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.uint32)
    decisions = np.empty(most, np.uint8)
    for n in range(samples):
        for first in range(0, tokens, PIECE):
            part = kept[n, first : first + PIECE]
            number, different = _covered(n, first, first + len(part), how, at, which, cells)
            for i in range(different):
                decisions[i] = words(u32(0), u32(1) + cells[i], u32(n), rank, low, high)[0] > last
            for i in range(number):
                part[at[i]] = decisions[which[i]]


@loop
def _columns(x, y, kept, factor, begin, end):
    """Rows begin..end-1 of x (samples, channels, tokens)."""
    channels, tokens = x.shape[1:]
    zero = x.dtype.type(0)
    for r in range(begin, end):
        n, c = r // channels, r % channels
        source, target, mask = x[n, c], y[n, c], kept[n]
        for t in range(tokens):
            product = source[t] * factor
            target[t] = product if mask[t] else zero


@parallel_loop
def _columns_in_threads(x, y, kept, factor, threads):
    rows = x.shape[0] * x.shape[1]
    for t in prange(threads):
        _columns(x, y, kept, factor, rows * t // threads, rows * (t + 1) // threads)
