"""Triton kernels of softmax and token pattern: one pass forward, one backward, over rows that fit into registers.

A tile is [4, calls, keys] of one sample, as in `apply_keys_kernel` of token_triton.py, whose small kernels over tokens
and spans run first: a Philox call decides for the same key of 4 rows that follow each other. `keys` covers the row, so
that maximum and sums stay in the program.

Bytes per element of size s: forward 2 s, backward 3 s; 8 bytes a row and 4 bytes a key and sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .masking import compute_type
from .token import sides_of
from .token_triton import _as_int32
from .token_triton import _cells
from .token_triton import _grain
from .token_triton import _word
from .token_triton import _words

# Elements of a tile, unless four rows are longer; and elements of a thread.
TILE = 4096
THREAD = 32


@triton.jit
def _dropped(
    sample, call, key, keys, channels, cells_ptr, bits_ptr, seed_ptr, spans, groups, last, rank,
    SHARE_T: tl.constexpr, SHARE_C: tl.constexpr,
):  # fmt: skip
    """The decisions of a tile: bool [4, CALLS, KEYS], or [1, 1, KEYS] where channels share them."""
    cell = tl.load(cells_ptr + sample.to(tl.int64) * keys + key, mask=key < keys, other=-1)
    covered = (cell >= 0)[None, None, :]
    j = tl.arange(0, 4)
    if SHARE_C:
        dropped = covered
    elif SHARE_T:
        bits_row = (sample.to(tl.int64) * spans + tl.maximum(cell, 0)) * groups
        bits = tl.load(
            bits_ptr + bits_row[None, :] + (call // 2)[:, None],
            mask=(cell >= 0)[None, :] & (call * 4 < channels)[:, None],
            other=0,
        )
        bits = bits.to(tl.int32) >> (call % 2 * 4)[:, None]
        dropped = ((bits[None, :, :] >> j[:, None, None]) & 1) != 0
    else:
        largest = (sample * 0 + last).to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = _words(tl.load(seed_ptr), call[:, None], (1 + cell)[None, :], sample, sample * 0 + rank)
        word = _word(w0[None, :, :], w1[None, :, :], w2[None, :, :], w3[None, :, :], j[:, None, None])
        dropped = covered & (word <= largest)
    return dropped


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
    KEYS: tl.constexpr,
):
    keys = key_units * GRAIN
    compute = rows_ptr.dtype.element_ty
    sample = tl.program_id(0) // call_blocks
    call = (tl.program_id(0) % call_blocks) * CALLS + tl.arange(0, CALLS)
    channel = call[None, :] * 4 + tl.arange(0, 4)[:, None]
    key = tl.arange(0, KEYS)
    inside = (channel < channels)[:, :, None] & (key < keys)[None, None, :]
    row = sample.to(tl.int64) * channels + channel
    offset = row[:, :, None] * keys + key[None, None, :]

    scores = tl.load(scores_ptr + offset, mask=inside, other=-float("inf")).to(compute)
    largest = tl.max(scores, axis=2)
    weights = tl.exp(scores - largest[:, :, None])
    inverse = 1.0 / tl.sum(weights, axis=2)
    dropped = _dropped(
        sample, call, key, keys, channels, cells_ptr, bits_ptr, seed_ptr, spans, groups, last, rank, SHARE_T, SHARE_C
    )
    weights = weights * inverse[:, :, None] * tl.load(scale_ptr).to(compute)
    tl.store(y_ptr + offset, tl.where(dropped, 0.0, weights).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rows_ptr + row, largest, mask=channel < channels)
    tl.store(rows_ptr + all_rows.to(tl.int64) + row, inverse, mask=channel < channels)


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
    KEYS: tl.constexpr,
):
    keys = key_units * GRAIN
    compute = largest_ptr.dtype.element_ty
    sample = tl.program_id(0) // call_blocks
    call = (tl.program_id(0) % call_blocks) * CALLS + tl.arange(0, CALLS)
    channel = call[None, :] * 4 + tl.arange(0, 4)[:, None]
    key = tl.arange(0, KEYS)
    inside = (channel < channels)[:, :, None] & (key < keys)[None, None, :]
    row = sample.to(tl.int64) * channels + channel
    offset = row[:, :, None] * keys + key[None, None, :]

    largest = tl.load(largest_ptr + row, mask=channel < channels, other=0.0)
    inverse = tl.load(inverse_ptr + row, mask=channel < channels, other=0.0)
    scores = tl.load(scores_ptr + offset, mask=inside, other=-float("inf")).to(compute)
    weights = tl.exp(scores - largest[:, :, None]) * inverse[:, :, None]
    dropped = _dropped(
        sample, call, key, keys, channels, cells_ptr, bits_ptr, seed_ptr, spans, groups, last, rank, SHARE_T, SHARE_C
    )
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(compute)
    g = tl.where(dropped, 0.0, grad * tl.load(scale_ptr).to(compute))
    total = tl.sum(g * weights, axis=2)
    dscores = weights * (g - total[:, :, None])
    tl.store(dscores_ptr + offset, dscores.to(dscores_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def _tile(channels: int, keys: int) -> tuple[int, int, int]:
    """Calls and keys of a tile, and its warps."""
    of_keys = triton.next_power_of_2(keys)
    calls = max(1, min(TILE // 4 // of_keys, triton.next_power_of_2(triton.cdiv(channels, 4))))
    return calls, of_keys, max(1, min(16, 4 * calls * of_keys // (32 * THREAD)))


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
    cells, bits, spans, last = _cells(fields, seed, n, keys, channels, share_t, share_c, rank)
    y = torch.empty_like(scores)
    rows = torch.empty((2, *scores.shape[:3]), dtype=compute_type(scores), device=scores.device)
    calls, of_keys, warps = _tile(channels, keys)
    call_blocks, grain = triton.cdiv(channels, 4 * calls), _grain(keys)
    softmax_forward_kernel[(n * call_blocks,)](
        scores, y, rows, cells, bits, seed, scale, n * channels, keys // grain, channels, call_blocks, spans,
        triton.cdiv(channels, 8), last, _as_int32(rank),
        GRAIN=grain, SHARE_T=share_t, SHARE_C=share_c, CALLS=calls, KEYS=of_keys, num_warps=warps,
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
    cells, bits, spans, last = _cells(fields, seed, n, keys, channels, share_t, share_c, rank)
    calls, of_keys, warps = _tile(channels, keys)
    call_blocks, grain = triton.cdiv(channels, 4 * calls), _grain(keys)
    softmax_backward_kernel[(n * call_blocks,)](
        grad.contiguous(), scores.contiguous(), into, largest, inverse, cells, bits, seed, scale, keys // grain,
        channels, call_blocks, spans, triton.cdiv(channels, 8), last, _as_int32(rank),
        GRAIN=grain, SHARE_T=share_t, SHARE_C=share_c, CALLS=calls, KEYS=of_keys, num_warps=warps,
    )  # fmt: skip
    return dscores if into is dscores else dscores.copy_(into)
