"""The pattern of the paper for feature maps: a tiled rectangle, rotated, sheared and placed at random."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import ClassVar

import torch

from .base import Pattern
from .checks import MAX_SIDE
from .checks import flag
from .checks import integer
from .checks import real

if TYPE_CHECKING:
    from ..kernels.atlas import Atlas

MAX_SIZE = 2.0
MAX_STRIDE = 4.0
MAX_REPEAT = 64
MAX_SHEAR = 2.0


@dataclass(frozen=True)
class TiledPattern(Pattern):
    """Tiles that are dropped, a grid of repeat x repeat of them, turned and sheared about their centre.

    The eight fields are the tokens of the paper (Pham & Le 2021); their units, ranges and defaults are our choice.
    Lengths are fractions of the map's side, so that a pattern moves between layers and resolutions.

    Args:
        size: side of a tile, in [0, 2].
        stride: gap between two tiles, in [0, 4]; 0 = none, anything above is at least one cell.
        repeat: tiles along each axis, in 0..64; 0 = unlimited.
        rotate: degrees, finite.
        shear_x, shear_y: columns shifted per row and rows per column, in [-2, 2].
        share_c: one placement for all channels of a sample, instead of one for each.
        residual: the residual branch of the block is masked too, by a draw of its own. Only `apply_policy` reads it.

    Raises:
        TypeError, ValueError: naming the field. Also for unlimited repeat without a gap, which drops everything.
    """

    op: ClassVar[str] = "tiled"
    default_normalize: ClassVar[str] = "mask"

    size: float
    stride: float = 0.0
    repeat: int = 1
    rotate: float = 0.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    share_c: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        size = real("size", self.size, 0, MAX_SIZE)
        stride = real("stride", self.stride, 0, MAX_STRIDE)
        repeat = integer("repeat", self.repeat, 0, MAX_REPEAT)
        rotate = real("rotate", self.rotate)
        shear_x = real("shear_x", self.shear_x, -MAX_SHEAR, MAX_SHEAR)
        shear_y = real("shear_y", self.shear_y, -MAX_SHEAR, MAX_SHEAR)
        if repeat == 0 and stride == 0:
            raise ValueError("stride must be above 0 when repeat is 0 (unlimited tiles without gaps), got 0")
        self._freeze(
            (size, stride, float(repeat), rotate, shear_x, shear_y),
            size=size,
            stride=stride,
            repeat=repeat,
            rotate=rotate,
            shear_x=shear_x,
            shear_y=shear_y,
            share_c=flag("share_c", self.share_c),
            residual=flag("residual", self.residual),
        )

    def atlas(self, *sides: int) -> Atlas:
        """The geometry of the pattern on a map or a sequence: all that the op needs of it. Cached.

        Args:
            sides: (height, width) of a map, or (length,) of a sequence, in cells.

        Raises:
            TypeError, ValueError: a side is not a whole number >= 1, or there are not one or two of them; on a
                sequence also a pattern that is turned or sheared.
        """
        from ..kernels.atlas import atlas_of

        if len(sides) not in (1, 2):
            raise TypeError(f"sides must be (height, width) or (length,), got {sides!r}")
        names = ("height", "width") if len(sides) == 2 else ("length",)
        checked = [integer(name, side, 1, MAX_SIDE) for name, side in zip(names, sides, strict=True)]
        return atlas_of(self.fields(), checked)

    def expected_rate(self, *sides: int) -> float:
        """The exact expected share of dropped cells on a map or a sequence of these sides, over all placements."""
        rate: float = self.atlas(*sides).expected_rate
        return rate

    def scaled(self, factor: float) -> TiledPattern:
        """The same tiling with tiles of side size * factor, at most 2. The gaps stay."""
        return replace(self, size=min(self.size * real("factor", factor, 0), MAX_SIZE))

    def _drop(self, x: torch.Tensor, seed: int | torch.Tensor, rank: int) -> torch.Tensor:
        from ..kernels import tiled_dropout

        atlas = self.atlas(*x.shape[2:])
        y: torch.Tensor = tiled_dropout(x, atlas, seed, share_c=self.share_c, normalize="none", rank=rank)
        return y
