"""Statistics of DropBlock's masks: delivered rates against the exact variance, and independence.

Seeds are fixed, so a pass stays a pass. Rates: 60 comparisons at 4 standard errors, two-sided alpha 6.3e-5 each by the
normal approximation; a correct op fails one of them with probability 0.4%. Independence and uniformity: 15 chi-square
tests at alpha 1e-4, 0.15% together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from twins import block_numpy as twin

from autodropout.kernels import block_dropout
from autodropout.kernels.block import _draw
from autodropout.kernels.block import geometry

PLANES = 4096
ALPHA = 1e-4
# Height, width, block size: odd and even sizes, blocks as long as a side, as large as the map and larger.
GEOMETRIES = [
    (7, 7, 3),
    (7, 7, 6),
    (7, 7, 7),
    (8, 8, 2),
    (8, 8, 7),
    (8, 8, 40),
    (14, 14, 4),
    (14, 14, 7),
    (28, 28, 7),
    (5, 9, 6),
    (1, 12, 4),
    (12, 1, 1),
    (3, 25, 8),
    (20, 16, 16),
    (1, 1, 3),
]
RATES = (0.03, 0.1, 0.4, 0.9)


def variance_of_share(height: int, width: int, block_size: int, rate: float) -> float:
    """Of the dropped share of a plane, exactly: the mean over all pairs of cells of the covariance of the two.

    With k and k' positions covering two cells, and `both` covering either at once, they stay together with probability
    exp(-lambda (k + k' - both) / M).
    """
    axes = []
    for side in (height, width):
        b = min(block_size, side)
        places = np.arange(side - b + 1)[:, None]
        covered = (places <= np.arange(side)) & (np.arange(side) < places + b)
        axes.append(covered.T.astype(int) @ covered.astype(int))  # [i, i']: positions on the axis that cover both
    both = np.einsum("ij,kl->ikjl", *axes).reshape(height * width, height * width)
    k = np.diagonal(both)
    positions = (height - min(block_size, height) + 1) * (width - min(block_size, width) + 1)
    weight = float(twin.mean_blocks(height, width, rate, block_size)) / positions
    apart = np.exp(-weight * (k[:, None] + k[None]))
    return float((apart * np.expm1(weight * both)).mean())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("height", "width", "block_size"), GEOMETRIES)
def test_delivers_the_rate(height: int, width: int, block_size: int, rate: float) -> None:
    x = torch.ones(PLANES // 16, 16, height, width)
    dropped = block_dropout(x, (rate, block_size), 2**34 + 5, normalize="none", rank=2) == 0
    error = abs(dropped.double().mean().item() - rate)
    assert error <= 4 * math.sqrt(variance_of_share(height, width, block_size, rate) / PLANES)


def test_the_variance_is_that_of_whole_planes_and_of_single_cells() -> None:
    """Where it is known: a plane that is dropped as a whole, and cells that are independent."""
    assert variance_of_share(5, 4, 9, 0.3) == pytest.approx(0.3 * 0.7)
    assert variance_of_share(5, 4, 1, 0.3) == pytest.approx(0.3 * 0.7 / 20)


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value; no expected count may be below 5."""
    assert float(expected.min()) >= 5
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def streams_by_sample(draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return list(draw((8192, 1), 1).flatten().view(-1, 4).unbind(1))


def streams_by_channel(draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return list(draw((2048, 4), 2).unbind(1))


def streams_by_seed(draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return [draw((256, 8), seed).flatten() for seed in (3, 4, 2**32 + 3, -3)]


def streams_by_rank(draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return [draw((256, 8), 5, rank).flatten() for rank in (0, 1, 2, 2**31)]


@pytest.mark.parametrize("cell", [(0, 0), (4, 4), (7, 3)])
@pytest.mark.parametrize("streams", [streams_by_sample, streams_by_channel, streams_by_seed, streams_by_rank])
def test_planes_are_independent(streams: Callable[..., list[torch.Tensor]], cell: tuple[int, int]) -> None:
    """The joint outcomes of one cell in four planes have 16 known probabilities: 15 degrees of freedom."""
    fields = (0.5, 3)

    def draw(shape: tuple[int, int], seed: int, rank: int = 0) -> torch.Tensor:
        y = block_dropout(torch.ones(*shape, 8, 8), fields, seed, normalize="none", rank=rank)
        return y[:, :, cell[0], cell[1]] == 0

    blocks = geometry(*fields, 8, 8)
    covers = math.prod(min(i, 5) - max(0, i - 2) + 1 for i in cell)
    p = -math.expm1(-float(blocks.mean) * covers / 36)
    joint = sum(stream.long() << i for i, stream in enumerate(streams(draw)))
    assert isinstance(joint, torch.Tensor)
    assert len(joint) == 2048
    ones = torch.tensor([bin(outcome).count("1") for outcome in range(16)], dtype=torch.float64)
    expected = p**ones * (1 - p) ** (4 - ones) * len(joint)
    # Corner cells are dropped rarely: outcomes by number of planes are then counted together.
    if float(expected.min()) < 5:
        joint, expected = ones[joint].long(), torch.bincount(ones.long(), expected, 5)
        keep = int((expected >= 5).sum())
        joint = joint.clamp(max=keep - 1)
        expected = torch.cat([expected[: keep - 1], expected[keep - 1 :].sum()[None]])
    assert chi_square(torch.bincount(joint, minlength=len(expected)).double(), expected) > ALPHA


@pytest.mark.parametrize(("height", "width", "block_size"), [(8, 8, 3), (6, 11, 4), (14, 14, 7)])
def test_corners_are_uniform_and_their_number_is_poisson(height: int, width: int, block_size: int) -> None:
    blocks = geometry(0.3, block_size, height, width)
    drawn = _draw(blocks, slice(0, 512), slice(0, 8), torch.tensor(2**40 + 8), 0)
    tops, lefts = blocks.positions
    count = torch.bincount(drawn.top * lefts + drawn.left, minlength=tops * lefts).double()
    uniform = torch.full_like(count, len(drawn.top) / (tops * lefts))
    assert chi_square(count, uniform) > ALPHA / 2

    numbers = torch.bincount(drawn.sample * 8 + drawn.channel, minlength=4096)
    mean = float(blocks.mean)
    poisson = torch.tensor([math.exp(-mean) * mean**k / math.factorial(k) for k in range(40)]).double() * 4096
    longest = int((poisson >= 5).nonzero().max())
    first = int((poisson >= 5).nonzero().min())
    expected = torch.cat(
        [poisson[: first + 1].sum()[None], poisson[first + 1 : longest], 4096 - poisson[:longest].sum()[None]]
    )
    observed = torch.bincount(numbers.clamp(first, longest) - first, minlength=len(expected)).double()
    assert chi_square(observed, expected) > ALPHA / 2
