"""The kernels of batch_norm_triton.py for contiguous maps whose planes are no whole accesses: 7x7, 14x14 and the like.

A tile is a run of whole planes of one sample, whatever 16 bytes hold of two of them: [fragments, LANES], a fragment
what one access moves. The same fragment of every sample lies in the same two planes, so that a program of a reduction
keeps a sum for each cell, and adds the cells of a plane up once, behind its last sample. Numbers of a channel and the
bits of the mask come from both planes and are joined where the second one begins (see `apply_kernel` of
tiled_triton.py).

Results, partial results and their combination are those of batch_norm_triton.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .words_triton import divisor
from .words_triton import quotient

# Bytes of an access; elements of a tile at most, and of a thread.
ACCESS = 16
TILE = 2048
THREAD = 8

# Programs of a reduction: more than any GPU holds at once, so few that the partial results do not count. And tiles that
# each of them reads at least: to add up the numbers of its lanes takes as long as to read one or two more.
REDUCING = 2048
TURNS = 4

# Arguments of which nothing is compiled in.
SIZES = ("cells", "cells_reciprocal", "cells_shift", "start_step")


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _affine(centred, slope, bias):
    """One rounding, in forward and in backward."""
    return tl.fma(centred, tl.broadcast_to(slope, centred.shape), tl.broadcast_to(bias, centred.shape))


@triton.jit
def _gradient_of_bn(grad, x, kept, mean, slope, bias, scale):
    """x - mean, and `g = grad * mask * scale * (bn > 0)`: 0 at dropped cells, whatever grad holds there."""
    centred = x - mean
    bn = _affine(centred, slope, bias)
    return centred, tl.where(kept & ~(bn <= 0.0), grad * scale, 0.0)


@triton.jit
def _fragments(
    first, channels, cells, cells_reciprocal, cells_shift,
    WHOLE: tl.constexpr, PLANES: tl.constexpr, FRAGMENTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of the run of planes from channel `first` on: its channel and the next one's, the lane where that one begins.

    And the place of every element in the run, and whether it is there.
    """
    element = tl.arange(0, FRAGMENTS) * LANES
    plane = quotient(element, cells_reciprocal, cells_shift)
    begin = (plane + 1) * cells - element
    length = tl.minimum(channels - first, PLANES) * cells
    lane = tl.arange(0, LANES)
    place = element[:, None] + lane[None, :]
    if WHOLE:
        inside = (element < length)[:, None]
    else:
        inside = place < length
    return first + plane, begin, place, inside


@triton.jit
def _of_two(pointer, channel, channels):
    """A number of the two channels of every fragment."""
    first = tl.load(pointer + channel, mask=channel < channels, other=0.0)
    return first, tl.load(pointer + channel + 1, mask=channel + 1 < channels, other=0.0)


@triton.jit
def _of_elements(first, second, begin, LANES: tl.constexpr):
    """Of every element the number of its channel: of a fragment's first one, and from `begin` on of the next one."""
    return tl.where(tl.arange(0, LANES)[None, :] < begin[:, None], first[:, None], second[:, None])


@triton.jit
def _affine_map(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, begin, channels, LANES: tl.constexpr):
    """Mean, slope and bias of every element."""
    first_mean, next_mean = _of_two(mean_ptr, channel, channels)
    first_rstd, next_rstd = _of_two(rstd_ptr, channel, channels)
    first_weight, next_weight = _of_two(weight_ptr, channel, channels)
    first_bias, next_bias = _of_two(bias_ptr, channel, channels)
    mean = _of_elements(first_mean, next_mean, begin, LANES)
    slope = _of_elements(first_rstd * first_weight, next_rstd * next_weight, begin, LANES)
    return mean, slope, _of_elements(first_bias, next_bias, begin, LANES)


@triton.jit
def _kept(
    starts_ptr, fragments_ptr, channel, begin, channels, cells, start_step, LOG_GRAIN: tl.constexpr,
    SHARED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The mask of the fragments of a sample, whose starts are at `starts_ptr`."""
    # A byte of the table has a fragment's bits from its first cell on, which is `cells - begin` of its plane.
    first_byte = tl.load(starts_ptr + (channel * 0 if SHARED else channel), mask=channel < channels, other=0)
    next_byte = tl.load(starts_ptr + (channel * 0 if SHARED else channel + 1), mask=channel + 1 < channels, other=0)
    first_byte = first_byte * start_step + ((cells - begin) >> LOG_GRAIN)
    bits = tl.load(fragments_ptr + first_byte, mask=channel < channels, other=0).to(tl.int32)
    after = tl.load(fragments_ptr + next_byte * start_step, mask=begin < LANES, other=0).to(tl.int32)
    begin = tl.minimum(begin, LANES)
    bits = (bits & ((1 << begin) - 1)) | (after << begin)
    return (bits[:, None] & (1 << tl.arange(0, LANES))[None, :]) != 0


@triton.jit
def _sums_of_planes(
    values, begin, cells, PLANES: tl.constexpr, OF_PLANE: tl.constexpr, FRAGMENTS: tl.constexpr, LANES: tl.constexpr
):
    """The sum over the cells of every plane of a run: [PLANES, rounded up to a power of two]."""
    of_first = tl.arange(0, LANES)[None, :] < begin[:, None]
    head = tl.sum(tl.where(of_first, values, 0.0), axis=1)
    tail = tl.sum(tl.where(of_first, 0.0, values), axis=1)
    # A plane has the tail of the fragment in which it begins, unless it begins with it, and heads of those behind.
    plane = tl.arange(0, PLANES)[:, None]
    k = tl.arange(0, OF_PLANE)[None, :]
    fragment = (plane * cells + LANES - 1) // LANES + k
    inside = fragment * LANES < (plane + 1) * cells
    fragment = tl.minimum(fragment, FRAGMENTS - 1).reshape(PLANES * OF_PLANE)
    heads = tl.gather(head, fragment, 0).reshape(PLANES, OF_PLANE)
    before = tl.minimum(tl.arange(0, PLANES) * cells // LANES, FRAGMENTS - 1)
    begins_inside = tl.arange(0, PLANES) * cells % LANES != 0
    return tl.sum(tl.where(inside, heads, 0.0), axis=1) + tl.where(begins_inside, tl.gather(tail, before, 0), 0.0)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def run_moments_kernel(
    x_ptr,  # (N, C, H, W), contiguous
    partial_ptr,  # (2, chunks, C) in the compute type, written: means, sums of squared deviations
    samples,
    samples_of_chunk,
    chunks,
    channel_units,  # the channels are channel_units * CHANNELS_GRAIN
    sample_units,  # the elements of a sample are sample_units * SAMPLE_GRAIN
    cells,  # of a plane
    cells_reciprocal,
    cells_shift,
    CHANNELS_GRAIN: tl.constexpr,
    SAMPLE_GRAIN: tl.constexpr,
    WHOLE: tl.constexpr,  # a run ends where a fragment does
    RUN: tl.constexpr,  # planes
    PLANES: tl.constexpr,  # rounded up to a power of two
    OF_PLANE: tl.constexpr,  # fragments that begin in a plane, likewise
    FRAGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    compute = partial_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    first_channel = tl.program_id(0) * RUN
    first = chunk * samples_of_chunk
    last = tl.minimum(first + samples_of_chunk, samples)
    channel, begin, place, inside = _fragments(
        first_channel, channels, cells, cells_reciprocal, cells_shift, WHOLE, RUN, FRAGMENTS, LANES
    )
    x_ptr += first_channel.to(tl.int64) * cells
    mean = tl.zeros([FRAGMENTS, LANES], compute)
    squares = tl.zeros([FRAGMENTS, LANES], compute)
    count = first * 0
    for sample in range(first, last):
        count += 1
        source = x_ptr + (sample + first * 0).to(tl.int64) * sample_units * SAMPLE_GRAIN
        x = tl.load(source + place, mask=inside, other=0.0).to(compute)
        delta = x - mean
        mean += delta * (1.0 / count.to(compute))
        squares += delta * (x - mean)
    mean_of_plane = _sums_of_planes(mean, begin, cells, PLANES, OF_PLANE, FRAGMENTS, LANES) / tl.cast(cells, compute)
    plane = channel - first_channel
    first_mean = tl.gather(mean_of_plane, tl.minimum(plane, PLANES - 1), 0)
    next_mean = tl.gather(mean_of_plane, tl.minimum(plane + 1, PLANES - 1), 0)
    apart = mean - _of_elements(first_mean, next_mean, begin, LANES)
    squares += (last - first).to(compute) * (apart * apart)
    channel = first_channel + tl.arange(0, PLANES)
    there = (tl.arange(0, PLANES) < RUN) & (channel < channels)
    partial_ptr += chunk.to(tl.int64) * channels
    tl.store(partial_ptr + channel, mean_of_plane, mask=there)
    squares_of_plane = _sums_of_planes(squares, begin, cells, PLANES, OF_PLANE, FRAGMENTS, LANES)
    tl.store(partial_ptr + tl.cast(chunks, tl.int64) * channels + channel, squares_of_plane, mask=there)


# Of a number that is loaded alone, the scale, the alignment does not matter: it must not make another variant.
@triton.jit(do_not_specialize=["scale_ptr", *SIZES])
def run_forward_kernel(
    x_ptr,
    y_ptr,  # written
    moments_ptr,  # (3, C) in the compute type, as of finish_moments_kernel
    weight_ptr,  # (C) in the compute type
    bias_ptr,
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8
    scale_ptr,  # float64
    channel_units,
    sample_units,
    cells,
    cells_reciprocal,
    cells_shift,
    start_step,
    CHANNELS_GRAIN: tl.constexpr,
    SAMPLE_GRAIN: tl.constexpr,
    LOG_GRAIN: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    RUN: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    compute = moments_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * RUN
    channel, begin, place, inside = _fragments(
        first_channel, channels, cells, cells_reciprocal, cells_shift, WHOLE, RUN, FRAGMENTS, LANES
    )
    kept = _kept(
        starts_ptr + sample * (1 if SHARED else channels), fragments_ptr, channel, begin, channels, cells, start_step,
        LOG_GRAIN, SHARED, LANES,
    )  # fmt: skip
    first = sample * sample_units * SAMPLE_GRAIN + first_channel.to(tl.int64) * cells
    x = tl.load((x_ptr + first) + place, mask=inside, other=0.0).to(compute)
    mean, slope, bias = _affine_map(
        moments_ptr, moments_ptr + channels, weight_ptr, bias_ptr, channel, begin, channels, LANES
    )
    bn = _affine(x - mean, slope, bias)
    product = tl.where(bn <= 0.0, 0.0, bn) * tl.load(scale_ptr).to(compute)
    tl.store((y_ptr + first) + place, tl.where(kept, product, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["scale_ptr", *SIZES])
def run_sums_kernel(
    x_ptr,
    grad_ptr,
    partial_ptr,  # (2, chunks, C) in the compute type, written: sums of g and of g * (x - mean)
    mean_ptr,  # (C) in the compute type, like the next three
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    fragments_ptr,
    scale_ptr,
    samples,
    samples_of_chunk,
    chunks,
    channel_units,
    sample_units,
    cells,
    cells_reciprocal,
    cells_shift,
    start_step,
    CHANNELS_GRAIN: tl.constexpr,
    SAMPLE_GRAIN: tl.constexpr,
    LOG_GRAIN: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    OF_PLANE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    compute = partial_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    first_channel = tl.program_id(0) * RUN
    first = chunk * samples_of_chunk
    last = tl.minimum(first + samples_of_chunk, samples)
    channel, begin, place, inside = _fragments(
        first_channel, channels, cells, cells_reciprocal, cells_shift, WHOLE, RUN, FRAGMENTS, LANES
    )
    mean, slope, bias = _affine_map(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, begin, channels, LANES)
    scale = tl.load(scale_ptr).to(compute)
    of_bias = tl.zeros([FRAGMENTS, LANES], compute)
    of_weight = tl.zeros([FRAGMENTS, LANES], compute)
    for sample in range(first, last):
        wide_sample = (sample + first * 0).to(tl.int64)
        sample_first = wide_sample * sample_units * SAMPLE_GRAIN + first_channel.to(tl.int64) * cells
        kept = _kept(
            starts_ptr + wide_sample * (1 if SHARED else channels), fragments_ptr, channel, begin, channels,
            cells, start_step, LOG_GRAIN, SHARED, LANES,
        )  # fmt: skip
        x = tl.load((x_ptr + sample_first) + place, mask=inside, other=0.0).to(compute)
        grad = tl.load((grad_ptr + sample_first) + place, mask=inside, other=0.0).to(compute)
        centred, g = _gradient_of_bn(grad, x, kept, mean, slope, bias, scale)
        of_bias += g
        of_weight += g * centred
    channel = first_channel + tl.arange(0, PLANES)
    there = (tl.arange(0, PLANES) < RUN) & (channel < channels)
    partial_ptr += chunk.to(tl.int64) * channels
    bias_of_plane = _sums_of_planes(of_bias, begin, cells, PLANES, OF_PLANE, FRAGMENTS, LANES)
    weight_of_plane = _sums_of_planes(of_weight, begin, cells, PLANES, OF_PLANE, FRAGMENTS, LANES)
    tl.store(partial_ptr + channel, bias_of_plane, mask=there)
    tl.store(partial_ptr + tl.cast(chunks, tl.int64) * channels + channel, weight_of_plane, mask=there)


@triton.jit(do_not_specialize=["scale_ptr", *SIZES])
def run_backward_kernel(
    x_ptr,
    grad_ptr,
    dx_ptr,  # written
    means_ptr,  # (2, C): sums of g / size and of g * (x - mean) * rstd^2 / size
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    fragments_ptr,
    scale_ptr,
    channel_units,
    sample_units,
    cells,
    cells_reciprocal,
    cells_shift,
    start_step,
    CHANNELS_GRAIN: tl.constexpr,
    SAMPLE_GRAIN: tl.constexpr,
    LOG_GRAIN: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    RUN: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    compute = means_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * RUN
    channel, begin, place, inside = _fragments(
        first_channel, channels, cells, cells_reciprocal, cells_shift, WHOLE, RUN, FRAGMENTS, LANES
    )
    kept = _kept(
        starts_ptr + sample * (1 if SHARED else channels), fragments_ptr, channel, begin, channels, cells, start_step,
        LOG_GRAIN, SHARED, LANES,
    )  # fmt: skip
    first = sample * sample_units * SAMPLE_GRAIN + first_channel.to(tl.int64) * cells
    x = tl.load((x_ptr + first) + place, mask=inside, other=0.0).to(compute)
    grad = tl.load((grad_ptr + first) + place, mask=inside, other=0.0).to(compute)
    mean, slope, bias = _affine_map(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channel, begin, channels, LANES)
    centred, g = _gradient_of_bn(grad, x, kept, mean, slope, bias, tl.load(scale_ptr).to(compute))
    first_bias, next_bias = _of_two(means_ptr, channel, channels)
    first_weight, next_weight = _of_two(means_ptr + channels, channel, channels)
    of_bias = _of_elements(first_bias, next_bias, begin, LANES)
    of_weight = _of_elements(first_weight, next_weight, begin, LANES)
    dx = slope * (g - of_bias - centred * of_weight)
    tl.store((dx_ptr + first) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def suits(x: torch.Tensor, atlas: Atlas) -> bool:
    """Whether a dense x is one of those maps: its planes begin amid accesses, and a tile holds some that do not."""
    c, cells, lanes = x.shape[1], x.shape[2] * x.shape[3], ACCESS // x.element_size()
    # No access may touch three planes, and runs are counted along an axis of the grid that has 16 bits.
    fits = cells >= 8 and lanes // math.gcd(cells, lanes) * cells <= TILE and c < 65536
    return x.is_contiguous() and atlas.on(x.device).flat and cells % lanes != 0 and fits


def samples_of_chunk(samples: int, programs: int, least: int) -> int:
    """For so many programs a chunk, and so many samples of each of them at least."""
    chunks = min(samples, triton.cdiv(REDUCING, programs))
    return max(triton.cdiv(samples, chunks), min(samples, least))


class RunPlan:
    """How x is cut into runs of planes, and the launches; as `TilePlan` of batch_norm_triton.py."""

    def __init__(self, x: torch.Tensor, atlas: Atlas) -> None:
        n, c, height, width = x.shape
        cells, lanes = height * width, ACCESS // x.element_size()
        whole = lanes // math.gcd(cells, lanes)  # planes that begin and end where accesses do
        run = whole * min(TILE // (whole * cells), triton.cdiv(c, whole))
        tile = triton.next_power_of_2(run * cells)
        self.runs = triton.cdiv(c, run)
        self.samples = n
        self.samples_of_chunk = samples_of_chunk(n, self.runs, TURNS)
        self.chunks = triton.cdiv(n, self.samples_of_chunk)
        self.fragments, grain = atlas.on(x.device).fragments_of(lanes)
        channels_grain, sample_grain = math.gcd(c, 16), math.gcd(c * cells, 16)
        self.sizes = (c // channels_grain, c * cells // sample_grain, *divisor(cells))
        self.start_step = width // grain
        self.shape: dict[str, Any] = {
            "CHANNELS_GRAIN": channels_grain, "SAMPLE_GRAIN": sample_grain, "WHOLE": c * cells % lanes == 0,
            "RUN": run, "FRAGMENTS": tile // lanes, "LANES": lanes, "num_warps": max(1, tile // (32 * THREAD)),
        }  # fmt: skip
        self.planes: dict[str, Any] = {
            "PLANES": triton.next_power_of_2(run),
            "OF_PLANE": triton.next_power_of_2(triton.cdiv(cells, lanes)),
        }
        self.mask: dict[str, Any] = {"LOG_GRAIN": grain.bit_length() - 1}

    def moments(self, x: torch.Tensor, partial: torch.Tensor) -> None:
        run_moments_kernel[(self.runs, self.chunks)](
            x, partial, self.samples, self.samples_of_chunk, self.chunks, *self.sizes, **self.shape, **self.planes
        )

    def forward(self, *tensors: torch.Tensor) -> None:
        """x, y, moments, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        run_forward_kernel[(self.samples, self.runs)](
            *of_elements, starts, self.fragments, scale, *self.sizes, self.start_step,
            SHARED=starts.shape[1] == 1, **self.mask, **self.shape,
        )  # fmt: skip

    def sums(self, *tensors: torch.Tensor) -> None:
        """x, grad, partial, mean, rstd, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        run_sums_kernel[(self.runs, self.chunks)](
            *of_elements, starts, self.fragments, scale, self.samples, self.samples_of_chunk, self.chunks,
            *self.sizes, self.start_step, SHARED=starts.shape[1] == 1, **self.mask, **self.shape, **self.planes,
        )  # fmt: skip

    def backward(self, *tensors: torch.Tensor) -> None:
        """x, grad, dx, means, mean, rstd, weight, bias, starts, scale."""
        *of_elements, starts, scale = tensors
        run_backward_kernel[(self.samples, self.runs)](
            *of_elements, starts, self.fragments, scale, *self.sizes, self.start_step,
            SHARED=starts.shape[1] == 1, **self.mask, **self.shape,
        )  # fmt: skip
