"""DropBlock (Ghiasi et al. 2018) that delivers the rate asked for: square blocks, their number a Poisson variable.

    y = x * kept * scale,    kept = outside all blocks of the plane

A block of b_h x b_w cells, `b = min(block_size, side)` on each axis, lies wholly inside the map; its top-left corner is
uniform over M = (H-b_h+1) * (W-b_w+1) positions. A plane gets K ~ Poisson(lambda) blocks, placed independently. Then a
cell that k positions cover stays with probability exp(-lambda * k / M), and lambda is the root of

    mean over the cells of (1 - exp(-lambda * k(cell) / M)) = rate

(docs/dropblock.md derives this, and why it is the same as independent corners.)

The bits (our choice, frozen by golden vectors in the tests):

- lambda is rounded to 24 significant decimal digits, half to even. `t_k = floor(P(K <= k) * 2^32 + 1/2)` for that
  lambda, in exact decimal arithmetic. A rate below 2^-80 counts as 0.
- With channel = 0 for `share_c`: word 0 of Philox with counter (channel, 0, n, rank) gives K, the number of t_k <= word.
- Block j = 0..K-1 takes words `2 * (j mod 2)` and `2 * (j mod 2) + 1` of counter (channel, 1 + j div 2, n, rank):
  `top = (word * (H-b_h+1)) >> 32`, `left = (word' * (W-b_w+1)) >> 32`.

One pass reads and writes x; the mask is drawn again in backward, never saved. This route draws corners into a map of
bytes, dilates it, and works on slices of planes so that its temporaries stay within a few megabytes.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .masking import NORMALIZE
from .masking import SLICE_CELLS
from .masking import boxes
from .masking import check_activation
from .masking import check_choice
from .masking import check_fields
from .masking import check_real
from .masking import scale_of_mask
from .masking import write_masked
from .philox import below
from .philox import philox
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed

FIELDS = ("rate", "block_size")
MAX_RATE = 0.95
MAX_BLOCK = 2**31 - 1

# Decimal's exp is correctly rounded, so every machine finds the same digits. A rate of 2^-80 costs 24 of the 72 by
# cancellation; the rest is twice what lambda keeps.
CONTEXT = decimal.Context(
    prec=72,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    traps=[decimal.InvalidOperation],
)
LAMBDA_DIGITS = 24
SMALLEST_RATE = 2.0**-80


def block_dropout(
    x: torch.Tensor,
    fields: tuple[float, int] | torch.Tensor,
    seed: Seed = None,
    share_c: bool = False,
    normalize: str = "expected",
    rank: int | None = None,
) -> torch.Tensor:
    """Drops square blocks so that the expected dropped share is `rate`, and scales the rest.

    Args:
        x: activation (N, C, H, W); float64, float32, float16 or bfloat16.
        fields: (rate, block_size), Python numbers or a float64 CPU tensor of shape (2,). The rate is in [0, 0.95], the
            block size a whole number of cells >= 1, clipped on each axis to the map. Other values in the tensor
            recompile nothing.
        seed: integer in [-2^63, 2^64), or a 0-d int64 tensor on x's device; None draws one from PyTorch's default
            generator of that device.
        share_c: the same blocks for all channels of a sample, instead of their own for each.
        normalize: `"expected"` scales by 1 / (1 - rate), `"mask"` by Size / Sum of the mask drawn (0 if everything is
            dropped), `"none"` by 1.
        rank: counter word 3 in [0, 2^32); None is the global rank under `torch.distributed`, else 0.

    Returns:
        A tensor with x's shape, dtype and memory format. The scale is a float64, rounded once to float32 (kept for
        float64 x), where the product is formed and then cast. Dropped cells are 0, whatever x holds there.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it. A number out of range in a
            tensor is found when the op runs.
    """
    check_activation(x)
    check_choice("normalize", normalize, NORMALIZE)
    if not isinstance(share_c, bool):
        raise TypeError(f"share_c must be a bool, got {share_c!r} of type {type(share_c).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if isinstance(fields, torch.Tensor):
        check_fields(fields, FIELDS)
    elif not isinstance(fields, Sequence) or len(fields) != 2:
        raise TypeError(f"fields must be (rate, block_size) or a float64 CPU tensor of shape (2,), got {fields!r}")
    else:
        fields = torch.tensor(_check_values(*fields), dtype=torch.float64, device="cpu")
    seed = as_seed(seed, x.device)
    rank = as_rank(rank)
    scale = torch.ops.autodropout.block_scale(fields, seed, x.shape, share_c, normalize, rank)
    y: torch.Tensor = torch.ops.autodropout.block_apply(x, fields, seed, scale, share_c, rank)
    return y


def _check_values(rate: object, block_size: object) -> tuple[float, float]:
    rate, side = check_real("rate", rate, 0, MAX_RATE), check_real("block_size", block_size, 1, MAX_BLOCK)
    if side != int(side):
        raise ValueError(f"block_size must be a whole number, got {side}")
    return rate, side


class Geometry:
    """Blocks on one map: their size, their positions, and the distribution of their number.

    Attributes:
        block: (b_h, b_w), sides of a block in cells.
        positions: (H-b_h+1, W-b_w+1), positions of the top-left corner.
        mean: lambda, the expected number of blocks of a plane.
        thresholds: int64 tensor on the CPU, t_k for k = 0, 1, ..., all below 2^32; empty when no block is ever drawn.
    """

    def __init__(self, rate: float, block_size: int, height: int, width: int) -> None:
        self.block = min(block_size, height), min(block_size, width)
        self.positions = height - self.block[0] + 1, width - self.block[1] + 1
        with decimal.localcontext(CONTEXT):
            self.mean = _solve(rate, self.block, (height, width))
            self.thresholds = torch.tensor(_poisson_thresholds(self.mean), dtype=torch.int64, device="cpu")
        self._on_device = {torch.device("cpu"): self.thresholds}

    def thresholds_on(self, device: torch.device) -> torch.Tensor:
        """The thresholds on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.thresholds.to(device)
        return self._on_device[device]


@lru_cache(maxsize=256)
def geometry(rate: float, block_size: float, height: int, width: int) -> Geometry:
    """The geometry of blocks of a requested rate and size on a map of height x width cells (each >= 1), cached.

    Raises:
        TypeError, ValueError: a value is out of its range; the message names it.
    """
    rate, block_size = _check_values(rate, block_size)
    return Geometry(rate, int(block_size), height, width)


def _covers(block: int, side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Positions on one axis that cover a cell: the distinct numbers, and the number of cells of each."""
    cell = np.arange(side, dtype=np.int64)
    return np.unique(np.minimum(cell, side - block) - np.maximum(0, cell - block + 1) + 1, return_counts=True)


def _solve(rate: float, block: tuple[int, int], sides: tuple[int, int]) -> Decimal:
    """lambda: the root of  sum over the cells of (1 - exp(-lambda k / M)) = rate * H * W,  k positions covering a cell.

    The left side grows and is concave in lambda, so Newton's method from 0 approaches the root from below. It runs in
    floats first; two steps or so in decimal double the digits each.
    """
    if rate < SMALLEST_RATE:
        return Decimal(0)
    (kh, mh), (kw, mw) = (_covers(b, side) for b, side in zip(block, sides, strict=True))
    k, inverse = np.unique(np.outer(kh, kw), return_inverse=True)
    cells = np.zeros(len(k), dtype=np.int64)
    np.add.at(cells, inverse.reshape(-1), np.outer(mh, mw).reshape(-1))
    positions = math.prod(side - b + 1 for b, side in zip(block, sides, strict=True))
    size = math.prod(sides)

    share = k / positions
    start = 0.0
    for _ in range(200):
        missing = size * rate + float((cells * np.expm1(-start * share)).sum())
        step = missing / float((cells * share * np.exp(-start * share)).sum())
        start += step
        if step <= 1e-12 * start:
            break

    exact, root = Decimal(rate), Decimal(start)
    counts = [(Decimal(m), Decimal(covers) / positions) for covers, m in zip(k.tolist(), cells.tolist(), strict=True)]
    for _ in range(20):
        kept = [(m * (-root * covers).exp(), covers) for m, covers in counts]
        missing_exact = sum((m for m, _ in kept), Decimal(0)) - size + size * exact
        change = missing_exact / sum((m * covers for m, covers in kept), Decimal(0))
        root += change
        if abs(change) <= root.scaleb(-40):
            break
    return decimal.Context(prec=LAMBDA_DIGITS, rounding=decimal.ROUND_HALF_EVEN).plus(root)


def _poisson_thresholds(mean: Decimal) -> list[int]:
    """floor(P(K <= k) * 2^32 + 1/2) for k = 0, 1, ..., while below 2^32."""
    thresholds = []
    term = total = (-mean).exp()
    while (threshold := math.floor(total * 2**32 + Decimal("0.5"))) < 2**32:
        thresholds.append(threshold)
        term = term * mean / len(thresholds)
        total += term
    return thresholds


def _dropped(
    shape: Sequence[int], fields: torch.Tensor, seed: torch.Tensor, share_c: bool, rank: int
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """The mask slice by slice: (samples, channels) of x, and a bool tensor, True = dropped, broadcasting to it."""
    check_fields(fields, FIELDS)
    N, C, H, W = shape
    if 0 in shape:
        _check_values(*fields.tolist())
        return
    blocks = geometry(*fields.tolist(), H, W)
    for samples, *rest in boxes((N, C), max(1, SLICE_CELLS // (H * W))):
        channels = rest[0] if rest else slice(0, C)
        drawn = slice(0, 1) if share_c else channels
        yield (samples, channels), _draw(blocks, H, W, samples, drawn, seed, rank)


def _draw(
    blocks: Geometry, H: int, W: int, samples: slice, channels: slice, seed: torch.Tensor, rank: int
) -> torch.Tensor:
    """The dropped cells of some planes: bool (samples, channels, H, W)."""
    sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None]
    channel = torch.arange(channels.start, channels.stop, device=seed.device)[None]
    n, c = sample.shape[0], channel.shape[1]
    planes = n * c
    corners = torch.zeros(planes * H * W + 1, dtype=torch.uint8, device=seed.device)  # one more: where no block goes
    thresholds = blocks.thresholds_on(seed.device)
    if len(thresholds):
        word = philox(channel, 0, sample, rank, seed)[0]
        number = torch.searchsorted(thresholds, word.reshape(-1), right=True)
        # Two blocks share a call of Philox. On the CPU the calls that are needed are listed; elsewhere that would wait
        # for the device, so every plane makes as many as the longest list could need.
        if seed.device.type == "cpu":
            calls = (number + 1) >> 1
            plane = torch.repeat_interleave(calls)
            call = torch.arange(plane.shape[0]) - (calls.cumsum(0) - calls)[plane]
        else:
            most = (len(thresholds) + 1) // 2
            plane = torch.arange(planes, device=seed.device).repeat_interleave(most, output_size=planes * most)
            call = torch.arange(most, device=seed.device).repeat(planes)
        words = philox(channels.start + plane % c, 1 + call, samples.start + plane // c, rank, seed)
        for j in (0, 1):
            top, left = (below(w, p) for w, p in zip(words[2 * j : 2 * j + 2], blocks.positions, strict=True))
            there = 2 * call + j < number[plane]
            corners[torch.where(there, (plane * H + top) * W + left, planes * H * W)] = 1
    grid = corners[:-1].view(planes, H, W)
    for axis, b in zip((1, 2), blocks.block, strict=True):
        grid = _dilate(grid, axis, b)
    return grid.view(torch.bool).view(n, c, H, W)


def _dilate(grid: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Every 1 spreads over the `block` cells that begin with it; runs double, so that it takes log2(block) passes."""
    run = 1
    while run < block:
        shift = min(run, block - run)
        spread = grid.clone()
        spread.narrow(axis, shift, grid.shape[axis] - shift).bitwise_or_(grid.narrow(axis, 0, grid.shape[axis] - shift))
        grid, run = spread, run + shift
    return grid


def _scale(
    fields: torch.Tensor, seed: torch.Tensor, shape: Sequence[int], share_c: bool, normalize: str, rank: int
) -> torch.Tensor:
    check_fields(fields, FIELDS)
    rate, _ = _check_values(*fields.tolist())
    if normalize == "mask":
        size = math.prod(shape)
        dropped = torch.zeros((), dtype=torch.int64, device=seed.device)
        for (_, channels), part in _dropped(shape, fields, seed, share_c, rank):
            dropped += part.sum() * ((channels.stop - channels.start) // part.shape[1])
        return scale_of_mask(size, size - dropped)
    value = 1 / (1 - rate) if normalize == "expected" else 1.0
    return torch.full((), value, dtype=torch.float64, device=seed.device)


def _apply(
    x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor, scale: torch.Tensor, share_c: bool, rank: int
) -> torch.Tensor:
    y = torch.empty_like(x)
    for box, dropped in _dropped(x.shape, fields, seed, share_c, rank):
        write_masked(y[box], x[box], scale, dropped)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, fields, seed, scale, share_c, rank = inputs
    ctx.save_for_backward(fields, seed, scale)
    ctx.share_c, ctx.rank = share_c, rank


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The op is its own adjoint."""
    fields, seed, scale = ctx.saved_tensors
    return torch.ops.autodropout.block_apply(grad, fields, seed, scale, ctx.share_c, ctx.rank), *([None] * 5)


register_op(
    "block_scale(Tensor fields, Tensor seed, SymInt[] shape, bool share_c, str normalize, SymInt rank) -> Tensor",
    _scale,
    lambda fields, seed, shape, share_c, normalize, rank: seed.new_empty((), dtype=torch.float64),
)
register_op(
    "block_apply(Tensor x, Tensor fields, Tensor seed, Tensor scale, bool share_c, SymInt rank) -> Tensor",
    _apply,
    lambda x, fields, seed, scale, share_c, rank: torch.empty_like(x),
    setup_context=_setup_context,
    backward=_backward,
)
