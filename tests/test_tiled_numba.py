"""The compiled loops of tiled patterns give the bits of the PyTorch implementation, in every layout and dtype.

That these are the bits of the definition is tested in test_tiled_masks.py, with whichever of the two is installed, and
here for the other.
"""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from plain_torch import without_numba
from tiled_cases import DTYPES
from tiled_cases import Case
from tiled_cases import activations
from tiled_cases import expected_output
from tiled_cases import kept_of
from tiled_cases import large_cases
from tiled_cases import random_cases
from tiled_cases import same
from torch.utils._python_dispatch import TorchDispatchMode

from autodropout import TiledPattern
from autodropout import pattern_dropout
from autodropout.kernels import Atlas
from autodropout.kernels import tiled_dropout

pytest.importorskip("numba", reason="needs Numba")

CASES = [*random_cases(120, seed=20261124, longest=64), *large_cases(seed=3)]
NORMALIZE = ["mask", "expected", "none"]


class Watching(TorchDispatchMode):
    """Where it is on, draw and product are two ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def dropped(x: torch.Tensor, case: Case, normalize: str) -> torch.Tensor:
    atlas = case.pattern.atlas(*case.shape[2:])
    return tiled_dropout(x, atlas, case.seed, case.share_c, normalize, case.rank)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_equals_the_twin_and_pytorch(i: int) -> None:
    case, normalize = CASES[i], NORMALIZE[i % 3]
    for j, dtype in enumerate(DTYPES.values()):
        x = activations(case.shape, dtype, seed=i)
        if (i + j) % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        y = dropped(x, case, normalize)
        with Watching():
            of_two_ops = dropped(x, case, normalize)
        with without_numba():
            plain = dropped(x, case, normalize)
        assert y.stride() == of_two_ops.stride() == plain.stride() == x.stride()
        assert torch.equal(y, of_two_ops)
        assert torch.equal(y, plain)
        assert same(y, expected_output(x, case, normalize))


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sides", [(56, 56), (7, 7), (97, 101)])
def test_threads_change_nothing(sides: tuple[int, int], layout: torch.memory_format, share_c: bool) -> None:
    """More bytes than one thread is given, on three threads, an odd share each."""
    pattern = TiledPattern(size=0.3, stride=0.2, repeat=2, rotate=20, share_c=share_c)
    x = torch.randn(5, 4_000_000 // (5 * sides[0] * sides[1]), *sides).contiguous(memory_format=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(pattern_dropout(x, pattern, seed=1))
        with without_numba():
            results.append(pattern_dropout(x, pattern, seed=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype, layout: torch.memory_format) -> None:
    case = next(case for case in CASES if 0.2 < 1 - kept_of(case).double().mean() < 0.8 and not case.share_c)
    kept = kept_of(case)
    for value in (float("nan"), float("inf")):
        x = torch.where(kept, 1.0, value).to(dtype).contiguous(memory_format=layout)
        y = dropped(x, case, "none")
        assert torch.equal(y, kept.to(dtype))
    x = torch.full(kept.shape, float("nan"), dtype=dtype).contiguous(memory_format=layout)
    assert torch.equal(dropped(x, case, "none").isnan(), kept)


def test_forward_and_backward_go_by_the_same_fields() -> None:
    """Also by those of an atlas, which is kept for all that ask for it, and whose fields somebody has changed."""
    atlas = Atlas.of(0.24, 0.26, 3, 31.0, 0.0, 0.0, 16, 16)
    before, x = atlas.fields.clone(), torch.ones(2, 3, 16, 16, requires_grad=True)
    try:
        atlas.fields[0] = 0.5
        y = tiled_dropout(x, atlas, 1)
        y.sum().backward()
    finally:
        atlas.fields.copy_(before)
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert torch.equal(y, tiled_dropout(x, Atlas.of(0.5, 0.26, 3, 31.0, 0.0, 0.0, 16, 16), 1))


def test_fields_that_change_before_backward_are_noticed() -> None:
    fields = Atlas.of(0.25, 0.25, 3, 30.0, 0.0, 0.0, 16, 16).fields.clone()
    y = tiled_dropout(torch.ones(2, 3, 16, 16, requires_grad=True), fields, 1)
    fields[0] = 0.5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_atlas_dies_with_its_owner() -> None:
    atlas = pickle.loads(pickle.dumps(Atlas.of(0.25, 0.25, 3, 30.0, 0.0, 0.0, 9, 9)))
    tiled_dropout(torch.ones(2, 3, 9, 9), atlas, 1)
    alive = weakref.ref(atlas)
    del atlas
    gc.collect()
    assert alive() is None
