"""The compiled loops of Bernoulli dropout give the bits and values of the PyTorch implementation.

That these are those of the definition is tested in test_bernoulli.py, with whichever of the two is installed, and here
for the other.
"""

from __future__ import annotations

import random
from itertools import chain
from itertools import combinations
from typing import Any

import mask_contracts as contracts
import pytest
import torch
from mask_contracts import DTYPES
from plain_torch import without_numba
from twins import bernoulli_numpy as twin
from twins.philox_numpy import key_of
from twins.philox_numpy import philox

from autodropout.kernels import bernoulli_dropout
from autodropout.kernels.bernoulli import threshold_of

pytest.importorskip("numba", reason="needs Numba")

NORMALIZE = ("expected", "mask", "none")
# Numbers of decisions and cells on both sides of a call, of a run and of what is looked up by itself.
SIDES = {
    1: [(1,), (7,), (70,), (9001,)],
    2: [(9, 4), (3, 1), (1, 9001), (700, 3), (2, 64), (3, 65)],
    3: [(3, 5, 7), (2, 6, 64), (1, 33, 63), (5, 1, 130), (2, 2, 4099), (2, 4099, 2)],
    4: [(3, 5, 7, 7), (2, 8, 8, 8), (1, 3, 30, 31), (2, 17, 1, 29), (2, 70, 5, 6), (1, 2, 70, 70)],
    5: [(2, 3, 4, 3, 5), (1, 2, 2, 9, 9)],
}
CASES = [(shape, dims) for rank, shapes in SIDES.items() for shape in shapes for dims in range(2**rank)]


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, channels_last where there is one, turned, and with gaps."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    turned = x.transpose(-1, 0).contiguous().transpose(-1, 0)
    gaps = torch.stack((x, x), -1)[..., 0]
    return [x, *(x.contiguous(memory_format=formats[d]) for d in [x.dim()] if d in formats), turned, gaps]


def arguments(case: int, size: int) -> tuple[float, int, int]:
    """Rate, seed and rank of a case; large masks have rates at which a share of each kind is certain."""
    chosen = random.Random(case)
    rates = (0.1, 1 / 3, 0.5, 0.9) if size > 50 else (0.0, 2**-32, 0.5, 1 - 2**-40, 1.0)
    return chosen.choice(rates), chosen.randrange(-(2**63), 2**64), chosen.choice((0, 7, 2**32 - 1))


@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("rank", SIDES)
def test_equals_pytorch(rank: int, dims: int) -> None:
    """Every shape, every set of shared dimensions, in every layout and dtype."""
    for case, (shape, shared_bits) in enumerate(CASES):
        if len(shape) != rank or shared_bits % 4 != dims:
            continue
        shared = tuple(dim for dim in range(rank) if shared_bits >> dim & 1)
        rate, seed, of_rank = arguments(case, torch.Size(shape).numel())
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(case))
        for i, x in enumerate(layouts(whole)):
            x = x.to(DTYPES[(case + i) % 4])
            normalize = NORMALIZE[(case + i) % 3]
            y = bernoulli_dropout(x, rate, seed, shared, normalize, of_rank)
            with without_numba():
                plain = bernoulli_dropout(x, rate, seed, shared, normalize, of_rank)
            assert y.stride() == plain.stride()
            assert torch.equal(y, plain), (shape, shared, rate, seed, of_rank, i)


SMALL = [(shape, bits) for shape, bits in CASES if torch.Size(shape).numel() < 400]


@pytest.mark.parametrize("part", range(8))
def test_equals_the_naive_twin(part: int) -> None:
    for case, (shape, shared_bits) in list(enumerate(SMALL))[part::8]:
        shared = tuple(dim for dim in range(len(shape)) if shared_bits >> dim & 1)
        rate, seed, of_rank = arguments(case, torch.Size(shape).numel())
        kept = twin.kept(shape, rate, seed, shared, of_rank)
        normalize = NORMALIZE[case % 3]
        scale = twin.scale(kept, rate, normalize)
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(case))
        for x in layouts(whole):
            for dtype in DTYPES:
                y = bernoulli_dropout(x.to(dtype), rate, seed, shared, normalize, of_rank)
                contracts.check_values(x.to(dtype), y, torch.from_numpy(kept), scale)


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((5, 160, 41, 61), ()),
        ((3, 101, 61, 83), (2, 3)),
        ((7, 60, 60, 60), (1, 2, 3)),
        ((1, 100, 100, 100), (1, 2, 3)),
        ((3, 500, 700), (1,)),
        ((301, 5, 700), (0,)),
        ((1_100_000,), ()),
        ((110_000, 10), ()),
    ],
    ids=repr,
)
def test_threads_change_nothing(shape: tuple[int, ...], shared: tuple[int, ...]) -> None:
    """More bytes than one thread is given, on three threads, an odd share each; the scale is counted by threads too."""
    x = torch.randn(shape)
    before = torch.get_num_threads()
    for layout in (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(bernoulli_dropout(layout, 0.3, contracts.SEED, shared, "mask"))
        finally:
            torch.set_num_threads(before)
        with without_numba():
            results.append(bernoulli_dropout(layout, 0.3, contracts.SEED, shared, "mask"))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [(), (1,), (2, 3), (3,), (1, 2, 3)])
def test_what_is_dropped_is_zero_whatever_it_was(shared: Any, dtype: torch.dtype, layout: str) -> None:
    x = contracts.activation(layout, (8, 12, 10, 10), dtype)
    kept = bernoulli_dropout(torch.ones_like(x), 0.6, contracts.SEED, shared, "none") != 0
    assert 0 < int(kept.sum()) < kept.numel()
    for value in (float("nan"), float("inf"), -float("inf")):
        y = bernoulli_dropout(torch.where(kept, x, value), 0.6, contracts.SEED, shared)
        assert torch.equal(y, bernoulli_dropout(torch.where(kept, x, 0.0), 0.6, contracts.SEED, shared))
        y = bernoulli_dropout(torch.full_like(x, value), 0.6, contracts.SEED, shared)
        assert torch.equal(y == 0, ~kept)
        assert not bool(y[kept].isfinite().any())


def test_runs_anywhere() -> None:
    """Decisions from any first one on, to any number, beyond 2^32 calls as well."""
    from autodropout.kernels import bernoulli_numba

    threshold = threshold_of(0.4)
    for first, count in chain(combinations(range(1, 45, 3), 2), [(2**34 - 3, 9), (2**34 + 2, 70), (2**35 - 35, 65)]):
        kept = bernoulli_numba.draw(slice(2**32 - 2, 2**32), first, count, threshold, contracts.SEED, 3)
        for row, sample in zip(kept, (2**32 - 2, 2**32 - 1), strict=True):
            calls = range(first // 4, (first + count + 3) // 4)
            key = key_of(contracts.SEED)
            words = [int(word) for call in calls for word in philox(call % 2**32, call // 2**32, sample, 3, key)]
            assert row.tolist() == [word >= threshold for word in words[first % 4 :][:count]]


@pytest.mark.parametrize("decisions", [1, 3, 31, 32, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("threshold", [0, 1, 2**31, 2**32 - 1, 2**32])
def test_counts(decisions: int, threshold: int) -> None:
    from autodropout.kernels import bernoulli_numba

    samples = 3
    dropped = bernoulli_numba.dropped_of(samples, decisions, threshold, contracts.SEED, 1)
    kept = bernoulli_numba.draw(slice(0, samples), 0, decisions, threshold, contracts.SEED, 1)
    assert dropped == kept.numel() - int(kept.sum())
    assert threshold not in (0, 2**32) or dropped == (samples * decisions if threshold else 0)
