"""Frozen masks of the definition."""

from __future__ import annotations

from .tiled_numpy import Tiling

# Drawn with seed 2^40 + 8 and rank 3 on a map 7x9 with N = C = 2; rows of (sample, channel), `#` dropped.
GOLDEN = Tiling(size=0.25, stride=0.3, repeat=3, rotate=30, shear_x=0.2, shear_y=-0.1)
GOLDEN_ROWS = {
    (0, 0): "#....##.. ......... ...#..... ..###.... ...#..... .......#. ##....##.",
    (1, 1): "....###.. .....#... ..#...... ..##....# ..#...... ......#.. #....###.",
}
