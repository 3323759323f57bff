"""Philox in PyTorch integers against its NumPy twin, on every bit."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from plain_torch import without_numba
from twins import philox_numpy as twin

from autodropout.kernels import philox as kernels_philox
from autodropout.kernels.philox import below
from autodropout.kernels.philox import philox

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**40 + 8, 2**63 - 1, -1, -2, -(2**32), -(2**63), -(2**63) + 2**31]
# One counter word each: every combination of shapes that broadcasts in its own way, ints among them.
SHAPES = [
    [(), (), (), ()],
    [(5,), (5,), (5,), (5,)],
    [(3, 1), None, (1, 4), None],
    [None, (4,), None, (2, 1)],
    [None, None, None, (7,)],
    [(2, 1, 3), (1, 4, 1), (), None],
    [(0,), None, None, None],
]


@pytest.mark.parametrize("route", ["Numba", "NumPy", "PyTorch"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_the_twin(
    seed: int, shapes: list[tuple[int, ...] | None], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole range of counter words, their largest value included, by all routes."""
    if route == "Numba":
        pytest.importorskip("numba")
    if route == "PyTorch":
        monkeypatch.setattr(kernels_philox, "FEW", -1)
    rng = np.random.default_rng(seed % 2**64)
    counters: list[np.ndarray | int] = []
    for shape in shapes:
        words = rng.integers(0, 2**32, size=shape or (), dtype=np.int64)
        words = np.where(rng.random(words.shape) < 0.1, 2**32 - 1, words)
        counters.append(int(words) if shape is None else words)
    tensors = [word if isinstance(word, int) else torch.from_numpy(np.asarray(word)) for word in counters]
    before = [word if isinstance(word, int) else word.clone() for word in tensors]
    with nullcontext() if route == "Numba" else without_numba():
        got = philox(*tensors, torch.tensor(seed))
    for mine, expected in zip(got, twin.philox(*counters, twin.key_of(seed)), strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, torch.from_numpy(np.asarray(expected, dtype=np.int64)))
    for word, old in zip(tensors, before, strict=True):
        assert word == old if isinstance(word, int) else torch.equal(word, old), "a counter was changed in place"
    assert len({word.data_ptr() for word in got if word.numel()}) in (0, 4), "two words share memory"


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000, 2**31 - 1])
def test_below_equals_the_twin(n: int) -> None:
    words = np.random.default_rng(n).integers(0, 2**32, size=1000, dtype=np.uint64)
    words[:3] = (0, 2**31, 2**32 - 1)
    got = below(torch.from_numpy(words.astype(np.int64)), n)
    assert torch.equal(got, torch.from_numpy(twin.below(words, n)))
