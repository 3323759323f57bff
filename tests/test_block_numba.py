"""The compiled loops of DropBlock give the bits of PyTorch and of the twin, in every layout and dtype."""

from __future__ import annotations

import random

import mask_contracts as contracts
import pytest
import torch
from mask_contracts import DTYPES
from plain_torch import without_numba
from twins import block_numpy as twin

from autodropout.kernels import block_dropout

pytest.importorskip("numba", reason="needs Numba")

FORMATS = [torch.contiguous_format, torch.channels_last]
NORMALIZE = ["expected", "mask", "none"]
SEEDS = [0, -1, 2**31, 2**32 - 1, 2**32 + 5, 2**40 + 8, 2**63 - 1, 2**64 - 1]
# Rows of more than one word of bits, more planes than are drawn at a time, one sample, one channel, one cell.
SHAPES = [(2, 3, 5, 70), (1, 2, 3, 200), (1, 2500, 2, 3), (90, 30, 4, 4), (5, 1, 9, 7), (2, 6, 1, 1), (1, 1, 40, 50)]


@pytest.mark.parametrize("i", range(60))
def test_equals_pytorch(i: int) -> None:
    rng = random.Random(i)
    shape = rng.choice(SHAPES) if i % 2 else tuple(rng.randint(1, most) for most in (5, 9, 33, 33))
    rate, block_size = rng.choice([rng.uniform(0, 0.3), rng.uniform(0, 0.95), 0.95]), rng.choice([1, 2, 3, 7, 64, 1000])
    how = rng.choice(SEEDS), bool(i // 2 % 2), NORMALIZE[i // 4 % 3], rng.choice([0, 3, 2**32 - 1])
    for dtype in DTYPES:
        for memory_format in FORMATS:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype, memory_format=memory_format)
            y = block_dropout(x, (rate, block_size), *how)
            with without_numba():
                plain = block_dropout(x, (rate, block_size), *how)
            assert y.stride() == plain.stride()
            assert torch.equal(y, plain)


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 7, 9), (2, 2, 5, 66), (1, 3, 8, 8)])
def test_equals_the_twin(shape: tuple[int, int, int, int], share_c: bool) -> None:
    x = torch.randn(shape)
    for i, (rate, block_size) in enumerate(((0.1, 3), (0.5, 2), (0.9, 4))):
        for seed, rank in ((-5, 0), (2**40 + 8, 3)):
            kept = twin.kept(shape, rate, block_size, seed, share_c, rank)
            normalize = NORMALIZE[i]
            for dtype in DTYPES:
                for memory_format in FORMATS:
                    cast = x.to(dtype, memory_format=memory_format)
                    y = block_dropout(cast, (rate, block_size), seed, share_c, normalize, rank)
                    scale = twin.scale(kept, rate, normalize)
                    contracts.check_values(cast, y, torch.from_numpy(kept), scale)


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(7, 13, 97, 101), (1, 16, 256, 256), (131, 147, 7, 7)])
def test_threads_change_nothing(
    shape: tuple[int, int, int, int], memory_format: torch.memory_format, share_c: bool
) -> None:
    """More bytes than one thread is given, on three threads, an odd share each: they part inside of samples."""
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(block_dropout(x, (0.2, 7), 1, share_c, "mask"))
        with without_numba():
            results.append(block_dropout(x, (0.2, 7), 1, share_c, "mask"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    kept = torch.from_numpy(twin.kept((2, 3, 7, 9), 0.4, 3, 5, False, 0))
    for value in (float("nan"), float("inf")):
        x = torch.where(kept, 1.0, value).to(dtype, memory_format=memory_format)
        assert torch.equal(block_dropout(x, (0.4, 3), 5, normalize="none"), kept.to(dtype))
