"""Statistics of the Bernoulli op's masks: delivered rates, and independence of all that should be independent.

Seeds are fixed, so a pass stays a pass. Rates: 72 comparisons at 4 standard errors, two-sided alpha 6.3e-5 each by the
normal approximation; a correct op fails one of them with probability 0.5%. Independence: 30 chi-square tests at alpha
1e-4, 0.3% together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autodropout.kernels import bernoulli_dropout

RATES = (0.01, 0.1, 1 / 3, 0.5, 0.75, 0.95)
# Shape and what is shared: at least 2,000 decisions each; numbers of decisions that are no multiples of 4 among them.
GEOMETRIES: list[tuple[tuple[int, ...], Any]] = [
    ((64, 4096), "none"),
    ((7, 3, 31, 33), "none"),
    ((20000,), "none"),
    ((3001, 3, 2, 2), "map"),
    ((64, 160, 3, 5), "map"),
    ((9, 1001, 2), "map"),
    ((4099, 2, 3), "sample"),
    ((40, 120, 8), (2,)),
    ((40, 5, 130), (1,)),
    ((5, 61, 67), (0,)),
    ((300, 2, 9, 4), (1, 3)),
    ((6, 100, 3, 30), (0, 2)),
]
ALPHA = 1e-4


def decisions(shape: tuple[int, ...], rate: float, seed: int, shared: Any = "none", rank: int = 0) -> torch.Tensor:
    """Bool, True = dropped, each decision once: shared dimensions have side 1."""
    dropped = bernoulli_dropout(torch.ones(shape), rate, seed, shared, "none", rank) == 0
    names = {"none": (), "map": range(2, len(shape)), "sample": range(1, len(shape))}
    for dim in names.get(shared, shared):
        dropped = dropped.narrow(dim, 0, 1)
    return dropped


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("shape", "shared"), GEOMETRIES, ids=repr)
def test_delivers_the_rate(shape: tuple[int, ...], shared: Any, rate: float) -> None:
    dropped = decisions(shape, rate, 2**35 + 7, shared, rank=1)
    assert dropped.numel() >= 2000
    error = abs(dropped.double().mean().item() - rate)
    assert error <= 4 * math.sqrt(rate * (1 - rate) / dropped.numel())


def p_value(streams: list[torch.Tensor], rate: float) -> float:
    """Of the chi-square test that four streams of decisions are independent, each of this rate.

    The joint outcomes of the four at one place have 16 known probabilities, so that there are 15 degrees of freedom.
    """
    outcome = sum(stream.reshape(-1).long() << k for k, stream in enumerate(streams))
    assert isinstance(outcome, torch.Tensor)
    count = torch.bincount(outcome, minlength=16).double()
    ones = torch.tensor([bin(k).count("1") for k in range(16)], dtype=torch.float64)
    expected = outcome.numel() * rate**ones * (1 - rate) ** (4 - ones)
    assert expected.min() >= 5  # the usual condition for the chi-square distribution
    statistic = ((count - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(7.5, dtype=torch.float64), statistic / 2).item()


MAPS = (4, 4, 160, 160)
AXES: dict[str, Callable[[float], list[torch.Tensor]]] = {
    "samples": lambda rate: list(decisions(MAPS, rate, 11)),
    "channels": lambda rate: list(decisions(MAPS, rate, 12).unbind(1)),
    "columns, one Philox call": lambda rate: list(
        decisions((1, 4, 160, 640), rate, 13).unflatten(3, (160, 4)).unbind(4)
    ),
    "columns, four Philox calls": lambda rate: list(decisions(MAPS, rate, 14).unflatten(3, (10, 4, 4)).unbind(4)),
    "steps": lambda rate: [decisions(MAPS, rate, 2**32 - 2 + step) for step in range(4)],
    "seeds in the upper half": lambda rate: [decisions(MAPS, rate, step << 32) for step in range(4)],
    "ranks": lambda rate: [decisions(MAPS, rate, 15, rank=rank) for rank in range(4)],
    "samples of shared decisions": lambda rate: list(decisions((4, 102400, 1), rate, 16, "map")),
    "steps of samples": lambda rate: [decisions((102400, 1), rate, 17 + step, "sample") for step in range(4)],
    "ranks of tokens": lambda rate: [decisions((400, 256, 2), rate, 21, (2,), rank=rank) for rank in range(4)],
}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("axis", AXES)
def test_decisions_are_independent(axis: str, rate: float) -> None:
    assert p_value(AXES[axis](rate), rate) >= ALPHA


def test_the_chi_square_test_would_notice() -> None:
    """Two streams that agree a little more often than by chance: one cell in 50 is copied."""
    streams = AXES["steps"](0.5)
    copied = decisions(MAPS, 0.02, 99)
    assert p_value([streams[0], torch.where(copied, streams[0], streams[1]), *streams[2:]], 0.5) < ALPHA
