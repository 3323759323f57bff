"""The Triton kernels of the Bernoulli op: bits and values by the interpreter (or a GPU).

Memory that is allocated is filled with NaN first, so that a cell that is not written shows.
"""

from __future__ import annotations

import pytest
import torch
from mask_contracts import DTYPES
from mask_contracts import SEED
from mask_contracts import filled_memory  # noqa: F401

from autodropout.kernels.bernoulli import threshold_of

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
# Shape, shared dimensions, kernel, memory format. Long enough for several tiles along each axis, or short and odd.
CASES: list[tuple[tuple[int, ...], list[int], str, torch.memory_format | None]] = [
    ((3, 5, 6, 7), [], "cells", None),
    ((2, 9001), [], "cells", None),
    ((1500, 3), [], "cells", None),
    ((9,), [], "cells", None),
    ((1, 1, 1, 1), [], "cells", None),
    ((2, 700, 20), [1], "cells outer", None),
    ((3, 4, 4, 3), [0, 1], "cells outer", None),
    ((5, 3, 7), [0], "cells outer", None),
    ((2, 10, 9, 9), [2, 3], "cells outer", LAST),
    ((3, 5, 6, 7), [2, 3], "rows", None),
    ((2, 3, 70, 70), [2, 3], "rows", None),
    ((9, 2, 5), [1, 2], "rows", None),
    ((2, 5, 6, 7), [1, 2, 3], "rows", LAST),
    ((7, 9, 33), [2], "rows", None),
    ((4, 40, 7, 7), [2, 3], "rows", None),
    ((3, 170, 3, 3), [2, 3], "rows", None),
    ((2, 3, 2051), [2], "rows", None),
    ((3, 5, 7, 9), [1, 3], "rows outer", None),
    ((2, 66, 7, 7), [], "strided", LAST),
    ((3, 5, 6, 7), [1, 3], "rows outer", None),
    ((2, 3, 4, 5), [0, 1, 2, 3], "rows", None),
    ((3, 5, 6, 7), [], "strided", LAST),
    ((2, 130, 4, 6), [], "strided", LAST),
    ((1, 8, 33, 31), [], "strided", LAST),
    ((1, 3, 40, 40), [], "strided", LAST),
    ((3, 5, 6, 7), [2], "none", None),
    ((3, 5, 6, 7), [0, 2], "none", None),
    ((3, 5, 6, 7), [3], "none", LAST),
]


pytestmark = pytest.mark.usefixtures("filled_memory")


def kind_of(x: torch.Tensor, shared: list[int]) -> str:
    from autodropout.kernels.bernoulli_form import form_of

    form = form_of(x.shape, x.stride(), shared)
    if form is None:
        return "none"
    if form.places:
        return "strided"
    return ("rows" if form.inner > 1 else "cells") + (" outer" if form.outer > 1 else "")


def run(x: torch.Tensor, shared: list[int], rate: float, scale: float, seed: int, rank: int) -> torch.Tensor:
    from autodropout.kernels import bernoulli_triton

    x = x.to(DEVICE)
    factor = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
    seed_on = torch.tensor(seed, device=DEVICE)
    y: torch.Tensor = bernoulli_triton.apply(x, shared, threshold_of(rate), seed_on, factor, rank)
    return y


def expected(x: torch.Tensor, shared: list[int], rate: float, scale: float, seed: int, rank: int) -> torch.Tensor:
    """The PyTorch route, which has been compared with the NumPy twin."""
    fields, factor = (torch.tensor(value, dtype=torch.float64) for value in ([rate], scale))
    bits = sum(1 << dim for dim in shared)
    y: torch.Tensor = torch.ops.autodropout.bernoulli_apply(x, fields, torch.tensor(seed), factor, bits, rank)
    return y


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("index", range(len(CASES)))
def test_kernels_equal_the_pytorch_route(index: int) -> None:
    """Bitwise, in two dtypes a case, with NaN and Inf at cells that may be dropped, and the same strides."""
    shape, shared, kind, memory_format = CASES[index]
    generator = torch.Generator().manual_seed(index)
    for k, dtype in enumerate((DTYPES[index % 4], DTYPES[(index + 1 + index // 4 % 3) % 4])):
        x = torch.randn(shape, generator=generator).to(dtype)
        if memory_format is not None:
            x = x.to(memory_format=memory_format)
        assert kind_of(x, shared) == kind
        arguments = (shared, (0.4, 0.9)[k], (1.7, 10.0)[k], SEED + index, (3, 2**32 - 1)[k])
        kept = expected(torch.ones_like(x), *arguments) != 0
        poisoned = torch.where(kept, x, (float("nan"), float("inf"))[k])
        y = run(poisoned, *arguments)
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), expected(x, *arguments))
        assert y.stride() == torch.empty_like(poisoned).stride()


@pytest.mark.parametrize("shared", [[], [2, 3], [2]], ids=repr)
def test_kernels_take_any_strides(shared: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(4, 8, 9, 10, generator=generator)
    for x in (
        large[1:, ::2, 1:-1, 3:],
        large[:1, :, :1].expand(3, 8, 5, 10),
        large.transpose(0, 1),
        large.permute(3, 2, 0, 1),
        large.transpose(2, 3),
    ):
        y = run(x, shared, 0.5, 2.0, 5, 0)
        assert torch.equal(y.cpu(), expected(x, shared, 0.5, 2.0, 5, 0))
        assert y.stride() == torch.empty_like(x).stride()


def test_smallest_and_largest_thresholds() -> None:
    """Rates of which the thresholds are 0, 1 and 2^32 - 1; rate 1 never reaches a kernel."""
    x = torch.ones(2, 500)
    for rate in (0.0, 2.0**-32, 0.5, 1 - 2.0**-32):
        for shared in ([], [1]):
            assert torch.equal(run(x, shared, rate, 1.0, 9, 0).cpu(), expected(x, shared, rate, 1.0, 9, 0))


@pytest.mark.parametrize(
    ("samples", "decisions", "cells"), [(3, 210, 1), (3000, 1, 4), (7, 9, 5), (1, 9001, 1), (700, 6, 2)]
)
def test_the_count_is_that_of_the_mask(samples: int, decisions: int, cells: int) -> None:
    """Programs begin amid a sample; the last call of a sample may hold fewer than four decisions."""
    from autodropout.kernels import bernoulli_triton

    shape = (samples, decisions, cells)
    for rate, rank in ((0.3, 0), (0.0, 1), (1 - 2.0**-32, 2**31), (1.0, 1)):
        fields, seed = torch.tensor([rate], dtype=torch.float64), torch.tensor(SEED)
        scale = torch.ops.autodropout.bernoulli_scale(fields, seed, shape, 4, "mask", rank)
        size = samples * decisions * cells
        got = bernoulli_triton.scale_of_mask(seed.to(DEVICE), samples, decisions, size, threshold_of(rate), rank)
        assert got.dtype == torch.float64
        assert torch.equal(got.cpu(), scale)


def test_forms_of_memory() -> None:
    from autodropout.kernels.bernoulli_form import Form
    from autodropout.kernels.bernoulli_form import form_of

    def form(shape: tuple[int, ...], shared: list[int], last: bool = False) -> Form | None:
        x = torch.empty(shape, device="meta")
        if last:
            x = x.to(memory_format=torch.channels_last_3d if x.dim() == 5 else LAST)
        return form_of(x.shape, x.stride(), shared)

    assert form((8, 4, 5, 6), []) == Form(8, 1, 120, 1)
    assert form((8, 4, 5, 6), [2, 3]) == Form(8, 1, 4, 30)
    assert form((8, 4, 5, 6), [1, 2, 3]) == Form(8, 1, 1, 120)
    assert form((8, 4, 5, 6), [], last=True) == Form(8, 1, 120, 1, places=30)
    assert form((8, 4, 3, 5, 6), [], last=True) == Form(8, 1, 360, 1, places=90)
    assert form((8, 4, 5, 6), [2, 3], last=True) == Form(8, 30, 4, 1)
    assert form((8, 150, 32), [1]) == Form(8, 150, 32, 1)
    assert form((8, 150, 32), [2]) == Form(8, 1, 150, 32)
    assert form((150, 8, 32), [0]) == Form(1, 150, 256, 1)
    assert form((8, 4, 1, 1), [], last=True) == Form(8, 1, 4, 1)  # sides of 1 do not matter
    assert form((1, 4, 5, 6), []) == Form(1, 1, 120, 1)
    assert form((8, 4, 5, 6), [2]) is None
    assert form_of((8, 4), (1, 8), []) is None


def test_a_tile_of_cells_never_spans_more_than_32_bits() -> None:
    """`cells_kernel` places its rows in a tile with int32: several rows in a tile must be short."""
    from autodropout.kernels import bernoulli_triton
    from autodropout.kernels.launch_triton import tile_length

    lengths = [*range(1, 40_000), *(2**k + d for k in range(15, 40) for d in (-1, 0, 1)), *range(40_000, 10**8, 99_991)]
    for lanes in (4, 8):
        most = bernoulli_triton.TILE // lanes
        for fragments in lengths:
            side, _ = tile_length(fragments, most)
            assert side == most or (most // side) * fragments * lanes < 2**31, (lanes, fragments, side)
