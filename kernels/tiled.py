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

import math
from collections.abc import Iterator
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from .atlas import Atlas
from .atlas import atlas_of
from .atlas import check_atlas_fields
from .checks import NORMALIZE
from .checks import check_activation
from .checks import check_choice
from .checks import check_flag
from .compiled import has_numba
from .compiled import is_dense
from .masking import compute_type
from .masking import is_finite
from .masking import scale_of_counts
from .masking import scale_of_mask
from .philox import below
from .philox import philox
from .placements import stated
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .self_adjoint import Apply
from .self_adjoint import register_self_adjoint

# Looked up, not imported: Triton is only needed on a GPU, and does not exist on every system.
HAS_TRITON = find_spec("triton") is not None

# Planes placed at a time: as many as PyTorch takes without a second thread, below 32,768. On free cores two threads
# save up to a millisecond for 81,920 planes; where other programs use the cores they wait for each other in each of the
# 80 short operations of Philox, and 40,960 planes took 205 ms instead of 3.5 (docs/cpu-speed.md).
PLACED_AT_ONCE = (1 << 15) - 1

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
    check_choice("normalize", normalize, NORMALIZE)
    check_flag("share_c", share_c)
    n, c, *sides = x.shape
    if isinstance(atlas, torch.Tensor):
        fields = atlas
    # Not by its class: imported as `kernels` and as `autodropout.kernels`, this folder has two of that name.
    elif all(hasattr(atlas, name) for name in ("fields", "sides")):
        if atlas.sides != tuple(sides):
            raise ValueError(f"atlas must be of x's {stated(sides)}, got one of a {stated(atlas.sides)}")
        fields = atlas.fields
    else:
        raise TypeError(f"atlas must be an Atlas or a tensor of fields, got {type(atlas).__name__}")
    check_atlas_fields(fields)
    seed, rank = as_seed(seed, x.device), as_rank(rank)
    starts, scale = torch.ops.autodropout.tiled_draw(fields, seed, n, c, sides, share_c, normalize, rank)
    return _differentiable(x, fields, starts, scale)


# ---- draw: placements and scale ------------------------------------------------------------------------------------


def _draw(
    fields: torch.Tensor,
    seed: torch.Tensor,
    n: int,
    c: int,
    sides: Sequence[int],
    share_c: bool,
    normalize: str,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    planes = 1 if share_c else c
    if n * planes * math.prod(sides) == 0:
        starts = torch.zeros((n, planes), dtype=torch.int32, device=seed.device)
        return starts, torch.ones((), dtype=torch.float64, device=seed.device)
    atlas = atlas_of(fields, sides)
    h, w = atlas.height, atlas.width
    if _triton_runs_on(seed.device):
        from . import tiled_triton

        with torch.cuda.device(seed.device):  # Triton launches on the current device
            return tiled_triton.draw(seed, n, c, atlas, share_c, normalize, rank)
    if seed.device.type == "cpu" and has_numba():
        from . import tiled_numba

        starts, dropped = tiled_numba.place(n, planes, atlas, int(seed), rank)
        of_mask = scale_of_counts(starts.numel() * h * w, dropped)
        scale = of_mask if normalize == "mask" else fixed_scale(atlas, normalize)
        return starts, torch.tensor(scale, dtype=torch.float64, device=seed.device)
    starts = torch.empty((n, planes), dtype=torch.int32, device=seed.device)
    at_once = max(1, PLACED_AT_ONCE // planes)
    channels = torch.arange(planes, device=seed.device)
    for first in range(0, n, at_once):
        samples = torch.arange(first, min(n, first + at_once), device=seed.device)
        w0, w1, _, _ = philox(channels[None, :], 0, samples[:, None], rank, seed)
        starts[first : first + at_once] = window_start(below(w0, h), below(w1, w), h)
    return starts, _scale(atlas, starts, normalize)


def window_start(cy: torch.Tensor, cx: torch.Tensor, height: int) -> torch.Tensor:
    """What `tiled_apply` calls a start: the placement (cy, cx) as the row of the mask table, in [0, W * (2H-1))."""
    return cx * (2 * height - 1) + (height - 1 - cy)


def _scale(atlas: Atlas, starts: torch.Tensor, normalize: str) -> torch.Tensor:
    """The float64 quotient of integers that method and `normalize` ask for; 0 if nothing is kept."""
    if normalize != "mask":
        return torch.full((), fixed_scale(atlas, normalize), dtype=torch.float64, device=starts.device)
    dropped = atlas.counts_by_start.to(starts.device).index_select(0, starts.reshape(-1)).sum()
    size = starts.numel() * atlas.height * atlas.width
    return scale_of_mask(size, size - dropped)


def fixed_scale(atlas: Atlas, normalize: str) -> float:
    """The scale that needs no placements: "expected" or "none"."""
    if normalize == "none":
        return 1.0
    cells = (atlas.height * atlas.width) ** 2
    kept = cells - atlas.expected_dropped
    return cells / kept if kept else 0.0


# ---- apply: the masked product -------------------------------------------------------------------------------------


def _apply(x: torch.Tensor, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    atlas = atlas_of(fields, x.shape[2:])
    if x.dim() == 3:
        return _apply_on_maps(x.unsqueeze(2), atlas, starts, scale).squeeze(2)
    return _apply_on_maps(x, atlas, starts, scale)


def _apply_on_maps(x: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if _triton_runs_on(x.device):
        from . import tiled_triton

        with torch.cuda.device(x.device):
            return tiled_triton.apply(x, atlas, starts, scale)
    if x.device.type == "cpu":
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
    if has_numba() and is_dense(x):
        from . import tiled_numba

        tiled_numba.apply(x, y, atlas, starts, factor)
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


def _triton_runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


# ---- registration --------------------------------------------------------------------------------------------------


def _draw_fake(
    fields: torch.Tensor,
    seed: torch.Tensor,
    n: int,
    c: int,
    sides: Sequence[int],
    share_c: bool,
    normalize: str,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.empty((n, 1 if share_c else c), dtype=torch.int32, device=seed.device)
    return starts, torch.empty((), dtype=torch.float64, device=seed.device)


def _over_batch(
    apply: Apply, x: torch.Tensor, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The batch becomes samples. Every element gets the same mask: the placements were drawn once, outside it."""
    return apply(x.flatten(0, 1), fields, starts.repeat(x.shape[0], 1), scale).view(x.shape)


register_op(
    "tiled_draw(Tensor fields, Tensor seed, SymInt n, SymInt c, SymInt[] sides, bool share_c, str normalize, "
    "SymInt rank) -> (Tensor, Tensor)",
    _draw,
    _draw_fake,
)
_differentiable = register_self_adjoint(
    "tiled_apply(Tensor x, Tensor fields, Tensor starts, Tensor scale) -> Tensor",
    _apply,
    _over_batch,
)
