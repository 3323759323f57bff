"""Placements of a tiled pattern for ops that mask as a part of something else: drawn as `tiled_dropout` draws them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .atlas import Atlas
from .atlas import check_atlas_fields
from .checks import NORMALIZE
from .checks import check_choice
from .checks import check_flag
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed

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
    return fields, starts, scale
