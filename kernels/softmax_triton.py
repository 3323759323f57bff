"""Triton kernels of softmax and token pattern: one pass forward, one backward, over rows that fit into registers.

A tile is [4, calls, keys] of one sample: a Philox call decides for the same key of 4 rows that follow each other. A row
is cut into a few equal parts, so that a power of two of keys fits it better (300 keys are 5 times 64, 768 are 3 times
256); what a reduction needs of them is joined lane by lane before it crosses lanes, which it does once. The small
kernels of token_draw_triton.py over tokens and spans run first.

Each decision is drawn once, packed with those of its call and of all parts into a word a key, and handed to the
threads that have the rows. So a thread has as many rows as registers allow, whatever a call decides for.

Bytes per element of size s: forward 2 s, backward 3 s; 8 bytes a row and 4 bytes a key and sample.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch_triton import as_int32
from .launch_triton import grain_of
from .masking import compute_type
from .philox_triton import philox
from .token import sides_of
from .token_draw_triton import cells_of

# Elements of a thread at most, unless a row is longer than 16 warps of them: of each, forward keeps one number in
# registers, backward two. Parts of a row: their decisions, 4 bits each, are one word. Warps of a program, unless a call
# needs more.
FORWARD = 48
BACKWARD = 32
PARTS = 5
WARPS = 4


@triton.jit
def _decisions(
    sample, call, part, keys, cells_ptr, bits_ptr, seed_ptr, spans, groups, channels, last, rank,
    SHARE_T: tl.constexpr, SHARE_C: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of part number `part` of the keys, bit j for row j of a call: 1 where dropped, int32 [CALLS or 1, KEYS]."""
    key = part * KEYS + tl.arange(0, KEYS)
    cell = tl.load(cells_ptr + sample.to(tl.int64) * keys + key, mask=key < keys, other=-1)
    if SHARE_C:
        bits = tl.where(cell >= 0, 15, 0)[None, :]
    elif SHARE_T:
        bits_row = (sample.to(tl.int64) * spans + tl.maximum(cell, 0)) * groups
        bits = tl.load(
            bits_ptr + bits_row[None, :] + (call // 2)[:, None],
            mask=(cell >= 0)[None, :] & (call * 4 < channels)[:, None],
            other=0,
        )
        bits = (bits.to(tl.int32) >> (call % 2 * 4)[:, None]) & 15
    else:
        largest = (sample * 0 + last).to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = philox(tl.load(seed_ptr), call[:, None], (1 + cell)[None, :], sample, sample * 0 + rank)
        bits = (w0 <= largest).to(tl.int32) | tl.where(w1 <= largest, 2, 0)
        bits = bits | tl.where(w2 <= largest, 4, 0) | tl.where(w3 <= largest, 8, 0)
        bits = tl.where((cell >= 0)[None, :], bits, 0)
    return bits


@triton.jit
def _dropped(decisions, part):
    """bool [4, CALLS or 1, KEYS], from the decisions of all parts in one word."""
    return (decisions[None, :, :] & (1 << (4 * part + tl.arange(0, 4)))[:, None, None]) != 0


@triton.jit
def _exp(x):
    """exp. That of Triton spends three more instructions on results below 1e-38 in float32, which here become 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit(do_not_specialize=["seed_ptr", "spans", "last", "rank"])
def softmax_forward_kernel(
    scores_ptr,  # (N, C, K), contiguous
    y_ptr,  # the same, written
    rows_ptr,  # (2, N, C) in the compute type, written: largest score, 1 / sum of exp(score - largest)
    cells_ptr,  # int32 (N, K), as of cells_kernel
    bits_ptr,  # uint8 (N, spans, groups), as of spans_kernel, read if SHARE_T and not SHARE_C
    seed_ptr,  # int64
    scale_ptr,  # float64
    all_rows,  # N * C
    key_units,  # K: there are key_units * GRAIN keys
    channels,  # C
    call_blocks,
    spans,
    groups,
    last,
    rank,
    GRAIN: tl.constexpr,
    SHARE_T: tl.constexpr,
    SHARE_C: tl.constexpr,
    CALLS: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,  # of a part
):
    keys = key_units * GRAIN
    compute = rows_ptr.dtype.element_ty
    sample = tl.program_id(0) // call_blocks
    first_call = (tl.program_id(0) % call_blocks) * CALLS
    call = first_call + tl.arange(0, CALLS)
    row = tl.arange(0, CALLS)[None, :] * 4 + tl.arange(0, 4)[:, None]
    inside_rows = first_call * 4 + row < channels
    first_row = sample.to(tl.int64) * channels + first_call * 4
    first = first_row * keys
    key = tl.arange(0, KEYS)
    offset = (row * keys)[:, :, None] + key[None, None, :]

    decisions = 0
    for part in tl.static_range(PARTS):
        bits = _decisions(
            sample, call, part, keys, cells_ptr, bits_ptr, seed_ptr, spans, groups, channels, last, rank, SHARE_T,
            SHARE_C, KEYS,
        )  # fmt: skip
        decisions = bits if part == 0 else decisions | (bits << 4 * part)

    scores = ()  # type: tuple[tl.tensor, ...]
    for part in tl.static_range(PARTS):
        inside = inside_rows[:, :, None]
        if part == PARTS - 1:
            inside = inside & (part * KEYS + key < keys)[None, None, :]
        x = tl.load((scores_ptr + first) + (offset + part * KEYS), mask=inside, other=-float("inf")).to(compute)
        scores += (x,)
    largest = scores[0]
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, scores[part])
    largest = tl.max(largest, axis=2)
    weights = ()  # type: tuple[tl.tensor, ...]
    for part in tl.static_range(PARTS):
        weights += (_exp(scores[part] - largest[:, :, None]),)
    total = weights[0]
    for part in tl.static_range(1, PARTS):
        total += weights[part]
    inverse = 1.0 / tl.sum(total, axis=2)
    factor = (inverse * tl.load(scale_ptr).to(compute))[:, :, None]
    for part in tl.static_range(PARTS):
        inside = inside_rows[:, :, None]
        if part == PARTS - 1:
            inside = inside & (part * KEYS + key < keys)[None, None, :]
        # The zero is chosen before the product, as in token_triton.py.
        y = (tl.where(_dropped(decisions, part), 0.0, weights[part]) * factor).to(y_ptr.dtype.element_ty)
        tl.store((y_ptr + first) + (offset + part * KEYS), y, mask=inside)
    tl.store((rows_ptr + first_row) + row, largest, mask=inside_rows)
    tl.store((rows_ptr + (tl.cast(all_rows, tl.int64) + first_row)) + row, inverse, mask=inside_rows)


@triton.jit(do_not_specialize=["seed_ptr", "spans", "last", "rank"])
def softmax_backward_kernel(
    grad_ptr,  # (N, C, K), contiguous
    scores_ptr,  # likewise
    dscores_ptr,  # likewise, written
    largest_ptr,  # (N, C) in the compute type
    inverse_ptr,
    cells_ptr,
    bits_ptr,
    seed_ptr,
    scale_ptr,
    key_units,
    channels,
    call_blocks,
    spans,
    groups,
    last,
    rank,
    GRAIN: tl.constexpr,
    SHARE_T: tl.constexpr,
    SHARE_C: tl.constexpr,
    CALLS: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
):
    keys = key_units * GRAIN
    compute = largest_ptr.dtype.element_ty
    sample = tl.program_id(0) // call_blocks
    first_call = (tl.program_id(0) % call_blocks) * CALLS
    call = first_call + tl.arange(0, CALLS)
    row = tl.arange(0, CALLS)[None, :] * 4 + tl.arange(0, 4)[:, None]
    inside_rows = first_call * 4 + row < channels
    first_row = sample.to(tl.int64) * channels + first_call * 4
    first = first_row * keys
    key = tl.arange(0, KEYS)
    offset = (row * keys)[:, :, None] + key[None, None, :]

    largest = tl.load((largest_ptr + first_row) + row, mask=inside_rows, other=0.0)
    inverse = tl.load((inverse_ptr + first_row) + row, mask=inside_rows, other=0.0)
    scale = tl.load(scale_ptr).to(compute)
    weights = ()  # type: tuple[tl.tensor, ...]
    gradients = ()  # type: tuple[tl.tensor, ...]
    for part in tl.static_range(PARTS):
        inside = inside_rows[:, :, None]
        if part == PARTS - 1:
            inside = inside & (part * KEYS + key < keys)[None, None, :]
        scores = tl.load((scores_ptr + first) + (offset + part * KEYS), mask=inside, other=-float("inf")).to(compute)
        weight = _exp(scores - largest[:, :, None]) * inverse[:, :, None]
        bits = _decisions(
            sample, call, part, keys, cells_ptr, bits_ptr, seed_ptr, spans, groups, channels, last, rank, SHARE_T,
            SHARE_C, KEYS,
        )  # fmt: skip
        grad = tl.load((grad_ptr + first) + (offset + part * KEYS), mask=inside, other=0.0).to(compute)
        g = tl.where(_dropped(bits, 0), 0.0, grad * scale)
        weights += (weight,)
        gradients += (g,)
    total = weights[0] * gradients[0]
    for part in tl.static_range(1, PARTS):
        total += weights[part] * gradients[part]
    total = tl.sum(total, axis=2)[:, :, None]
    for part in tl.static_range(PARTS):
        inside = inside_rows[:, :, None]
        if part == PARTS - 1:
            inside = inside & (part * KEYS + key < keys)[None, None, :]
        dscores = weights[part] * (gradients[part] - total)
        tl.store((dscores_ptr + first) + (offset + part * KEYS), dscores.to(dscores_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def _tile(scores: torch.Tensor, channels: int, keys: int, of_thread: int) -> dict[str, int]:
    """How rows are cut into parts, and how many rows of so many elements a thread a program has.

    The parts of a row are equally long, a power of two, so few and short that the least is padded. A thread has 16
    bytes of each of them.
    """
    lengths = (triton.next_power_of_2(triton.cdiv(keys, parts)) for parts in range(1, PARTS + 1))
    length = min(lengths, key=lambda length: (triton.cdiv(keys, length) * length, -length))
    parts = triton.cdiv(keys, length)
    vector = min(length, max(math.gcd(keys, 16 // scores.element_size()), 2 if scores.element_size() == 8 else 4))
    rows = 1 << max(1, of_thread // (parts * vector)).bit_length() - 1  # of a thread
    threads = 4 * length // (rows * vector)  # of a call
    calls = max(1, min(WARPS * 32 // max(1, threads), triton.next_power_of_2(triton.cdiv(channels, 4))))
    return {"CALLS": calls, "PARTS": parts, "KEYS": length, "num_warps": max(1, min(16, calls * threads // 32))}


def forward(
    scores: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y like the scores; of every row its largest score and 1 / sum of exp(score - largest), (N, H, Q)."""
    if not scores.is_contiguous():
        y, largest, inverse = forward(scores.contiguous(), fields, seed, scale, share_t, share_c, rank)
        return torch.empty_like(scores).copy_(y), largest, inverse
    n, keys, channels = sides_of(scores.shape, "NHQK")
    cells, bits, spans, last = cells_of(fields, seed, n, keys, channels, share_t, share_c, rank)
    y = torch.empty_like(scores)
    rows = torch.empty((2, *scores.shape[:3]), dtype=compute_type(scores), device=scores.device)
    tile, grain = _tile(scores, channels, keys, FORWARD), grain_of(keys)
    call_blocks = triton.cdiv(channels, 4 * tile["CALLS"])
    softmax_forward_kernel[(n * call_blocks,)](
        scores, y, rows, cells, bits, seed, scale, n * channels, keys // grain, channels, call_blocks, spans,
        triton.cdiv(channels, 8), last, as_int32(rank),
        GRAIN=grain, SHARE_T=share_t, SHARE_C=share_c, **tile,
    )  # fmt: skip
    # Outputs of an op must not share memory.
    return y, rows[0].clone(), rows[1].clone()


def backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    largest: torch.Tensor,
    inverse: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> torch.Tensor:
    """The gradient of the scores, like them."""
    dscores = torch.empty_like(scores)
    into = dscores if dscores.is_contiguous() else torch.empty_like(scores, memory_format=torch.contiguous_format)
    n, keys, channels = sides_of(scores.shape, "NHQK")
    cells, bits, spans, last = cells_of(fields, seed, n, keys, channels, share_t, share_c, rank)
    tile, grain = _tile(scores, channels, keys, BACKWARD), grain_of(keys)
    call_blocks = triton.cdiv(channels, 4 * tile["CALLS"])
    softmax_backward_kernel[(n * call_blocks,)](
        grad.contiguous(), scores.contiguous(), into, largest, inverse, cells, bits, seed, scale, keys // grain,
        channels, call_blocks, spans, triton.cdiv(channels, 8), last, as_int32(rank),
        GRAIN=grain, SHARE_T=share_t, SHARE_C=share_c, **tile,
    )  # fmt: skip
    return dscores if into is dscores else dscores.copy_(into)
