"""Placements of a tiled pattern, and the scale that belongs to them: what is drawn before an activation is masked.

The op `tiled_draw` turns the seed into one placement per plane (per sample if channels share). Counters are as
documented in tiled.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from .atlas import Atlas
from .atlas import atlas_of
from .atlas import check_atlas_fields
from .checks import NORMALIZE
from .checks import check_choice
from .checks import check_flag
from .compiled import has_numba
from .devices import triton_runs_on
from .masking import host_scalar
from .masking import scale_of_mask
from .philox import below
from .philox import philox
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed

# Planes placed at a time: as many as PyTorch takes without a second thread, below 32,768. On free cores two threads
# save up to a millisecond for 81,920 planes; where other programs use the cores they wait for each other in each of the
# 80 short operations of Philox, and 40,960 planes took 205 ms instead of 3.5 (docs/cpu-speed.md).
PLACED_AT_ONCE = (1 << 15) - 1

Placements = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # fields, starts, scale: what `tiled_apply` takes


def stated(sides: Sequence[int]) -> str:
    """What an atlas is of, in words."""
    return f"map {sides[0]}x{sides[1]}" if len(sides) == 2 else f"sequence of {sides[0]}"


def place(
    x: torch.Tensor, atlas: Atlas | torch.Tensor, seed: Seed, share_c: bool, normalize: str, rank: int | None
) -> Placements:
    """Fields, starts (N, 1 or C) and scale for an activation x (N, C, H, W), bit-equal to those of `tiled_dropout`.

    Raises:
        TypeError, ValueError: as `tiled_dropout`, naming the argument.
    """
    fields = fields_of(x, atlas, share_c, normalize)
    n, c, *sides = x.shape
    return fields, *drawn(fields, as_seed(seed, x.device), n, c, sides, share_c, normalize, as_rank(rank))


def fields_of(x: torch.Tensor, atlas: Atlas | torch.Tensor, share_c: bool, normalize: str) -> torch.Tensor:
    """The fields of the atlas. Checks these arguments of `tiled_dropout`."""
    check_choice("normalize", normalize, NORMALIZE)
    check_flag("share_c", share_c)
    if isinstance(atlas, torch.Tensor):
        check_atlas_fields(atlas)
        return atlas
    # Not by its class: imported as `kernels` and as `autodropout.kernels`, this folder has two of that name.
    if not (hasattr(atlas, "fields") and hasattr(atlas, "sides")):
        raise TypeError(f"atlas must be an Atlas or a tensor of fields, got {type(atlas).__name__}")
    if atlas.sides != tuple(x.shape[2:]):
        raise ValueError(f"atlas must be of x's {stated(x.shape[2:])}, got one of a {stated(atlas.sides)}")
    return atlas.fields


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
    if triton_runs_on(seed):
        from . import tiled_triton

        with torch.cuda.device(seed.device):  # Triton launches on the current device
            return tiled_triton.draw(seed, n, c, atlas, share_c, normalize, rank)
    if seed.is_cpu and has_numba():
        from . import tiled_numba

        return as_tensors(*tiled_numba.draw(atlas, n, planes, normalize, int(seed), rank))
    starts = torch.empty((n, planes), dtype=torch.int32, device=seed.device)
    at_once = max(1, PLACED_AT_ONCE // planes)
    channels = torch.arange(planes, device=seed.device)
    for first in range(0, n, at_once):
        samples = torch.arange(first, min(n, first + at_once), device=seed.device)
        w0, w1, _, _ = philox(channels[None, :], 0, samples[:, None], rank, seed)
        starts[first : first + at_once] = window_start(below(w0, h), below(w1, w), h)
    return starts, _scale(atlas, starts, normalize)


def as_tensors(starts: npt.NDArray[Any], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the compiled loops draw, as `tiled_draw` gives it."""
    return torch.from_numpy(starts), host_scalar(scale)


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


def _draw_fake(
    fields: torch.Tensor, seed: torch.Tensor, n: int, c: int, sides: Sequence[int], share_c: bool, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.empty((n, 1 if share_c else c), dtype=torch.int32, device=seed.device)
    return starts, torch.empty((), dtype=torch.float64, device=seed.device)


drawn = register_op(
    "tiled_draw(Tensor fields, Tensor seed, SymInt n, SymInt c, SymInt[] sides, bool share_c, str normalize, "
    "SymInt rank) -> (Tensor, Tensor)",
    _draw,
    _draw_fake,
)
