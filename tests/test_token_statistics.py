"""What token masks deliver on average, and that their decisions know nothing of each other.

Means are compared with their expectation at 4 standard errors: two-sided alpha = 6.3e-5 by the normal approximation,
so that one of the 256 comparisons of a right op would fail with probability 1.6%. The chi-square tests have alpha =
1e-4 each. The seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from autodropout import TokenPattern
from autodropout.kernels import token_dropout

SAMPLES, CHANNELS = 2048, 8
SIGMAS = 4.0
# (tokens, size, stride, rate): spans shorter than the sequence, as long, and longer.
GEOMETRIES = [(24, *one) for one in product((1, 2, 3, 5, 8), (0, 1, 4, 11), (0.1, 0.4, 0.85))]
GEOMETRIES += [(7, 7, 3, 0.3), (7, 9, 0, 0.6), (7, 6, 30, 0.9), (1, 1, 5, 0.5)]
SHARING = [(False, False), (True, False), (False, True), (True, True)]

# Of the chi-square distribution: what is exceeded with probability 1e-4, by degrees of freedom.
LIMITS = {3: 21.11, 4: 23.51, 15: 44.26, 24: 58.61}


def dropped(
    shape: tuple[int, int, int],
    fields: tuple[int, int, float],
    seed: int,
    share_t: bool = False,
    share_c: bool = False,
    rank: int = 0,
) -> torch.Tensor:
    y = token_dropout(torch.ones(shape), fields, seed, share_t=share_t, share_c=share_c, normalize="none", rank=rank)
    return y == 0


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_the_expected_share_is_delivered(sharing: tuple[bool, bool]) -> None:
    assert len(GEOMETRIES) >= 60
    for i, (tokens, size, stride, rate) in enumerate(GEOMETRIES):
        expected = TokenPattern(size, stride, rate=rate).expected_rate(tokens)
        coverage = 1.0 if size >= tokens else size / (size + stride)
        assert expected == rate * coverage
        mask = dropped((SAMPLES, tokens, CHANNELS), (size, stride, rate), 2**33 + i, *sharing)
        # Samples are independent: the error of the mean is that of their shares, by their spread.
        shares = mask.double().mean(dim=(1, 2))
        error = abs(shares.mean().item() - expected)
        assert error <= SIGMAS * shares.std().item() / math.sqrt(SAMPLES), (tokens, size, stride, rate)


@pytest.mark.parametrize("tokens", [1, 10])
def test_every_token_is_covered_alike(tokens: int) -> None:
    """The phase is uniform: the first token and the last of a sequence are covered as often as any other."""
    covered = dropped((20_000, tokens, 1), (3, 4, 1.0), 11).double().mean(dim=(0, 2))
    expected = 1.0 if tokens == 1 else 3 / 7
    assert bool(((covered - expected).abs() <= SIGMAS * math.sqrt(expected * (1 - expected) / 20_000)).all())


def test_the_scale_makes_the_expectation_1() -> None:
    """Of "expected": the mean output over independent samples is the input."""
    for tokens, size, stride, rate in GEOMETRIES[::7]:
        y = token_dropout(torch.ones(SAMPLES, tokens, CHANNELS), (size, stride, rate), 77)
        means = y.double().mean(dim=(1, 2))
        assert abs(means.mean().item() - 1) <= SIGMAS * means.std().item() / math.sqrt(SAMPLES)


def check_chi_square(outcomes: torch.Tensor, probabilities: list[float]) -> None:
    """Independent draws of 0..k-1 against their probabilities."""
    counts = torch.bincount(outcomes.reshape(-1), minlength=len(probabilities)).double()
    expected = outcomes.numel() * torch.tensor(probabilities, dtype=torch.float64)
    assert bool((expected >= 20).all())
    assert float(((counts - expected) ** 2 / expected).sum()) <= LIMITS[len(probabilities) - 1]


def check_pairs(first: torch.Tensor, second: torch.Tensor, rate: float) -> None:
    """Two sets of decisions, independent within each: all four joint outcomes as often as independence says."""
    both = [(1 - rate) ** 2, (1 - rate) * rate, rate * (1 - rate), rate**2]
    check_chi_square(2 * first.long() + second.long(), both)


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_neighbours_are_independent(sharing: tuple[bool, bool], rate: float) -> None:
    """In samples, spans (tokens), channels, seeds and ranks; pairs are disjoint, and what is shared is looked at once.

    With stride 0 tokens 0 and 4 are in spans that follow each other, whatever the phase.
    """
    share_t, share_c = sharing
    shape, fields = (512, 64, 16), (4, 0, rate)
    mask = dropped(shape, fields, 5, *sharing)
    others = {
        "seed": dropped(shape, fields, 6, *sharing),
        "seed's upper half": dropped(shape, fields, 5 + 2**32, *sharing),
        "rank": dropped(shape, fields, 5, *sharing, rank=1),
    }

    def own(mask: torch.Tensor) -> torch.Tensor:
        """One cell of each decision."""
        mask = mask[:, ::4] if share_t else mask
        return mask[:, :, :1] if share_c else mask

    for other in others.values():
        check_pairs(own(mask), own(other), rate)
    mask = own(mask)
    check_pairs(mask[::2], mask[1::2], rate)
    check_pairs(mask[:, ::2], mask[:, 1::2], rate)
    if not share_c:
        check_pairs(mask[:, :, ::2], mask[:, :, 1::2], rate)
        check_pairs(mask[:, :, :8], mask[:, :, 8:], rate)
        # The four words of a call, all 16 outcomes.
        words = mask.reshape(*mask.shape[:2], 4, 4).long()
        outcomes = (words * torch.tensor([8, 4, 2, 1])).sum(-1)
        ones = torch.arange(16).bitwise_and(torch.tensor([[8], [4], [2], [1]])).bool().sum(0)
        check_chi_square(outcomes, [rate**k * (1 - rate) ** (4 - k) for k in ones.tolist()])


def phases(seed: int, rank: int = 0) -> torch.Tensor:
    """Of 20,000 samples with period 5, from the mask alone: rate 1 shows which tokens are covered."""
    covered = dropped((20_000, 10, 1), (1, 4, 1.0), seed, rank=rank)[:, :, 0]
    first = covered.long().argmax(1)
    assert bool((covered.sum(1) == 2).all())
    return (-first) % 5


def test_phases_are_uniform_and_independent() -> None:
    one = phases(3)
    check_chi_square(one, [0.2] * 5)
    for first, second in ((one[::2], one[1::2]), (one, phases(4)), (one, phases(3, rank=1))):
        check_chi_square(5 * first + second, [0.04] * 25)
