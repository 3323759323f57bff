"""Triton kernels of batch_norm_pattern_relu: two over the activations forward, two backward, and a small one after each
reduction.

`moments_kernel` reads x and leaves mean and sum of squared deviations of every channel in every chunk of samples
(Welford, lane by lane, so that no digits are lost to a large mean); `finish_moments_kernel` combines the chunks (Chan
et al. 1979). `forward_kernel` reads x and writes y. `sums_kernel` reads x and grad and leaves the sums of g and of
g * (x - mean), `finish_sums_kernel` adds them up, and `backward_kernel` reads x and grad and writes dx. Partial results
are added in a fixed order: the same input gives the same bits.

Contiguous maps whose planes begin amid accesses have the kernels of batch_norm_runs_triton.py, the small ones these.
Tiles are [channels, fragments, 8] of one sample, in both memory formats; LAST says that channels are what follow each
other in memory. The mask comes as in tiled_triton.py, one byte for 8 cells. The sign of bn, which backward needs again,
is that of forward to the bit: one subtraction and one fused multiply-add in both.

Bytes per element of size s: forward 3 s, backward 5 s; the partial results are 8 bytes a chunk and channel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .batch_norm_runs_triton import RunPlan
from .batch_norm_runs_triton import _affine
from .batch_norm_runs_triton import _gradient_of_bn
from .batch_norm_runs_triton import samples_of_chunk
from .batch_norm_runs_triton import suits
from .masking import compute_type
from .tiles_triton import Tiling
from .tiles_triton import _mask_of_tile
from .tiles_triton import _offsets
from .tiles_triton import dense

# Elements of a tile and warps that share it: 16 elements a thread keep two activations and two sums in registers.
TILE = 2048
WARPS = 4

# Tiles that a program of a reduction reads at least: to add up the numbers of its lanes takes as long as two more do.
TURNS = 8

# Channels that a program of the finishing kernels takes.
FINISH_BLOCK = 32


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _of_channels(pointer, channel, channels):
    """A number of every channel, to go with a tile."""
    return tl.load(pointer + channel, mask=channel < channels, other=0.0)[:, None, None]


@triton.jit
def _sum_of_tile(tile):
    return tl.sum(tl.sum(tile, axis=2), axis=1)


# ---- forward -------------------------------------------------------------------------------------------------------
# Of a number that is loaded alone, the scale, the alignment does not matter: it must not make another variant.


@triton.jit
def moments_kernel(
    x_ptr,  # (N, C, H, W), in the order of memory N, C, H, W or N, H, W, C
    partial_ptr,  # (2, chunks, C) in the compute type, written: means, sums of squared deviations
    samples,
    samples_of_chunk,
    chunks,
    channel_units,  # the channels are channel_units * CHANNELS_GRAIN
    height,
    width_units,  # the width is width_units * GRAIN, which tells the compiler what it is divisible by
    fragments,  # of 8 cells, in all of a map
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,  # likewise for the cells of a map
    CHANNELS_GRAIN: tl.constexpr,
    TAIL: tl.constexpr,  # the last tile of a map is not full
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    cells = height * width_units * GRAIN // CELLS_GRAIN * CELLS_GRAIN
    compute = partial_ptr.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    channel = (tl.program_id(0) // chunks) * CHANNELS + tl.arange(0, CHANNELS)
    first = chunk * samples_of_chunk
    last = tl.minimum(first + samples_of_chunk, samples)
    lane = tl.arange(0, 8)

    mean = tl.zeros([CHANNELS, FRAGMENTS, 8], compute)
    squares = tl.zeros([CHANNELS, FRAGMENTS, 8], compute)
    weights = tl.zeros([1, FRAGMENTS, 8], compute)
    count = first * 0
    for begin in range(0, fragments, FRAGMENTS):
        cell = ((begin + tl.arange(0, FRAGMENTS)) * 8)[None, :, None] + lane[None, None, :]
        inside = (channel < channels)[:, None, None] & (cell < cells)
        # Lanes behind the map are so in the last turn alone: till then one count is that of all lanes.
        for sample in range(first, last):
            count += 1
            offset = _offsets(sample + first * 0, channel, cell, channels, cells, LAST)
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(compute)
            delta = x - mean
            if TAIL:
                delta = tl.where(cell < cells, delta, 0.0)
            mean += delta * (1.0 / count.to(compute))
            squares += delta * (x - mean)
        weights += tl.where(cell < cells, 1.0, 0.0).to(compute)
    # The weight of a lane is how many cells of a sample it saw. Channels that are none are computed, and not stored.
    mean_of_chunk = _sum_of_tile(weights * mean) / tl.cast(cells, compute)
    apart = mean - mean_of_chunk[:, None, None]
    between = (last - first).to(compute) * (weights * apart * apart)
    place = chunk.to(tl.int64) * channels + channel
    tl.store(partial_ptr + place, mean_of_chunk, mask=channel < channels)
    second_ptr = partial_ptr + tl.cast(chunks, tl.int64) * channels
    tl.store(second_ptr + place, _sum_of_tile(squares + between), mask=channel < channels)


@triton.jit
def finish_moments_kernel(
    partial_ptr,  # (2, chunks, C)
    result_ptr,  # (3, C), written: mean, 1 / sqrt(variance + eps), unbiased variance
    eps_ptr,  # float64
    samples,
    samples_of_chunk,
    chunks,
    channels,
    cells,
    BLOCK: tl.constexpr,
):
    compute = partial_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    mean = tl.zeros([BLOCK], compute)
    squares = tl.zeros([BLOCK], compute)
    for chunk in range(0, chunks):
        first = chunk * samples_of_chunk
        last = tl.minimum(first + samples_of_chunk, samples)
        share = (last - first).to(compute) / last.to(compute)
        place = (first * 0 + chunk).to(tl.int64) * channels + channel
        apart = tl.load(partial_ptr + place, mask=inside, other=0.0) - mean
        more = tl.load(partial_ptr + tl.cast(chunks, tl.int64) * channels + place, mask=inside, other=0.0)
        mean += apart * share
        squares += more + apart * apart * (share * first.to(compute) * tl.cast(cells, compute))
    size = tl.cast(samples, compute) * tl.cast(cells, compute)
    rstd = 1.0 / tl.sqrt(squares / size + tl.load(eps_ptr).to(compute))
    tl.store(result_ptr + channel, mean, mask=inside)
    tl.store(result_ptr + channels + channel, rstd, mask=inside)
    tl.store(result_ptr + 2 * channels + channel, squares / (size - 1), mask=inside)


@triton.jit(do_not_specialize=["scale_ptr"])
def forward_kernel(
    x_ptr,
    y_ptr,  # as x, written
    moments_ptr,  # (3, C) in the compute type, as of finish_moments_kernel
    weight_ptr,  # (C) in the compute type
    bias_ptr,
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8
    scale_ptr,  # float64
    starts_per_sample,  # 1 where channels share, or C
    channel_units,
    height,
    width_units,
    channel_blocks,
    fragment_blocks,
    pitch,
    step,
    start_step,
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,
    CHANNELS_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    width = width_units * GRAIN
    cells = height * width // CELLS_GRAIN * CELLS_GRAIN
    compute = moments_ptr.dtype.element_ty
    block = tl.program_id(0)
    fragment = (block % fragment_blocks) * FRAGMENTS + tl.arange(0, FRAGMENTS)
    block = block // fragment_blocks
    channel = (block % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    sample = block // channel_blocks
    cell, inside, kept = _mask_of_tile(
        sample, channel, fragment, starts_ptr, starts_per_sample, fragments_ptr, channels, height, width, cells,
        pitch, step, start_step, ROWS,
    )  # fmt: skip
    offset = _offsets(sample, channel, cell, channels, cells, LAST)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(compute)
    slope = _of_channels(moments_ptr + channels, channel, channels) * _of_channels(weight_ptr, channel, channels)
    bias = _of_channels(bias_ptr, channel, channels)
    bn = _affine(x - _of_channels(moments_ptr, channel, channels), slope, bias)
    product = tl.where(bn <= 0.0, 0.0, bn) * tl.load(scale_ptr).to(compute)
    tl.store(y_ptr + offset, tl.where(kept, product, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["scale_ptr"])
def sums_kernel(
    x_ptr,
    grad_ptr,  # in the memory format of x
    partial_ptr,  # (2, chunks, C) in the compute type, written: sums of g and of g * (x - mean)
    mean_ptr,  # (C) in the compute type, like the next three
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    fragments_ptr,
    scale_ptr,
    starts_per_sample,
    samples,
    samples_of_chunk,
    chunks,
    channel_units,
    height,
    width_units,
    fragment_blocks,
    pitch,
    step,
    start_step,
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,
    CHANNELS_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    width = width_units * GRAIN
    cells = height * width // CELLS_GRAIN * CELLS_GRAIN
    compute = partial_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = chunk * samples_of_chunk
    last = tl.minimum(first + samples_of_chunk, samples)
    mean = _of_channels(mean_ptr, channel, channels)
    slope = _of_channels(rstd_ptr, channel, channels) * _of_channels(weight_ptr, channel, channels)
    bias = _of_channels(bias_ptr, channel, channels)
    scale = tl.load(scale_ptr).to(compute)

    of_bias = tl.zeros([CHANNELS, FRAGMENTS, 8], compute)
    of_weight = tl.zeros([CHANNELS, FRAGMENTS, 8], compute)
    for fragment_block in range(0, fragment_blocks):
        fragment = fragment_block * FRAGMENTS + tl.arange(0, FRAGMENTS)
        for sample in range(first, last):
            cell, inside, kept = _mask_of_tile(
                sample + first * 0, channel, fragment, starts_ptr, starts_per_sample, fragments_ptr, channels, height,
                width, cells, pitch, step, start_step, ROWS,
            )  # fmt: skip
            offset = _offsets(sample + first * 0, channel, cell, channels, cells, LAST)
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(compute)
            grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(compute)
            centred, g = _gradient_of_bn(grad, x, kept & inside, mean, slope, bias, scale)
            of_bias += g
            of_weight += g * centred
    place = chunk.to(tl.int64) * channels + channel
    tl.store(partial_ptr + place, _sum_of_tile(of_bias), mask=channel < channels)
    second_ptr = partial_ptr + tl.cast(chunks, tl.int64) * channels
    tl.store(second_ptr + place, _sum_of_tile(of_weight), mask=channel < channels)


@triton.jit
def finish_sums_kernel(
    partial_ptr,  # (2, chunks, C)
    rstd_ptr,
    result_ptr,  # (4, C), written: dbias, dweight, dbias / size, dweight * rstd / size
    samples,
    chunks,
    channels,
    cells,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    of_bias = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    of_weight = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for chunk in range(0, chunks):
        place = (chunks * 0 + chunk).to(tl.int64) * channels + channel
        of_bias += tl.load(partial_ptr + place, mask=inside, other=0.0)
        of_weight += tl.load(partial_ptr + tl.cast(chunks, tl.int64) * channels + place, mask=inside, other=0.0)
    tl.store(result_ptr + channel, of_bias, mask=inside)
    rstd = tl.load(rstd_ptr + channel, mask=inside, other=0.0)
    tl.store(result_ptr + channels + channel, of_weight * rstd, mask=inside)
    size = tl.cast(samples, rstd.dtype) * tl.cast(cells, rstd.dtype)
    tl.store(result_ptr + 2 * channels + channel, of_bias / size, mask=inside)
    tl.store(result_ptr + 3 * channels + channel, of_weight * rstd * rstd / size, mask=inside)


@triton.jit(do_not_specialize=["scale_ptr"])
def backward_kernel(
    x_ptr,
    grad_ptr,  # in the memory format of x
    dx_ptr,  # likewise, written
    means_ptr,  # (2, C): dbias / size, dweight * rstd / size
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    fragments_ptr,
    scale_ptr,
    starts_per_sample,
    channel_units,
    height,
    width_units,
    channel_blocks,
    fragment_blocks,
    pitch,
    step,
    start_step,
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,
    CHANNELS_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    width = width_units * GRAIN
    cells = height * width // CELLS_GRAIN * CELLS_GRAIN
    compute = means_ptr.dtype.element_ty
    block = tl.program_id(0)
    fragment = (block % fragment_blocks) * FRAGMENTS + tl.arange(0, FRAGMENTS)
    block = block // fragment_blocks
    channel = (block % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    sample = block // channel_blocks
    cell, inside, kept = _mask_of_tile(
        sample, channel, fragment, starts_ptr, starts_per_sample, fragments_ptr, channels, height, width, cells,
        pitch, step, start_step, ROWS,
    )  # fmt: skip
    offset = _offsets(sample, channel, cell, channels, cells, LAST)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(compute)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(compute)
    slope = _of_channels(rstd_ptr, channel, channels) * _of_channels(weight_ptr, channel, channels)
    bias = _of_channels(bias_ptr, channel, channels)
    mean = _of_channels(mean_ptr, channel, channels)
    centred, g = _gradient_of_bn(grad, x, kept, mean, slope, bias, tl.load(scale_ptr).to(compute))
    of_bias = _of_channels(means_ptr, channel, channels)
    of_weight = _of_channels(means_ptr + channels, channel, channels)
    dx = slope * (g - of_bias - centred * of_weight)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


class TilePlan(Tiling):
    """A tiling with the chunks of samples of the reductions, and the launches; as `RunPlan`."""

    def __init__(self, x: torch.Tensor, atlas: Atlas) -> None:
        super().__init__(x, atlas, TILE)
        self.samples = n = x.shape[0]
        least = triton.cdiv(TURNS, self.fragment_blocks)
        self.samples_of_chunk = samples_of_chunk(n, self.channel_blocks, least)
        self.chunks = triton.cdiv(n, self.samples_of_chunk)
        self.cells = x.shape[2] * x.shape[3]
        self.constants: dict[str, Any] = {**self.grains, **self.tile, "num_warps": WARPS}
        # ptxas spills a few registers of the loops over channels_last tiles of this many bytes (sm_100).
        self.more_warps = {"num_warps": 2 * WARPS} if self.grains["LAST"] else {}

    def moments(self, x: torch.Tensor, partial: torch.Tensor) -> None:
        moments_kernel[(self.channel_blocks * self.chunks,)](
            x, partial, self.samples, self.samples_of_chunk, self.chunks, *self.units, triton.cdiv(self.cells, 8),
            TAIL=self.cells % (8 * self.fragments) != 0,
            **(self.constants | (self.more_warps if x.element_size() > 2 else {})),
        )  # fmt: skip

    def forward(self, *tensors: torch.Tensor) -> None:
        """x, y, moments, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        forward_kernel[(self.samples * self.channel_blocks * self.fragment_blocks,)](
            *of_elements, starts, self.tables.fragments, scale, starts.shape[1], *self.units, self.channel_blocks,
            self.fragment_blocks, *self.steps, ROWS=self.tables.rows > 1, **self.constants,
        )  # fmt: skip

    def sums(self, *tensors: torch.Tensor) -> None:
        """x, grad, partial, mean, rstd, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        sums_kernel[(self.channel_blocks, self.chunks)](
            *of_elements, starts, self.tables.fragments, scale, starts.shape[1], self.samples, self.samples_of_chunk,
            self.chunks, *self.units, self.fragment_blocks, *self.steps, ROWS=self.tables.rows > 1,
            **(self.constants | self.more_warps),
        )  # fmt: skip

    def backward(self, *tensors: torch.Tensor) -> None:
        """x, grad, dx, means, mean, rstd, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        backward_kernel[(self.samples * self.channel_blocks * self.fragment_blocks,)](
            *of_elements, starts, self.tables.fragments, scale, starts.shape[1], *self.units, self.channel_blocks,
            self.fragment_blocks, *self.steps, ROWS=self.tables.rows > 1, **self.constants,
        )  # fmt: skip


def _plan(x: torch.Tensor, atlas: Atlas) -> TilePlan | RunPlan:
    return RunPlan(x, atlas) if suits(x, atlas) else TilePlan(x, atlas)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    atlas: Atlas,
    starts: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y in x's memory format, and mean, 1 / sqrt(variance + eps) and unbiased variance of the channels."""
    if not dense(x):
        y, mean, rstd, unbiased = forward(x.contiguous(), weight, bias, atlas, starts, scale, eps)
        return torch.empty_like(x).copy_(y), mean, rstd, unbiased
    n, c, height, width = x.shape
    plan = _plan(x, atlas)
    of_channels: dict[str, Any] = {"dtype": compute_type(x), "device": x.device}
    partial = torch.empty((2, plan.chunks, c), **of_channels)
    plan.moments(x, partial)
    moments = torch.empty((3, c), **of_channels)
    finish_moments_kernel[(triton.cdiv(c, FINISH_BLOCK),)](
        partial, moments, torch.full((), eps, dtype=torch.float64, device=x.device), n, plan.samples_of_chunk,
        plan.chunks, c, height * width, BLOCK=FINISH_BLOCK, num_warps=1,
    )  # fmt: skip
    y = torch.empty_like(x)
    plan.forward(x, y, moments, weight, bias, starts, scale)
    # Outputs of an op must not share memory.
    mean, rstd, unbiased = moments.unbind(0)
    return y, mean.clone(), rstd.clone(), unbiased.clone()


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    atlas: Atlas,
    starts: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx in x's memory format, and dweight and dbias in the compute type."""
    if not dense(x):
        dx, dweight, dbias = backward(grad, x.contiguous(), weight, bias, mean, rstd, atlas, starts, scale)
        return torch.empty_like(x).copy_(dx), dweight, dbias
    plan = _plan(x, atlas)
    n, c, height, width = x.shape
    grad = grad.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    of_channels: dict[str, Any] = {"dtype": mean.dtype, "device": x.device}
    partial = torch.empty((2, plan.chunks, c), **of_channels)
    of_pattern = (mean, rstd, weight, bias, starts, scale)
    plan.sums(x, grad, partial, *of_pattern)
    sums = torch.empty((4, c), **of_channels)
    finish_sums_kernel[(triton.cdiv(c, FINISH_BLOCK),)](
        partial, rstd, sums, n, plan.chunks, c, height * width, BLOCK=FINISH_BLOCK, num_warps=1
    )
    dx = torch.empty_like(x)
    plan.backward(x, grad, dx, sums[2:], *of_pattern)
    return dx, sums[1].clone(), sums[0].clone()
