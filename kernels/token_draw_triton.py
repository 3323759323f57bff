"""Triton kernels of token patterns that read no activation: where tokens are covered, shared decisions, and the scale.

`cells_kernel` finds phase and spans and writes 4 bytes a token: the counter word cell_t, or -1 where the token is not
covered. With `share_c` it draws the decisions as well, and -1 stands for a kept token. With `share_t` alone
`spans_kernel` draws the decisions of every span, packed, one byte for 8 channels. `count_kernel` adds a mask up for
normalize="mask".

Counter layout (Philox4x32-10): (0, 0, sample, rank) for the phase, (c div 4, 1 + cell_t, sample, rank) for decisions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_triton import as_int32
from .philox_triton import philox

# Tokens of a program of cells_kernel, and bytes of one of spans_kernel.
CELLS = 1024
BYTES = 512

# Decisions of a program of count_kernel, and warps that share them.
COUNTED = 4096
WARPS = 4


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_ptr", "size", "period", "last", "rank"])
def cells_kernel(
    seed_ptr,  # int64
    cells_ptr,  # int32 (N, T), written
    tokens,
    token_blocks,
    size,  # 0 where nothing is dropped
    period,
    last,  # int32 with the bits of the largest word that drops
    rank,  # int32 with the bits of the uint32
    SHARE_T: tl.constexpr,
    SHARE_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sample = block // token_blocks
    token = (block - sample * token_blocks) * BLOCK + tl.arange(0, BLOCK)
    zero = sample * 0
    seed = tl.load(seed_ptr)
    w0, _, _, _ = philox(seed, zero, zero, sample, zero + rank)
    phase = ((w0.to(tl.uint64) * (zero + period).to(tl.uint64)) >> 32).to(tl.uint32)
    phase = tl.where(size >= tokens, phase * 0, phase)
    # Tokens and phase are below 2^31 each: their sum is unsigned.
    place = token.to(tl.uint32) + phase
    span = place // (zero + period).to(tl.uint32)
    covered = place - span * (zero + period).to(tl.uint32) < (zero + size).to(tl.uint32)
    if SHARE_T:
        cell = span.to(tl.int32)
    else:
        cell = token
    if SHARE_C:
        word, _, _, _ = philox(seed, zero, 1 + cell, sample, zero + rank)
        covered = covered & (word <= (zero + last).to(tl.uint32, bitcast=True))
    tl.store(cells_ptr + sample.to(tl.int64) * tokens + token, tl.where(covered, cell, -1), mask=token < tokens)


@triton.jit(do_not_specialize=["seed_ptr", "rows", "spans", "last", "rank"])
def spans_kernel(
    seed_ptr,  # int64
    bits_ptr,  # uint8 (N, spans, groups), written: bit j of a byte is 1 where channel 8 * group + j is dropped
    rows,  # N * spans
    spans,
    groups,
    group_blocks,
    last,
    rank,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0)
    row_block = block // group_blocks
    row = row_block * ROWS + tl.arange(0, ROWS)
    group = (block - row_block * group_blocks) * GROUPS + tl.arange(0, GROUPS)
    sample = row // spans
    span = row - sample * spans
    call = group[None, :] * 2
    seed = tl.load(seed_ptr)
    largest = (row_block * 0 + last).to(tl.uint32, bitcast=True)
    byte = call * 0 + row[:, None] * 0
    for half in tl.static_range(2):
        words = philox(seed, call + half + byte * 0, 1 + span[:, None], sample[:, None], row_block * 0 + rank)
        for j in tl.static_range(4):
            byte = byte | ((words[j] <= largest).to(tl.int32) << (4 * half + j))
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(bits_ptr + row.to(tl.int64)[:, None] * groups + group[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["seed_ptr", "last", "rank"])
def count_kernel(
    seed_ptr,  # int64
    cells_ptr,  # int32 (N, T)
    totals_ptr,  # int64 (2), zeros: dropped so far, programs that have added theirs
    scale_ptr,  # float64, written
    rows,  # N * T
    tokens,
    channels,
    call_blocks,
    last,
    rank,
    SHARE_C: tl.constexpr,
    ROWS: tl.constexpr,
    CALLS: tl.constexpr,
):
    block = tl.program_id(0)
    row_block = block // call_blocks
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cell = tl.load(cells_ptr + row, mask=row < rows, other=-1)
    wide = row_block.to(tl.int64) * 0
    if SHARE_C:
        dropped = tl.sum((cell >= 0).to(tl.int64)) * channels
    else:
        call = (block - row_block * call_blocks) * CALLS + tl.arange(0, CALLS)
        sample = (row // tokens).to(tl.int32)
        largest = (block * 0 + last).to(tl.uint32, bitcast=True)
        words = philox(tl.load(seed_ptr), call[None, :], (1 + cell)[:, None], sample[:, None], row_block * 0 + rank)
        found = call[None, :] * 0 + cell[:, None] * 0
        for i in tl.static_range(4):
            below = (words[i] <= largest) & (cell >= 0)[:, None] & (call * 4 + i < channels)[None, :]
            found += below.to(tl.int32)
        dropped = tl.sum(found).to(tl.int64)
    tl.atomic_add(totals_ptr, dropped)
    # Release and acquire: who sees all the others' arrivals sees their sums.
    arrived = tl.atomic_add(totals_ptr + 1, 1)
    if arrived == tl.num_programs(0) - 1:
        size = (wide + rows) * channels
        kept = size - tl.atomic_add(totals_ptr, 0)
        quotient = size.to(tl.float64) / tl.maximum(kept, 1).to(tl.float64)
        tl.store(scale_ptr, tl.where(kept > 0, quotient, 0.0))


# ---- launchers -----------------------------------------------------------------------------------------------------


def cells_of(
    fields: torch.Tensor,
    seed: torch.Tensor,
    n: int,
    t: int,
    c: int,
    share_t: bool,
    share_c: bool,
    rank: int,
    with_bits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What the kernels over elements need of the pattern: cells, packed decisions, spans of a sample, `last`."""
    from .token import read_fields

    size, period, threshold = read_fields(fields)
    # Words are compared with the largest that drops, which fits 32 bits; a threshold of 0 covers nothing.
    size, last = (0, 0) if threshold == 0 else (size, as_int32(threshold - 1))
    rank = as_int32(rank)
    cells = torch.empty((n, t), dtype=torch.int32, device=seed.device)
    block = min(CELLS, triton.next_power_of_2(t))
    blocks = triton.cdiv(t, block)
    cells_kernel[(n * blocks,)](
        seed, cells, t, blocks, size, period, last, rank, SHARE_T=share_t, SHARE_C=share_c, BLOCK=block
    )
    spans = (t + period - 2) // period + 1
    if not share_t or share_c or not with_bits:
        return cells, cells, spans, last
    groups = triton.cdiv(c, 8)
    bits = torch.empty((n, spans, groups), dtype=torch.uint8, device=seed.device)
    columns = min(BYTES, triton.next_power_of_2(groups))
    rows = BYTES // columns
    column_blocks = triton.cdiv(groups, columns)
    spans_kernel[(triton.cdiv(n * spans, rows) * column_blocks,)](
        seed, bits, n * spans, spans, groups, column_blocks, last, rank, ROWS=rows, GROUPS=columns
    )
    return cells, bits, spans, last


def scale_of_mask(
    fields: torch.Tensor, seed: torch.Tensor, n: int, t: int, c: int, share_t: bool, share_c: bool, rank: int
) -> torch.Tensor:
    """Size / Sum of the mask of n samples, t tokens, c channels (none 0), 0-d float64 on the seed's device."""
    cells, _, _, last = cells_of(fields, seed, n, t, c, share_t, share_c, rank, with_bits=False)
    totals = torch.zeros(2, dtype=torch.int64, device=seed.device)
    scale = torch.empty((), dtype=torch.float64, device=seed.device)
    calls = 1 if share_c else min(128, triton.next_power_of_2(triton.cdiv(c, 4)))
    rows = COUNTED if share_c else COUNTED // 4 // calls
    call_blocks = 1 if share_c else triton.cdiv(triton.cdiv(c, 4), calls)
    count_kernel[(triton.cdiv(n * t, rows) * call_blocks,)](
        seed, cells, totals, scale, n * t, t, c, call_blocks, last, as_int32(rank),
        SHARE_C=share_c, ROWS=rows, CALLS=calls, num_warps=WARPS,
    )  # fmt: skip
    return scale
