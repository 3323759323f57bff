"""The compiled loops of token patterns give the bits of PyTorch and of the twin, in every layout, order and dtype."""

from __future__ import annotations

import random

import mask_contracts as contracts
import pytest
import torch
from mask_contracts import DTYPES
from plain_torch import without_numba
from twins import token as twin

from autodropout.kernels import token_dropout
from autodropout.kernels.token import by_token
from autodropout.kernels.token import sides_of

pytest.importorskip("numba", reason="needs Numba")

LAYOUTS = ["NTC", "TNC", "NHTD", "NHQK"]
SHARING = [(False, False), (True, False), (False, True), (True, True)]
NORMALIZE = ["expected", "mask", "none"]
SEEDS = [0, -1, 2**31, 2**32 - 1, 2**32 + 5, 2**40 + 8, 2**63 - 1, 2**64 - 1]


def laid_out(x: torch.Tensor, order: int) -> torch.Tensor:
    """x with its dimensions in another order in memory; 0 is as it is."""
    if order == 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if order == 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == 3:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@pytest.mark.parametrize("i", range(96))
def test_equals_pytorch(i: int) -> None:
    rng = random.Random(i)
    layout, sharing, order = LAYOUTS[i % 4], SHARING[i // 4 % 4], i // 16 % 4
    shape = tuple(rng.choice([1, rng.randint(1, 9), rng.randint(1, 70)]) for _ in layout)
    fields = rng.randint(1, 9), rng.choice([0, 1, rng.randint(0, 20)]), rng.choice([0, rng.random(), rng.random(), 1])
    if i % 7 == 0:
        fields = rng.choice([100, 2**30 - 1]), *fields[1:]
    seed, normalize, rank = rng.choice(SEEDS), NORMALIZE[i % 3], rng.choice([0, 3, 2**32 - 1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for dtype in DTYPES:
        cast = laid_out(x.to(dtype), order)
        y = token_dropout(cast, fields, seed, layout, *sharing, normalize, rank)
        with without_numba():
            plain = token_dropout(cast, fields, seed, layout, *sharing, normalize, rank)
        assert y.stride() == plain.stride()
        assert torch.equal(y, plain)


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize(
    ("layout", "shape"), [("NTC", (3, 11, 10)), ("TNC", (7, 2, 9)), ("NHTD", (2, 3, 9, 5)), ("NHQK", (2, 3, 5, 11))]
)
def test_equals_the_twin(layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]) -> None:
    x = torch.randn(shape)
    sides = sides_of(shape, layout)
    for i, (fields, seed) in enumerate((((2, 3, 0.4), 2**40 + 8), ((3, 0, 0.7), -5), ((20, 4, 0.5), 2**64 - 1))):
        mask = twin.dropped(*sides, *fields, seed, *sharing, 2**32 - 1)
        kept = ~torch.from_numpy(twin.in_layout(mask, layout, shape[1]).copy())
        scale = twin.scale(mask, sides[1], *fields, NORMALIZE[i])
        for dtype in DTYPES:
            for order in range(4):
                cast = laid_out(x.to(dtype), order)
                y = token_dropout(cast, fields, seed, layout, *sharing, NORMALIZE[i], 2**32 - 1)
                contracts.check_values(cast, y, kept, scale)


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize(("layout", "shape"), [("NTC", (1, 2, 40_001)), ("NHQK", (1, 1, 5, 40_001))])
def test_rows_longer_than_a_piece(layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]) -> None:
    x = torch.randn(shape)
    for fields in ((1, 0, 0.5), (100, 7, 0.5), (50_000, 0, 0.5)):
        y = token_dropout(x, fields, 1, layout, *sharing, "mask")
        with without_numba():
            assert torch.equal(y, token_dropout(x, fields, 1, layout, *sharing, "mask"))


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [("NTC", (7, 301, 501)), ("TNC", (301, 7, 501)), ("NHTD", (3, 5, 301, 250)), ("NHQK", (3, 5, 250, 301))],
)
def test_threads_change_nothing(layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]) -> None:
    """More bytes than one thread is given, on three threads, an odd share each."""
    x = torch.randn(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(token_dropout(x, (4, 3, 0.5), 1, layout, *sharing, "mask"))
        with without_numba():
            results.append(token_dropout(x, (4, 3, 0.5), 1, layout, *sharing, "mask"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize(("layout", "shape"), [("NTC", (3, 11, 10)), ("NHQK", (2, 3, 5, 11))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_is_zero_whatever_it_was(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]
) -> None:
    mask = twin.dropped(*sides_of(shape, layout), 3, 1, 0.6, 5, *sharing)
    kept = ~torch.from_numpy(twin.in_layout(mask, layout, shape[1]).copy())
    for value in (float("nan"), float("inf")):
        x = torch.where(kept, 1.0, value).to(dtype)
        assert torch.equal(token_dropout(x, (3, 1, 0.6), 5, layout, *sharing, "none"), kept.to(dtype))


def test_which_orders_the_loops_take() -> None:
    """Queries of heads as projections give them are rows of all heads; what has gaps is left to PyTorch."""
    from autodropout.kernels.token_numba import order

    x = torch.randn(3, 5, 7, 9)
    assert order(by_token(x, "NHTD")) == (0, 2, 1, 3)
    assert order(by_token(x, "NHQK")) == (0, 2, 3, 1)
    assert order(by_token(x.transpose(1, 2), "NHTD")) == (0, 1, 2, 3)
    assert order(by_token(x[0], "NTC")) == (0, 1, 2, 3)
    assert order(by_token(x[0], "TNC")) == order(by_token(x[0].transpose(0, 1), "NTC")) == (1, 0, 2, 3)
    assert order(by_token(x[:, ::2], "NHTD")) is None
    assert order(by_token(x[:1].expand(3, -1, -1, -1), "NHQK")) is None
