"""Masks of different samples, channels, steps, layers and ranks are independent: chi-square tests with fixed seeds.

A test here rejects at a two-sided alpha of 1e-4 (too irregular or too regular), so that of the 41 of a correct
implementation one would fail with probability 0.4%, once: the seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2
from scipy.stats import chi2_contingency
from torch import nn
from trained import CASES

from autodropout import TiledPattern
from autodropout.nn import PatternDropout

ALPHA = 1e-4
# One tile of one cell on a 4 x 4 map: the dropped cell is the centre itself, all that is random about a placement.
SIDE = 4
CELL = TiledPattern(1 / SIDE)
CELLS = SIDE * SIDE
N, C, TIMES = 32, 32, 64

Pair = tuple[torch.Tensor, torch.Tensor]


def centres(kept: torch.Tensor) -> torch.Tensor:
    """The one dropped cell of every plane, 0..15: (N, C) of masks (N, C, 4, 4)."""
    dropped = ~kept.flatten(2)
    assert bool((dropped.sum(2) == 1).all())
    return dropped.int().argmax(2)


def placed(seed: int, rank: int = 0, pattern: TiledPattern = CELL) -> torch.Tensor:
    return centres(pattern.mask(N, C, SIDE, SIDE, seed, rank=rank))


def placed_by_seeds(rank: int = 0) -> torch.Tensor:
    """(TIMES, N, C), seeds 0, 1, 2, ...: what a user does who passes the number of the step."""
    return torch.stack([placed(seed, rank) for seed in range(TIMES)])


def placed_by_training(layers: int = 1) -> torch.Tensor:
    """(TIMES, layers, N, C) of steps of a model under one manual_seed, every layer and step with a seed of its own."""
    model = nn.ModuleList(PatternDropout(CELL, normalize="none") for _ in range(layers))
    x = torch.ones(N, C, SIDE, SIDE)
    torch.manual_seed(2021)
    return torch.stack([torch.stack([centres(layer(x) != 0) for layer in model]) for _ in range(TIMES)])


def p_value_of_uniform_pairs(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's statistic of the 256 pairs of cells against equal frequencies: 255 degrees of freedom."""
    counts = torch.bincount((one * CELLS + other).flatten(), minlength=CELLS**2).double()
    expected = counts.sum() / CELLS**2
    assert expected >= 20
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), CELLS**2 - 1))


def accepted(p: float) -> bool:
    return ALPHA / 2 < p < 1 - ALPHA / 2


def halves(placements: torch.Tensor, dim: int, lag: int = 1) -> Pair:
    """Disjoint pairs at a distance along a dimension: blocks of `lag`, every second one against the one before it."""
    first, second = placements.unfold(dim, 2 * lag, 2 * lag).split(lag, dim=-1)
    return first, second


def transposed(placements: torch.Tensor) -> Pair:
    """Sample n, channel c against sample c, channel n: would a counter mix up the two?"""
    upper = torch.ones(N, C, dtype=torch.bool).triu(1)
    return placements[:, upper], placements.transpose(1, 2)[:, upper]


RELATIONS: dict[str, Callable[[], Pair]] = {
    "samples": lambda: halves(placed_by_training()[:, 0], dim=1),
    "samples, 4 apart": lambda: halves(placed_by_training()[:, 0], dim=1, lag=4),
    "channels": lambda: halves(placed_by_training()[:, 0], dim=2),
    "channels, 4 apart": lambda: halves(placed_by_training()[:, 0], dim=2, lag=4),
    "samples and channels": lambda: transposed(placed_by_training()[:, 0]),
    "steps": lambda: halves(placed_by_training()[:, 0], dim=0),
    "steps, 8 apart": lambda: halves(placed_by_training()[:, 0], dim=0, lag=8),
    "layers": lambda: halves(placed_by_training(layers=2), dim=1),
    "layers and steps": lambda: (
        (drawn := placed_by_training(layers=2))[0:-1:2, 1],
        drawn[1::2, 0],
    ),
    "seeds in a row": lambda: halves(placed_by_seeds(), dim=0),
    "ranks": lambda: (placed_by_seeds(rank=0), placed_by_seeds(rank=1)),
    "distant ranks": lambda: (placed_by_seeds(rank=0), placed_by_seeds(rank=2**32 - 1)),
    "ranks and seeds": lambda: (placed_by_seeds(rank=1)[:-1], placed_by_seeds(rank=0)[1:]),
    "ranks and samples": lambda: (placed_by_seeds(rank=1)[:, :-1], placed_by_seeds(rank=0)[:, 1:]),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_placements_are_independent_and_uniform(relation: str) -> None:
    one, other = RELATIONS[relation]()
    assert accepted(p_value_of_uniform_pairs(one, other))


@pytest.mark.parametrize("axis", ["channels", "steps", "ranks"])
def test_the_test_finds_masks_that_agree(axis: str) -> None:
    """Masks shared by channels, one seed for all steps, one rank for all processes."""
    pairs = {
        "channels": lambda: halves(placed(0, pattern=TiledPattern(1 / SIDE, share_c=True))[None].repeat(20, 1, 1), 2),
        "steps": lambda: (placed_by_seeds(), placed_by_seeds()),
        "ranks": lambda: (placed_by_seeds(rank=0), placed_by_seeds(rank=0)),
    }
    assert p_value_of_uniform_pairs(*pairs[axis]()) < 1e-100


def test_the_test_finds_one_dependent_plane_in_fifty() -> None:
    """Excess of the statistic: pairs * 15 * 0.02^2 = 196 of 32,768 pairs, where 255 +- 22.6 are expected: 8.7 sigma."""
    one, other = halves(placed_by_training()[:, 0], dim=1)
    copied = torch.rand(one.shape, generator=torch.Generator().manual_seed(1)) < 0.02
    assert not accepted(p_value_of_uniform_pairs(one, torch.where(copied, one, other)))


def dropped_bits(name: str, rank: int, times: int = 24) -> torch.Tensor:
    """(times, 512) bits: whether one element of each sample is dropped, under one manual_seed; seeds drawn."""
    case = CASES[name]
    shape = (512, *case.shape[1:])
    centre = tuple(side // 2 for side in case.shape[1:])
    torch.manual_seed(31)
    seeds = [torch.ops.autodropout.draw_seed(device=torch.device("cpu")) for _ in range(times)]
    x = torch.ones(shape)
    return torch.stack([case.pattern._drop(x, seed, rank)[(slice(None), *centre)] == 0 for seed in seeds])


@pytest.mark.parametrize("relation", ["samples", "steps", "ranks"])
@pytest.mark.parametrize("name", CASES)
def test_bits_of_every_op_are_independent(name: str, relation: str) -> None:
    """A 2 x 2 table of 6,144 pairs and more; one degree of freedom, the rate estimated from the margins."""
    bits = dropped_bits(name, rank=0)
    pairs = {
        "samples": lambda: halves(bits, dim=1),
        "steps": lambda: halves(bits, dim=0),
        "ranks": lambda: (bits, dropped_bits(name, rank=1)),
    }
    one, other = pairs[relation]()
    table = torch.bincount((2 * one.int() + other.int()).flatten(), minlength=4).view(2, 2)
    assert int(table.min()) >= 20
    assert accepted(chi2_contingency(table.numpy(), correction=False).pvalue)
