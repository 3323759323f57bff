"""The Triton kernels of DropBlock: bits and values by the interpreter, or on a GPU.

Memory that is allocated is filled with NaN first, so that a cell that is not written shows.
"""

from __future__ import annotations

import contextlib

import mask_contracts as contracts
import pytest
import torch
from mask_contracts import DTYPES
from mask_contracts import SEED
from mask_contracts import filled_memory  # noqa: F401
from twins import block_numpy as twin

from autodropout.kernels import block_dropout
from autodropout.kernels.block import geometry

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMALIZE = ("expected", "mask", "none")
# Shape, rate, block size. A program takes milliseconds under the interpreter, hence small; the odd ones are where
# fragments of 8 cells lie in two planes, or repeat a plane of fewer cells.
CASES = [
    ((2, 3, 7, 9), 0.3, 3),
    ((3, 5, 7, 7), 0.2, 7),
    ((2, 40, 8, 8), 0.1, 7),
    ((2, 3, 8, 8), 0.4, 2),
    ((3, 2, 14, 14), 0.1, 7),
    ((1, 2, 16, 16), 0.1, 5),
    ((2, 2, 28, 28), 0.1, 20),
    ((1, 2, 32, 32), 0.1, 7),
    ((2, 3, 1, 6), 0.4, 2),
    ((3, 4, 5, 1), 0.4, 3),
    ((9, 5, 1, 1), 0.5, 3),
    ((2, 9, 1, 2), 0.5, 1),
    ((1, 70, 3, 5), 0.2, 2),
    ((1, 1, 5, 70), 0.2, 4),
    ((2, 2, 3, 130), 0.3, 300),
    ((2, 3, 6, 6), 0.5, 2),
    ((2, 7, 9, 9), 0.8, 4),
    ((67, 1, 4, 4), 0.3, 3),
]


pytestmark = pytest.mark.usefixtures("filled_memory")


def run(
    x: torch.Tensor, fields: tuple[float, int], seed: int, share_c: bool, normalize: str, rank: int
) -> torch.Tensor:
    """The op as it runs on a GPU, its kernels interpreted where there is none."""
    from autodropout.kernels import block_triton

    blocks = geometry(*fields, x.shape[2], x.shape[3])
    x = x.to(DEVICE)
    key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=DEVICE)
    n, c, height, width = x.shape
    if normalize == "mask":
        scale = block_triton.mask_scale((n, c, height, width), blocks, key, share_c, rank)
    else:
        factor = 1 / (1 - fields[0]) if normalize == "expected" else 1.0
        scale = torch.tensor(factor, dtype=torch.float64, device=DEVICE)
    return block_triton.apply(x, blocks, key, scale, share_c, rank).cpu()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    n, c, height, width = x.shape
    sliced = torch.full((n + 1, c, height + 2, width + 3), float("nan"), dtype=x.dtype)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": sliced[1:, :, 1 : height + 1, 2 : width + 2].copy_(x),
    }


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_the_twin(index: int, share_c: bool) -> None:
    """One dtype, normalisation, seed and rank for each case in turn; every layout; NaN at every dropped cell."""
    shape, *fields = CASES[index]
    rate, block_size = float(fields[0]), int(fields[1])
    dtype = DTYPES[(index + share_c) % 4]
    normalize = NORMALIZE[index % 3]
    seed, rank = (-5, 2**63 + 1, SEED)[index // 3 % 3], (0, 3, 2**32 - 1)[index // 2 % 3]
    kept = torch.from_numpy(twin.kept(shape, rate, block_size, seed, share_c, rank))
    scale = twin.scale(kept.numpy(), rate, normalize)
    x = torch.where(kept, contracts.activation("contiguous", shape), float("nan")).to(dtype)
    for name, laid_out in layouts(x).items():
        y = run(laid_out, (rate, block_size), seed, share_c, normalize, rank)
        contracts.check_values(x, y, kept, scale)
        assert y.stride() == torch.empty_like(laid_out).stride(), name


def test_the_cases_are_telling() -> None:
    """Most masks keep and drop; there are planes with several blocks, and blocks as large as a side and as the map."""
    masks = [twin.kept(shape, rate, size, SEED, False, 0) for shape, rate, size in CASES]
    assert sum(mask.any() and not mask.all() for mask in masks) >= 15
    assert any(size >= max(shape[2:]) for shape, _, size in CASES)
    assert sum(float(twin.mean_blocks(*shape[2:], rate, size)) > 2 for shape, rate, size in CASES) >= 4


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_how_work_is_cut_does_not_show(share_c: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller tiles, programs that begin amid a sample, and the blocks of a plane shared among programs."""
    from autodropout.kernels import block_triton

    x = contracts.activation(layout, (3, 5, 7, 6))
    fields = (0.5, 2)
    whole = run(x, fields, SEED, share_c, "mask", 7)
    monkeypatch.setattr(block_triton, "warp_size", lambda: 4)  # planes of a program of the draw
    monkeypatch.setattr(block_triton, "CALLS", 3)
    monkeypatch.setattr(block_triton, "TILE", 128)
    assert torch.equal(run(x, fields, SEED, share_c, "mask", 7), whole)
    monkeypatch.setattr(block_triton, "CALLS", 1)
    monkeypatch.setattr(block_triton, "GRID", 3)  # which takes longer programs
    assert torch.equal(run(x, fields, SEED, share_c, "mask", 7), whole)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_rate_0_drops_nothing(normalize: str) -> None:
    x = contracts.activation("channels_last", (2, 3, 6, 6))
    assert torch.equal(run(x, (0.0, 3), SEED, False, normalize, 0), x)


def test_all_dropped_gives_zeros_not_nan() -> None:
    x = torch.full((1, 2, 3, 3), float("nan"))
    seed = next(s for s in range(100) if not twin.kept((1, 2, 3, 3), 0.9, 3, s, False, 0).any())
    assert torch.equal(run(x, (0.9, 3), seed, False, "mask", 0), torch.zeros_like(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the device itself")
@pytest.mark.parametrize("normalize", ["expected", "mask"])
def test_the_op_reaches_the_kernels(normalize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, as on a GPU, equal to the PyTorch route bit for bit."""
    from autodropout.kernels import block

    x = contracts.activation("channels_last", (2, 4, 8, 8)).requires_grad_()
    upstream = contracts.activation("contiguous", (2, 4, 8, 8)) + 1
    y = block_dropout(x, (0.3, 3), SEED, False, normalize, 1)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    monkeypatch.setattr(block, "triton_runs_on", lambda x: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("_dropped", "_apply_sparse"):
        monkeypatch.setattr(block, name, None)  # would raise
    through_kernels = block_dropout(x, (0.3, 3), SEED, False, normalize, 1)
    assert torch.equal(through_kernels, y)
    assert torch.equal(torch.autograd.grad(through_kernels, x, upstream)[0], gradient)
