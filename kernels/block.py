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
- With channel = 0 for `share_c`: word 0 of Philox with counter (channel, 0, n, rank) gives K, the count of t_k <= word.
- Block j = 0..K-1 takes words `2 * (j mod 2)` and `2 * (j mod 2) + 1` of counter (channel, 1 + j div 2, n, rank):
  `top = (word * (H-b_h+1)) >> 32`, `left = (word' * (W-b_w+1)) >> 32`.

One pass reads and writes x; the mask is drawn again in backward, never saved. On the GPU the kernels of
block_triton.py run, on the CPU the loops of block_numba.py where Numba is installed. Without it few blocks are written
as zeros into the product, row by row. Many blocks, and any other device, take the route that draws corners into a map
of bytes and dilates it, on slices of planes so that its temporaries stay within a few megabytes.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any
from typing import NamedTuple

import numpy as np
import torch

from .checks import NORMALIZE
from .checks import check_choice
from .checks import check_fields
from .checks import check_flag
from .checks import check_maps
from .checks import check_real
from .compiled import has_numba
from .compiled import is_dense
from .devices import triton_runs_on
from .masking import SLICE_CELLS
from .masking import boxes
from .masking import compute_type
from .masking import host_scalar
from .masking import scale_of_counts
from .masking import scale_of_mask
from .masking import write_masked
from .masking import write_product
from .philox import below
from .philox import philox
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .self_adjoint import register_self_adjoint

FIELDS = ("rate", "block_size")
MAX_RATE = 0.95
MAX_BLOCK = 2**31 - 1

# Work at a time: cells of a mask (a byte each, two copies), planes and blocks of a draw (48 bytes each in Philox).
DILATED_CELLS = 1 << 21
PLANES_AT_ONCE = 1 << 17
BLOCKS_AT_ONCE = 1 << 16

# Below this expected number of dropped cells per cell, overlaps counted, blocks are written to the output one by one.
SPARSE = 0.5

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
    check_maps(x)
    check_choice("normalize", normalize, NORMALIZE)
    check_flag("share_c", share_c)
    if isinstance(fields, torch.Tensor):
        check_fields(fields, FIELDS)
    elif not isinstance(fields, Sequence) or len(fields) != 2:
        raise TypeError(f"fields must be (rate, block_size) or a float64 CPU tensor of shape (2,), got {fields!r}")
    else:
        fields = torch.tensor(check_values(*fields), dtype=torch.float64, device="cpu")
    seed = as_seed(seed, x.device)
    rank = as_rank(rank)
    scale = _scale_of(fields, seed, x.shape, share_c, normalize, rank)
    return _differentiable(x, fields, seed, scale, share_c, rank)


def check_values(rate: object, block_size: object) -> tuple[float, float]:
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

    def planes_at_once(self, limit: int) -> int:
        """Planes to draw at a time, at least one: `limit`, or fewer so that their blocks do not grow too many."""
        return max(1, min(limit, PLANES_AT_ONCE, BLOCKS_AT_ONCE // (int(self.mean) + 1)))


@lru_cache(maxsize=256)
def geometry(rate: float, block_size: float, height: int, width: int) -> Geometry:
    """The geometry of blocks of a requested rate and size on a map of height x width cells (each >= 1), cached.

    Raises:
        TypeError, ValueError: a value is out of its range; the message names it.
    """
    rate, block_size = check_values(rate, block_size)
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


class Blocks(NamedTuple):
    """The blocks of some planes, one entry each.

    Attributes:
        there: bool; False for a block that is not drawn (lists are padded where counting would wait for the device).
        sample, channel: int64, the plane, in x.
        top, left: int64, the corner.
    """

    there: torch.Tensor
    sample: torch.Tensor
    channel: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor


def _draw(
    blocks: Geometry, samples: slice, channels: slice, seed: torch.Tensor, rank: int, listed: bool | None = None
) -> Blocks:
    """All blocks of the planes `samples` x `channels`.

    Two blocks share a call of Philox. On the CPU the calls that are needed are listed. Elsewhere that would wait for
    the device, so every plane makes as many as the most blocks could need. (`listed` says which, for tests.)
    """
    device = seed.device
    sample = torch.arange(samples.start, samples.stop, device=device)[:, None]
    channel = torch.arange(channels.start, channels.stop, device=device)[None]
    thresholds = blocks.thresholds_on(device)
    word = philox(channel, 0, sample, rank, seed)[0].reshape(-1)
    if listed is None:
        listed = device.type == "cpu"
    if listed:
        # Small maps have no block on most planes, and what follows costs as much as Philox for every plane.
        plane = (word >= thresholds[0]).nonzero().reshape(-1)
        number = torch.searchsorted(thresholds, word[plane], right=True)
        calls = (number + 1) >> 1
        which = torch.repeat_interleave(calls)
        call = torch.arange(which.shape[0]) - (calls.cumsum(0) - calls)[which]
        plane, number = plane[which], number[which]
    else:
        most = (len(thresholds) + 1) // 2
        planes = word.shape[0]
        plane = torch.arange(planes, device=device).repeat_interleave(most, output_size=planes * most)
        call = torch.arange(most, device=device).repeat(planes)
        number = torch.searchsorted(thresholds, word, right=True)[plane]
    width = channels.stop - channels.start
    sample, channel = samples.start + plane // width, channels.start + plane % width
    words = philox(channel, 1 + call, sample, rank, seed)
    tops, lefts = blocks.positions
    pairs = Blocks(
        torch.stack([2 * call + j < number for j in (0, 1)]),
        sample.expand(2, -1),
        channel.expand(2, -1),
        torch.stack([below(words[0], tops), below(words[2], tops)]),
        torch.stack([below(words[1], lefts), below(words[3], lefts)]),
    )
    if listed:
        return Blocks(*(values[pairs.there] for values in pairs))
    return Blocks(*(values.reshape(-1) for values in pairs))


def _dropped(
    shape: Sequence[int], blocks: Geometry, seed: torch.Tensor, share_c: bool, rank: int
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """The mask slice by slice: (samples, channels) of x, and a bool tensor, True = dropped, broadcasting to it."""
    N, C, H, W = shape
    cells = H * W * (C if share_c else 1)
    for samples, *rest in boxes((N,) if share_c else (N, C), blocks.planes_at_once(DILATED_CELLS // cells)):
        channels = rest[0] if rest else slice(0, C)
        drawn = slice(0, 1) if share_c else channels
        planes = samples.stop - samples.start, drawn.stop - drawn.start
        dropped = torch.zeros(math.prod(planes) * H * W + 1, dtype=torch.uint8, device=seed.device)
        if len(blocks.thresholds):
            there, sample, channel, top, left = _draw(blocks, samples, drawn, seed, rank)
            plane = (sample - samples.start) * planes[1] + channel - drawn.start
            dropped[torch.where(there, (plane * H + top) * W + left, -1)] = 1  # the last byte is where no block goes
        yield (samples, channels), _dilate(dropped[:-1], W, blocks.block).view(torch.bool).view(*planes, H, W)


def _dilate(corners: torch.Tensor, width: int, block: tuple[int, int]) -> torch.Tensor:
    """Every 1 of the flat maps spreads over its block; runs double, so an axis takes log2(side) passes.

    Blocks lie inside their maps, so that nothing spreads past the end of a row or of a map.
    """
    for pitch, side in zip((width, 1), block, strict=True):
        run = 1
        while run < side:
            shift = min(run, side - run)
            spread = corners.clone()
            spread[shift * pitch :].bitwise_or_(corners[: len(corners) - shift * pitch])
            corners, run = spread, run + shift
    return corners


def _scale(
    fields: torch.Tensor, seed: torch.Tensor, shape: Sequence[int], share_c: bool, normalize: str, rank: int
) -> torch.Tensor:
    check_fields(fields, FIELDS)
    rate, block_size = check_values(*fields.tolist())
    if normalize == "mask":
        dropped = torch.zeros((), dtype=torch.int64, device=seed.device)
        size = math.prod(shape)
        if size:
            blocks = geometry(rate, block_size, shape[2], shape[3])
            if triton_runs_on(seed):
                from . import block_triton

                n, c, height, width = shape
                with torch.cuda.device(seed.device):  # Triton launches on the current device
                    return block_triton.mask_scale((n, c, height, width), blocks, seed, share_c, rank)
            if seed.is_cpu and has_numba():
                from . import block_numba

                counted = block_numba.count_dropped(shape, blocks, int(seed), share_c, rank)
                return host_scalar(scale_of_counts(size, counted))
            for _, part in _dropped(shape, blocks, seed, share_c, rank):
                dropped += torch.count_nonzero(part)
        return scale_of_mask(size, size - dropped * (shape[1] if share_c else 1))
    value = 1 / (1 - rate) if normalize == "expected" else 1.0
    return torch.full((), value, dtype=torch.float64, device=seed.device)


def _apply(
    x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor, scale: torch.Tensor, share_c: bool, rank: int
) -> torch.Tensor:
    check_fields(fields, FIELDS)
    rate, block_size = check_values(*fields.tolist())
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    H, W = x.shape[2:]
    blocks = geometry(rate, block_size, H, W)
    if triton_runs_on(x):
        from . import block_triton

        with torch.cuda.device(x.device):
            return block_triton.apply(x, blocks, seed, scale, share_c, rank)
    if x.is_cpu and has_numba() and is_dense(x):
        from . import block_numba

        block_numba.apply(x, y, blocks, int(seed), scale.item(), share_c, rank)
        return y
    if x.is_cpu and not share_c and float(blocks.mean) * math.prod(blocks.block) < SPARSE * H * W:
        _apply_sparse(y, x, blocks, seed, scale, rank)
    else:
        for box, dropped in _dropped(x.shape, blocks, seed, share_c, rank):
            write_masked(y[box], x[box], scale, dropped)
    return y


def _apply_sparse(
    y: torch.Tensor, x: torch.Tensor, blocks: Geometry, seed: torch.Tensor, scale: torch.Tensor, rank: int
) -> None:
    """Few blocks, on the CPU: a product without a mask, then zeros written row by row of a block, where they lie.

    A row of a block is an entry of an overlapping view, of its length and with its stride, that begins in every cell.
    """
    write_product(y, x, scale.to(compute_type(x)))
    if not len(blocks.thresholds):
        return
    height, width = blocks.block
    rows = torch.arange(height) * y.stride(2)
    # empty_like leaves no gaps, so every place in memory is a cell.
    runs = y.as_strided((y.numel() - (width - 1) * y.stride(3), width), (1, y.stride(3)))
    at_once = max(1, SLICE_CELLS // height)
    for samples, *rest in boxes(x.shape[:2], blocks.planes_at_once(PLANES_AT_ONCE)):
        _, *place = _draw(blocks, samples, rest[0] if rest else slice(0, x.shape[1]), seed, rank)
        corner = sum((value * stride for value, stride in zip(place, y.stride(), strict=True)), torch.tensor(0))
        for first in range(0, len(corner), at_once):
            runs.index_fill_(0, (corner[first : first + at_once, None] + rows).reshape(-1), 0.0)


_scale_of = register_op(
    "block_scale(Tensor fields, Tensor seed, SymInt[] shape, bool share_c, str normalize, SymInt rank) -> Tensor",
    _scale,
    lambda fields, seed, shape, share_c, normalize, rank: seed.new_empty((), dtype=torch.float64),
)
_differentiable = register_self_adjoint(
    "block_apply(Tensor x, Tensor fields, Tensor seed, Tensor scale, bool share_c, SymInt rank) -> Tensor",
    _apply,
)
