"""The tiled op against its NumPy twin: masks on every bit, values and gradients bitwise (zeros of either sign agree).

The implementation under test is the PyTorch one on CPU tensors and the compiled Triton one on CUDA tensors, where
there is a device; the Triton kernels run on CPU tensors, too, under the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from mask_contracts import filled_memory  # noqa: F401
from tiled_cases import DTYPES
from tiled_cases import Case
from tiled_cases import activations
from tiled_cases import expected_output
from tiled_cases import kept_of
from tiled_cases import large_cases
from tiled_cases import random_cases
from tiled_cases import same
from twins import tiled_numpy as twin
from twins.golden import GOLDEN
from twins.golden import GOLDEN_ROWS

from autodropout import TiledPattern
from autodropout.kernels import Atlas
from autodropout.kernels import tiled_dropout

RANDOM = random_cases(240, seed=20210, longest=64)
CASES = RANDOM + large_cases(seed=20211)
LARGE_INDICES = range(len(RANDOM), len(CASES))
NORMALIZE = ["mask", "expected", "none"]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])] if torch.cuda.is_available() else ["cpu"]


def always_or_slow(random: int, count: int) -> list[Any]:
    """Indices of cases, of which those beyond the first hundred random ones wait for the slow tests."""
    return [pytest.param(i, marks=[pytest.mark.slow] if 100 <= i < random else []) for i in range(count)]


def run(x: torch.Tensor, case: Case, normalize: str) -> torch.Tensor:
    H, W = case.shape[2:]
    return tiled_dropout(x, case.pattern.atlas(H, W), case.seed, case.share_c, normalize, case.rank)


def test_the_cases_are_telling() -> None:
    """The sample holds what it claims to hold, and most of its masks both keep and drop."""
    assert len(CASES) >= 200
    mixed = [case for case in CASES if kept_of(case).any() and not kept_of(case).all()]
    assert len(mixed) >= 150
    assert set(CASES[-len(LARGE_INDICES) :]) <= set(mixed)
    assert any(not kept_of(case).any() for case in CASES)
    assert any(kept_of(case).all() for case in CASES)
    assert {case.rank for case in CASES} == {0, 3}
    for share_c in (False, True):
        assert sum(case.share_c == share_c and case.shape[1] > 1 for case in mixed) >= 20
    assert sum(case.shape[0] > 1 for case in mixed) >= 40
    assert sum(case.seed < 0 for case in CASES) >= 40
    assert sum(case.seed >= 2**63 for case in CASES) >= 40
    assert sum(case.tiling.repeat == 0 for case in mixed) >= 10


@pytest.mark.parametrize("index", range(len(CASES)))
def test_mask_equals_the_twin(index: int) -> None:
    case = CASES[index]
    kept = case.pattern.mask(*case.shape, case.seed, rank=case.rank)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, kept_of(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", always_or_slow(len(RANDOM), len(CASES)))
def test_values_and_gradients_equal_the_twin(index: int, device: str) -> None:
    """Every dtype, every normalisation; the gradient is the same op on the upstream gradient."""
    case = CASES[index]
    for k, dtype in enumerate(DTYPES.values()):
        x = activations(case.shape, dtype, seed=2 * (4 * index + k)).to(device).requires_grad_()
        upstream = activations(case.shape, dtype, seed=2 * (4 * index + k) + 1).to(device)
        for normalize in NORMALIZE:
            y = run(x, case, normalize)
            assert y.dtype == dtype
            assert same(y, expected_output(x, case, normalize)), (dtype, normalize, "forward")
            (gradient,) = torch.autograd.grad(y, x, upstream)
            assert gradient.dtype == dtype
            assert same(gradient, expected_output(upstream, case, normalize)), (dtype, normalize, "backward")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_golden_mask_through_the_op(dtype: torch.dtype, device: str) -> None:
    pattern = TiledPattern(**asdict(GOLDEN))
    x = torch.ones(2, 2, 7, 9, dtype=dtype, device=device)
    y = tiled_dropout(x, pattern.atlas(7, 9), 2**40 + 8, share_c=False, normalize="none", rank=3)
    assert torch.equal(y != 0, pattern.mask(2, 2, 7, 9, 2**40 + 8, rank=3).to(device))
    for (n, c), rows in GOLDEN_ROWS.items():
        got = ["".join(".#"[int(value == 0)] for value in row) for row in y[n, c].tolist()]
        assert " ".join(got) == rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [*range(8, 60), *LARGE_INDICES])
def test_memory_formats_agree(index: int, device: str) -> None:
    """Contiguous, channels_last, sliced and expanded inputs give the same values; dense formats are preserved."""
    case = CASES[index]
    N, C, H, W = case.shape
    dtype = list(DTYPES.values())[index % 4]
    normalize = NORMALIZE[index % 3]
    dense = activations(case.shape, dtype, seed=index).to(device)
    larger = torch.full((N + 1, C + 1, H + 2, W + 3), float("nan"), dtype=dtype, device=device)
    sliced = larger[1:, :C, 1 : H + 1, 2 : W + 2]
    sliced.copy_(dense)
    layouts = {
        "contiguous": dense,
        "channels_last": dense.to(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": dense.transpose(2, 3).contiguous().transpose(2, 3),
    }
    expected = expected_output(dense, case, normalize)
    for name, x in layouts.items():
        x = x.detach().requires_grad_()
        y = run(x, case, normalize)
        assert same(y, expected), name
        (gradient,) = torch.autograd.grad(y, x, y.detach())
        assert same(gradient, expected_output(y, case, normalize)), name
    assert run(layouts["contiguous"], case, normalize).is_contiguous()
    channels_last = run(layouts["channels_last"], case, normalize)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    expanded = dense[:1, :, :1].expand(case.shape)
    assert same(run(expanded, case, normalize), expected_output(expanded.contiguous(), case, normalize)), "expanded"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [*range(8, 40), *LARGE_INDICES])
def test_not_a_number_at_dropped_cells_becomes_zero(index: int, device: str) -> None:
    case = CASES[index]
    kept = kept_of(case).to(device)
    for dtype in DTYPES.values():
        clean = activations(case.shape, dtype, seed=index).to(device)
        for poison in (float("nan"), float("inf")):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.where(kept, clean, poison).contiguous(memory_format=memory_format).requires_grad_()
                y = run(x, case, "mask")
                assert same(y, expected_output(clean, case, "mask"))
                (gradient,) = torch.autograd.grad(y, x, x.detach())
                assert same(gradient, expected_output(clean, case, "mask"))


@pytest.mark.parametrize("index", [*range(8, 40), *LARGE_INDICES])
def test_a_mask_depends_on_its_own_sample_and_channel_alone(index: int) -> None:
    """Growing N or C leaves the masks that were there, and share_c gives every channel the mask of channel 0."""
    case = CASES[index]
    H, W = case.shape[2:]
    arguments = {"seed": case.seed, "rank": case.rank}
    pattern = replace(case.pattern, share_c=False)
    shared = replace(case.pattern, share_c=True)
    large = pattern.mask(5, 7, H, W, **arguments)
    assert torch.equal(pattern.mask(2, 3, H, W, **arguments), large[:2, :3])
    assert torch.equal(pattern.mask(5, 1, H, W, **arguments), large[:, :1])
    assert torch.equal(shared.mask(5, 7, H, W, **arguments), large[:, :1].expand(5, 7, H, W))


def test_seeds_are_taken_modulo_two_to_the_64th() -> None:
    pattern = TiledPattern(size=0.3)
    x = torch.ones(4, 8, 16, 16)

    def mask(seed: int | torch.Tensor) -> torch.Tensor:
        return tiled_dropout(x, pattern.atlas(16, 16), seed, normalize="none")

    for negative in (-1, -(2**32), -(2**63)):
        same_key = mask(negative + 2**64)
        assert torch.equal(mask(negative), same_key)
        assert torch.equal(mask(torch.tensor(negative)), same_key)
    different = [mask(seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**63, -1, -(2**32))]
    for i, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[:i])


def test_expected_rate_is_the_exact_fraction() -> None:
    for case in CASES:
        H, W = case.shape[2:]
        assert case.pattern.expected_rate(H, W) == float(twin.expected_rate(case.tiling, H, W))


# The Triton kernels by their launchers. The interpreter takes milliseconds per program, hence mostly small tensors.
TRITON_CASES = [case for case in RANDOM if kept_of(case).numel() <= 2048]
TRITON_LARGE = [case for case in CASES[len(RANDOM) :] if kept_of(case).numel() <= 2**16]
INTERPRETED = not torch.cuda.is_available()
COMBINATIONS = [(dtype, normalize) for dtype in DTYPES.values() for normalize in NORMALIZE]


def triton_run(x: torch.Tensor, case: Case, normalize: str) -> torch.Tensor:
    from autodropout.kernels import tiled_triton
    from autodropout.kernels.seeds import as_seed

    N, C, H, W = case.shape
    atlas = case.pattern.atlas(H, W)
    starts, scale = tiled_triton.draw(as_seed(case.seed, x.device), N, C, atlas, case.share_c, normalize, case.rank)
    y: torch.Tensor = tiled_triton.apply(x, atlas, starts, scale)
    return y


def cut_to_bfloat16(x: torch.Tensor, case: Case, normalize: str) -> torch.Tensor:
    """What the interpreter makes of a bfloat16 result: it cuts off the bits that compiled code rounds."""
    product = expected_output(x.float(), case, normalize).float()
    return (product.view(torch.int32) & ~0xFFFF).view(torch.float32).double()


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("rank", [1, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize(("n", "c"), [(5, 700), (3000, 1), (1, 2500)])
def test_triton_places_planes_of_many_programs_and_any_rank(n: int, c: int, rank: int) -> None:
    """As the CPU does, where programs begin amid a sample, and with the rank's highest bit set."""
    from autodropout.kernels import tiled_triton

    atlas = Atlas.of(0.3, 0.25, 2, 30.0, 0.2, 0.0, 6, 7)
    seed = torch.tensor(2**40 + 8)
    expected = torch.ops.autodropout.tiled_draw(atlas.fields, seed, n, c, [6, 7], False, "mask", rank)
    device = "cpu" if INTERPRETED else "cuda"
    starts, scale = tiled_triton.draw(seed.to(device), n, c, atlas, False, "mask", rank)
    assert torch.equal(starts.cpu(), expected[0])
    assert torch.equal(scale.cpu(), expected[1])


def test_enough_cases_go_through_the_triton_kernels() -> None:
    assert len(TRITON_CASES) >= 60
    assert sum(kept_of(case).any().item() and not kept_of(case).all().item() for case in TRITON_CASES) >= 40


# NumPy warns where the interpreter rounds to an infinity, and where it multiplies one by zero at a dropped cell.
@pytest.mark.usefixtures("filled_memory")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("index", always_or_slow(len(TRITON_CASES), len(TRITON_CASES) + len(TRITON_LARGE)))
def test_triton_kernels_equal_the_twin(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype and normalisation for each random case in turn, three for each large one; several layouts."""
    from autodropout.kernels import tiled_triton

    case = (TRITON_CASES + TRITON_LARGE)[index]
    if INTERPRETED and case in TRITON_LARGE:  # programs take as long whatever their size, so fewer, larger ones
        monkeypatch.setattr(tiled_triton, "THREADS", 512)
        monkeypatch.setattr(tiled_triton, "TILE", 32 * 512)
        monkeypatch.setattr(tiled_triton, "VECTORS", 512)
    N, C, H, W = case.shape
    for dtype, normalize in COMBINATIONS[::5] if case in TRITON_LARGE else [COMBINATIONS[index % len(COMBINATIONS)]]:
        dense = activations(case.shape, dtype, seed=index)
        poisoned = torch.where(kept_of(case), dense, float("nan"))
        sliced = torch.full((N + 1, C, H + 2, W + 3), float("nan"), dtype=dtype)[1:, :, 1 : H + 1, 2 : W + 2]
        layouts = {
            "contiguous": poisoned,
            "channels_last": poisoned.contiguous(memory_format=torch.channels_last),
        }
        if index % 3 == 0:  # it is copied together first
            layouts["sliced"] = sliced.copy_(dense)
        expected = expected_output(dense, case, normalize)
        for name, x in layouts.items():
            y = triton_run(x if INTERPRETED else x.cuda(), case, normalize)
            assert y.dtype == dtype
            if INTERPRETED and dtype == torch.bfloat16:
                assert same(y, cut_to_bfloat16(dense, case, normalize)) or same(y, expected), (name, normalize)
            else:
                assert same(y, expected), (name, dtype, normalize)
            if name == "contiguous":
                assert y.is_contiguous()
            if name == "channels_last":
                assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_reads_memory_that_is_not_aligned(dtype: torch.dtype) -> None:
    """Of 16 bits, elements are read two by two only where memory allows it."""
    case = next(case for case in TRITON_CASES if case.shape[1] % 2 == 0 and kept_of(case).numel() % 8 == 0)
    dense = activations(case.shape, dtype, seed=0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        source = dense.contiguous(memory_format=memory_format)
        x = torch.full((dense.numel() + 1,), float("nan"), dtype=dtype)[1:].as_strided(case.shape, source.stride())
        x.copy_(dense)
        assert x.data_ptr() % 16 != 0
        y = triton_run(x if INTERPRETED else x.cuda(), case, "none")
        cut = INTERPRETED and dtype == torch.bfloat16 and same(y, cut_to_bfloat16(dense, case, "none"))
        assert cut or same(y, expected_output(dense, case, "none"))


# Under torch.compile: a fields tensor goes in, so that nothing is specialised on the pattern.
COMPILE_SHAPES = [
    (2, 3, 8, 8),
    (4, 2, 7, 9),
    (3, 5, 16, 4),
    (2, 8, 32, 32),
    (2, 4, 5, 64),
    (8, 4, 4, 4),
    (5, 2, 64, 2),
    (6, 3, 14, 14),
    (2, 16, 28, 28),
    (1, 1, 1, 1),
]
FIELDS = TiledPattern(**asdict(GOLDEN)).fields


def step(
    function: Callable[..., torch.Tensor], x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of a function of x; the upstream gradient is not constant."""
    x = x.detach().requires_grad_()
    y = function(x, fields, seed)
    (gradient,) = torch.autograd.grad(y, x, torch.cos(y.detach()))
    return y.detach(), gradient


@pytest.mark.parametrize("share_c", [False, True])
def test_compiled_equals_eager(share_c: bool) -> None:
    def block(x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        return tiled_dropout(torch.relu(x), fields, seed, share_c) * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for i, shape in enumerate(COMPILE_SHAPES):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = activations(shape, torch.float32, seed=i).contiguous(memory_format=memory_format)
            seed = torch.tensor(2**40 + i)
            for eager, got in zip(step(block, x, FIELDS(), seed), step(compiled, x, FIELDS(), seed), strict=True):
                assert torch.equal(eager, got), (shape, memory_format)


def test_compiled_draws_the_seeds_of_eager() -> None:
    """Without a seed, after the same manual_seed; two calls on one tensor draw two masks, and gradients follow them."""

    def both(x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([tiled_dropout(x, fields, seed), tiled_dropout(x, fields, seed)])

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True)
    x = activations((3, 8, 16, 16), torch.float32, seed=0).abs() + 1
    results = []
    for function in (both, compiled, both, compiled):
        torch.manual_seed(1234)
        results.append([step(function, x, FIELDS(), None) for _ in range(2)])
    for steps in results[1:]:
        for (y, gradient), (first_y, first_gradient) in zip(steps, results[0], strict=True):
            assert torch.equal(y, first_y)
            assert torch.equal(gradient, first_gradient)
    drawn = [half != 0 for steps in results[1:2] for y, _ in steps for half in y.chunk(2)]
    assert len(drawn) == 4
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])
