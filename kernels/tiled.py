"""Tiled pattern dropout: the pattern of the paper on maps (N, C, H, W) and on sequences (N, C, L), as two ops.

`tiled_draw` turns the seed into one placement per plane (per sample if channels share) and the scale: it reads no
activation. `tiled_apply` multiplies an activation by the mask of these placements. It is linear and self-adjoint, so
the same op is its own backward, and what is saved for it are the placements and the scale, 4 bytes a plane.

Counter layout (Philox4x32-10): (channel or 0, 0, sample, rank); word 0 gives the row of the centre, word 1 its column.

A sequence is a map with one axis (our definition, frozen by golden vectors): word 1 places the centre `cx` with n = L,
word 0 is not used; position t is dropped when `u = t - cx + floor(extent / 2)` lies in a tile, with tile, gap, extent
and unlimited repeat as for the columns of a map of width L. Turning and shearing need two axes and must be 0.

Bytes moved per element: one read and one write of the activation. On the GPU the kernels of tiled_triton.py run, on
the CPU the loops of tiled_numba.py where Numba is installed. Without it the mask of a plane is one row of a small table
(`Atlas.kept_flat`), gathered straight into the output and multiplied there. Any other device takes the plain PyTorch
twin below.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from .atlas import Atlas
from .atlas import atlas_of
from .checks import check_activation
from .compiled import has_numba
from .compiled import is_dense
from .devices import triton_runs_on
from .masking import compute_type
from .masking import is_finite
from .placements import as_tensors
from .placements import drawn
from .placements import fields_of
from .seeds import Seed
from .seeds import as_number
from .seeds import as_rank
from .seeds import as_seed
from .self_adjoint import Apply
from .self_adjoint import register_self_adjoint
from .unwatched import is_differentiated
from .unwatched import is_unwatched

# Cells of mask in memory at a time where they cannot be gathered into the output: so many, or one in 64 of a large
# output.
MASKED_AT_ONCE = 1 << 17
MASKED_SHARE = 64

# Cells between the masks there, which are read across: rows of 4,096 bytes, a map of 32x32, begin in the same few
# places of the cache (docs/cpu-speed.md).
GAP = 32


def tiled_dropout(
    x: torch.Tensor,
    atlas: Atlas | torch.Tensor,
    seed: Seed = None,
    share_c: bool = False,
    normalize: str = "mask",
    rank: int | None = None,
) -> torch.Tensor:
    """Drops the tiles of a pattern, placed at random, and scales the rest: `x * mask * scale` (Pham & Le 2021).

    Args:
        x: (N, C, H, W) or (N, C, L), float64, float32, float16 or bfloat16.
        atlas: the pattern on maps of H x W or sequences of L, from `TiledPattern.atlas`, `Atlas.of` or
            `Atlas.of_sequence`; or its fields as a float64 CPU tensor (size, stride, repeat, rotate, shear_x,
            shear_y), whose values may change without recompilation.
        seed: None (one is drawn from PyTorch's generator), an int in [-2^63, 2^64), or a 0-d int64 tensor
            on x's device.
        share_c: one placement per sample instead of one per sample and channel.
        normalize: "mask" scales by Size(m) / Sum(m) over the whole mask of the call (the paper); "expected" by
            1 / (1 - exact expected rate), which does not couple the samples of a batch; "none" by 1.
        rank: counter word 3; None is the global rank under torch.distributed, else 0.

    Returns:
        Tensor with x's shape, dtype and memory format. The product is computed in float32 (float64 for float64) and
        cast; dropped cells are 0 whatever they held; if everything is dropped all is 0. Bits as in docs/definitions.md.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """
    check_activation(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have 4 dimensions (N, C, H, W) or 3 (N, C, L), got shape {tuple(x.shape)}")
    fields, rank = fields_of(x, atlas, share_c, normalize), as_rank(rank)
    n, c, *sides = x.shape
    if is_unwatched((x, atlas, seed)) and _in_loops(x):
        others = atlas_of(fields, sides), 1 if share_c else c, normalize, as_number(seed), rank
        y: torch.Tensor = _AtOnce.apply(x, fields, *others) if is_differentiated(x) else _loops().drop(x, *others)[0]
        return y
    return _differentiable(x, fields, *drawn(fields, as_seed(seed, x.device), n, c, sides, share_c, normalize, rank))


# ---- draw and apply, for eager code on the CPU at which nothing looks on (unwatched.py) ------------------------------


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fields: torch.Tensor, *others: Any) -> torch.Tensor:
        y: torch.Tensor
        y, starts, scale = _loops().drop(x, *others)
        ctx.save_for_backward(fields, *as_tensors(starts, scale))
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _differentiable(grad, *ctx.saved_tensors), *[None] * 6


@lru_cache(maxsize=1)
def _loops() -> Any:
    from . import tiled_numba

    return tiled_numba


def _in_loops(x: torch.Tensor) -> bool:
    return x.is_cpu and x.numel() > 0 and is_dense(x) and has_numba()


# ---- apply: the masked product -------------------------------------------------------------------------------------


def _apply(x: torch.Tensor, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    atlas = atlas_of(fields, x.shape[2:])
    if x.dim() == 3:
        # Not a view of the map, which autograd lets nobody change in place.
        return _apply_on_maps(x.unsqueeze(2), atlas, starts, scale).squeeze_(2)
    return _apply_on_maps(x, atlas, starts, scale)


def _apply_on_maps(x: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if triton_runs_on(x):
        from . import tiled_triton

        with torch.cuda.device(x.device):
            return tiled_triton.apply(x, atlas, starts, scale)
    if x.is_cpu:
        return _apply_on_cpu(x, atlas, starts, scale)
    return apply_reference(x, atlas, starts, scale)


def apply_reference(x: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The plain PyTorch twin: the whole mask, one product, one select. For devices without a kernel, and to read."""
    compute = compute_type(x)
    product = (x.to(compute) * scale.to(compute)).to(x.dtype)
    kept = kept_windows(atlas, starts)
    return torch.where(kept, product, torch.zeros((), dtype=x.dtype, device=x.device))


def kept_windows(atlas: Atlas, starts: torch.Tensor) -> torch.Tensor:
    """The masks of these placements: bool (*starts.shape, H, W), True = kept, on the device of starts."""
    height, width = atlas.height, atlas.width
    kept = ~torch.from_numpy(atlas.dropped).to(starts.device)
    first_row = (starts % (2 * height - 1))[..., None, None]
    first_column = (width - 1 - starts // (2 * height - 1))[..., None, None]
    rows = torch.arange(height, device=starts.device)[:, None]
    columns = torch.arange(width, device=starts.device)
    return kept[first_row + rows, first_column + columns]


def _apply_on_cpu(x: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    factor = scale.item()
    if _in_loops(x):
        _loops().apply(x, y, atlas, starts.numpy(), factor)
        return y
    # In 16 bits the mask cannot carry the scale without rounding it: it multiplies by 0 and 1, the scale follows.
    carries_scale = x.dtype == compute_type(x)
    flat = atlas.kept_flat
    if flat is None:
        _mask_planes(x, y, atlas, starts, factor if carries_scale else 1.0)
    else:
        table = flat.to(x.dtype)
        if carries_scale:
            table.mul_(factor)
        # Row `start` is the window that begins in cell start * W. The rows overlap; nothing is written to them.
        rows = table.as_strided((w * (2 * h - 1) - h + 1, h * w), (w, 1))
        if starts.shape[1] != c or c == 1:
            mask = rows.index_select(0, starts.reshape(-1)).view(n, 1, h, w)
            torch.mul(x, mask, out=y)
        elif x.is_contiguous():
            masked = y.view(n * c, h * w)
            torch.index_select(rows, 0, starts.view(-1), out=masked)
            masked.mul_(x.view(n * c, h * w))
        else:
            with_gap = torch.cat((table, table.new_zeros(GAP))).as_strided((len(rows), h * w + GAP), (w, 1))
            for part, select in _parts(starts, h * w):
                mask = with_gap.index_select(0, part.reshape(-1))[:, : h * w].view(*part.shape, h, w)
                y[select].copy_(mask)
                y[select].mul_(x[select])
    if not carries_scale and factor != 1.0:
        y.mul_(factor)
    # 0 * NaN is NaN: only then is a select needed.
    if not is_finite(y):
        for part, select in _parts(starts, h * w):
            y[select].masked_fill_(~kept_windows(atlas, part), 0.0)
    return y


def _parts(starts: torch.Tensor, cells: int) -> Iterator[tuple[torch.Tensor, tuple[slice, slice]]]:
    """Slices of samples and channels whose masks take a bounded amount of memory."""
    n, planes = starts.shape
    at_once = max(1, MASKED_AT_ONCE // cells, n * planes // MASKED_SHARE)
    samples, channels = max(1, at_once // planes), min(planes, at_once)
    for first in range(0, n, samples):
        for channel in range(0, planes, channels):
            part = starts[first : first + samples, channel : channel + channels]
            of_channels = slice(channel, channel + channels) if planes > 1 else slice(None)
            yield part, (slice(first, first + samples), of_channels)


def _mask_planes(x: torch.Tensor, y: torch.Tensor, atlas: Atlas, starts: torch.Tensor, factor: float) -> None:
    """Maps whose table would be too large: one window of the atlas after the other, each a view."""
    height, width = atlas.height, atlas.width
    kept = torch.from_numpy(~atlas.dropped).to(x.dtype).mul_(factor)
    shared = starts.shape[1] != x.shape[1] or x.shape[1] == 1
    for sample, row in enumerate(starts.tolist()):
        for channel, start in enumerate(row):
            column, top = divmod(start, 2 * height - 1)
            left = width - 1 - column
            window = kept[top : top + height, left : left + width]
            plane = (sample,) if shared else (sample, channel)
            torch.mul(x[plane], window, out=y[plane])


# ---- registration --------------------------------------------------------------------------------------------------


def _over_batch(
    apply: Apply, x: torch.Tensor, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The batch becomes samples. Every element gets the same mask: the placements were drawn once, outside it."""
    return apply(x.flatten(0, 1), fields, starts.repeat(x.shape[0], 1), scale).view(x.shape)


_differentiable = register_self_adjoint(
    "tiled_apply(Tensor x, Tensor fields, Tensor starts, Tensor scale) -> Tensor",
    _apply,
    _over_batch,
)
