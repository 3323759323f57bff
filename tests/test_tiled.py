"""The contracts of the tiled op: what it saves, allocates, refuses, and how it behaves under PyTorch's transformations.

Its bits and values are tested in test_tiled_masks.py, the machine code of its kernels in test_machine_code.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mask_contracts as contracts
import pytest
import torch
from marks import dynamo_traces_gradients_of_ops
from mask_contracts import DTYPES
from mask_contracts import SEED
from mask_contracts import activation
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import without_numba
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from autodropout import TiledPattern
from autodropout.kernels import tiled_dropout
from autodropout.kernels.tiled import apply_reference
from autodropout.nn import PatternDropout

ROOT = Path(__file__).parents[1]
OPS = torch.ops.autodropout
PATTERN = TiledPattern(size=0.3, stride=0.25, repeat=2, rotate=30.0, shear_x=0.2)
FIELDS = PATTERN.fields()
EVERYTHING = TiledPattern(size=2.0)
LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced", "transposed")
NORMALIZE = ("mask", "expected", "none")
# A map for which no table of all windows is made.
LARGE = (130, 90)


def call(share_c: bool = False, normalize: str = "mask") -> contracts.Call:
    return lambda x, fields, seed: tiled_dropout(x, fields, seed, share_c, normalize)


def drawn(shape: tuple[int, ...], share_c: bool, normalize: str = "mask") -> tuple[torch.Tensor, torch.Tensor]:
    starts, scale = OPS.tiled_draw(FIELDS, torch.tensor(SEED), *shape[:2], shape[2:], share_c, normalize, 0)
    return starts, scale


# ---- the ops as PyTorch wants them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_apply(dtype: torch.dtype, layout: str, share_c: bool) -> None:
    x = activation(layout, dtype=dtype)
    torch.library.opcheck(OPS.tiled_apply.default, (x.requires_grad_(), FIELDS, *drawn(x.shape, share_c)))


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_opcheck_of_draw(normalize: str, share_c: bool) -> None:
    arguments = (FIELDS, torch.tensor(SEED), 3, 5, [6, 7], share_c, normalize, 3)
    torch.library.opcheck(OPS.tiled_draw.default, arguments)


def test_opcheck_of_draw_seed() -> None:
    torch.library.opcheck(OPS.draw_seed.default, (), {"device": torch.device("cpu")})


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("share_c", [False, True])
def test_gradients_and_their_gradients(share_c: bool, normalize: str) -> None:
    contracts.check_gradients(call(share_c, normalize), FIELDS)


@pytest.mark.parametrize("share_c", [False, True])
def test_backward_is_the_op(share_c: bool) -> None:
    contracts.check_backward_is_the_op(call(share_c), FIELDS)


# ---- no recompilation ----------------------------------------------------------------------------------------------


def other_patterns(count: int, share_c: bool) -> list[TiledPattern]:
    generator = torch.Generator().manual_seed(2)
    patterns = []
    for i in range(count):
        size, stride, shear_x, shear_y = torch.rand(4, generator=generator).tolist()
        patterns.append(TiledPattern(size, stride + 0.01, i % 5, 7.0 * i, shear_x, -shear_y, share_c=share_c))
    return patterns


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("share_c", [False, True])
def test_dynamo_compiles_a_function_once(share_c: bool) -> None:
    """50 patterns and seeds, forward and backward: one frame, no break, and the values of eager code."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call(share_c), backend=counter, fullgraph=True)
    x = activation("contiguous").requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, pattern in enumerate(other_patterns(50, share_c)):
            seed = torch.tensor(i * 2**40 - 5)
            y = compiled(x, pattern.fields(), seed)
            assert torch.equal(y, tiled_dropout(x, pattern.fields(), seed, share_c))
            (gradient,) = torch.autograd.grad(y, x, x)
            assert torch.equal(gradient, y)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("share_c", [False, True])
def test_dynamo_compiles_a_module_once(share_c: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = PatternDropout(TiledPattern(0.1, share_c=share_c))
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = activation("contiguous")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, pattern in enumerate(other_patterns(50, share_c)):
            module.pattern = pattern
            torch.manual_seed(i)
            y = compiled(x)
            torch.manual_seed(i)
            assert torch.equal(y, tiled_dropout(x, pattern.fields(), None, share_c))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("layout", "share_c"), [("expanded", False), ("sliced", True), ("transposed", False)])
def test_compiled_equals_eager_in_other_layouts(layout: str, share_c: bool) -> None:
    """The dense ones are compiled in test_tiled_masks.py, on ten shapes."""
    contracts.check_compiled_equals_eager(call(share_c), FIELDS, layout)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("sides", [(1, 1), (8, 8), (64, 48), LARGE])
def test_saved_for_backward(sides: tuple[int, int], share_c: bool) -> None:
    """A start of 4 bytes a plane, the scale and the six fields: 56 bytes more, whatever the map."""
    x = activation("contiguous", (4, 8, *sides)).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        tiled_dropout(x, FIELDS, SEED, share_c)
    assert sum(tensor.nbytes for tensor in saved) == 4 * (4 if share_c else 32) + 56
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved) == 4 * (4 if share_c else 32) + 56


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 160, 32, 32), (32, 256, 56, 56), (128, 320, 16, 16), (128, 640, 8, 8)])
@pytest.mark.parametrize("numba", [False, True])
def test_memory_of_the_forward(
    numba: bool, shape: tuple[int, int, int, int], dtype: torch.dtype, share_c: bool
) -> None:
    """Beyond the output at most 2% of it; in 16 bits the placements, 4 bytes a plane, are counted apart."""
    x = torch.ones(shape, dtype=dtype)
    atlas = PATTERN.atlas(*shape[2:])
    with nullcontext() if numba else without_numba():
        tiled_dropout(x[:1], atlas, SEED)  # the atlas is made and its table cached
        extra = contracts.peak_bytes(lambda: tiled_dropout(x, atlas, SEED, share_c)) - x.nbytes
    if dtype == torch.bfloat16:
        extra -= 4 * shape[0] * (1 if share_c else shape[1])
    print(f"\n{shape} {dtype} share_c={share_c}: output + {100 * extra / x.nbytes:.2f}%")
    assert extra <= 0.02 * x.nbytes


# ---- odd shapes and values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("share_c", [False, True])
def test_empty_tensors(shape: tuple[int, int, int, int], share_c: bool) -> None:
    for normalize in NORMALIZE:
        x = torch.empty(shape, requires_grad=True)
        y = tiled_dropout(x, FIELDS, SEED, share_c, normalize)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (9, 1), (5, 12), LARGE, (3, 700)])
def test_equals_the_reference_on_odd_maps(sides: tuple[int, int], share_c: bool, dtype: torch.dtype) -> None:
    assert (PATTERN.atlas(*sides).kept_flat is None) == (sides in (LARGE, (3, 700)))
    for layout in LAYOUTS:
        x = activation(layout, (3, 4, *sides), dtype)
        starts, scale = drawn(x.shape, share_c)
        y = tiled_dropout(x, FIELDS, SEED, share_c)
        assert torch.equal(y, apply_reference(x, PATTERN.atlas(*sides), starts, scale)), layout
        assert y.stride() == torch.empty_like(x).stride(), layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("sides", [(6, 7), LARGE])
def test_zeros_where_everything_is_dropped(sides: tuple[int, int], normalize: str, dtype: torch.dtype) -> None:
    assert EVERYTHING.expected_rate(*sides) == 1.0
    for share_c in (False, True):
        for value in (1.0, float("nan"), float("inf"), -float("inf")):
            x = torch.full((2, 3, *sides), value, dtype=dtype, requires_grad=True)
            y = tiled_dropout(x, EVERYTHING.fields(), SEED, share_c, normalize)
            assert torch.equal(y, torch.zeros_like(x))
            (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
            assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share_c", [False, True])
def test_not_a_number_and_infinity(share_c: bool, dtype: torch.dtype) -> None:
    """Dropped cells are 0 whatever they held; kept ones keep it. Also where one bad cell sits among good ones."""
    contracts.check_non_finite(call(share_c), FIELDS, dtype)
    for sides in ((6, 7), LARGE):
        for layout in ("contiguous", "channels_last"):
            x = activation(layout, (2, 3, *sides)).to(dtype)
            kept = tiled_dropout(torch.ones_like(x), FIELDS, SEED, share_c) != 0
            clean = tiled_dropout(x, FIELDS, SEED, share_c)
            for value in (float("nan"), float("inf"), -float("inf")):
                for at in (kept.nonzero()[5], (~kept).nonzero()[5]):
                    poisoned = x.clone()
                    poisoned[tuple(at)] = value
                    expected = clean.clone()
                    expected[tuple(at)] = value if kept[tuple(at)] else 0.0
                    y = tiled_dropout(poisoned, FIELDS, SEED, share_c)
                    assert torch.equal(y.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


def test_a_sum_that_overflows_changes_nothing() -> None:
    x = torch.full((4, 8, 16, 16), 60000.0, dtype=torch.float16)
    y = tiled_dropout(x, FIELDS, SEED, normalize="none")
    assert set(y.unique().tolist()) == {0.0, 60000.0}


# ---- transformations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_gives_every_element_the_same_mask(in_dim: int, share_c: bool) -> None:
    function = call(share_c)
    seed = torch.tensor(SEED)
    x = torch.randn(4, 4, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    y = torch.func.vmap(lambda x: function(x, FIELDS, seed), in_dims=in_dim, out_dims=in_dim)(x)
    for i in range(4):
        assert torch.equal(y.select(in_dim, i), function(x.select(in_dim, i), FIELDS, seed))
    nested = torch.func.vmap(torch.func.vmap(lambda x: function(x, FIELDS, seed)))(x[:2, :, None])
    for i in range(2):
        for j in range(4):
            assert torch.equal(nested[i, j], function(x[i, j, None], FIELDS, seed))


def test_vmap_over_seeds_refuses() -> None:
    x = activation("contiguous")
    for normalize in NORMALIZE:
        with pytest.raises(ValueError, match="seed .*must not be batched by vmap: draw outside it"):
            torch.func.vmap(lambda seed, n=normalize: tiled_dropout(x, FIELDS, seed, normalize=n))(torch.arange(3))
    with pytest.raises(ValueError, match="seed and fields must not be batched by vmap"):
        torch.func.vmap(lambda x, seed: tiled_dropout(x, FIELDS, seed))(x[:, None], torch.arange(3))


@pytest.mark.parametrize("share_c", [False, True])
def test_forward_mode(share_c: bool) -> None:
    contracts.check_forward_mode(call(share_c), FIELDS)


@pytest.mark.parametrize("share_c", [False, True])
def test_all_modes_of_differentiation_agree(share_c: bool) -> None:
    contracts.check_modes_of_differentiation_agree(call(share_c), FIELDS)


@pytest.mark.parametrize("share_c", [False, True])
def test_functional_and_per_sample_gradients(share_c: bool) -> None:
    contracts.check_functional_gradients(call(share_c, "expected"), FIELDS)


@dynamo_traces_gradients_of_ops
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_transformations() -> None:
    contracts.check_compiled_transformations(call(), FIELDS)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [SEED, None])
def test_checkpointing(seed: int | None, reentrant: bool) -> None:
    """The second forward draws the mask of the first: from the seed, or from the random state that is preserved."""
    x = activation("contiguous").requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        return tiled_dropout(torch.sin(x), FIELDS, seed) ** 2

    results = []
    for function in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=True)):
        torch.manual_seed(5)
        y = function(x)
        torch.rand(3)  # the state has moved on before backward
        x.grad = None
        y.sum().backward()  # the reentrant kind knows no autograd.grad
        results.append((y.detach(), x.grad))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_seeds_are_values() -> None:
    """The same number in two buffers, as an int, and modulo 2^64, gives the same mask; another one another mask."""
    x = torch.ones(4, 8, 16, 16)
    masks = [tiled_dropout(x, FIELDS, seed) for seed in (torch.tensor(-7), torch.tensor([3, -7])[1], -7, 2**64 - 7)]
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])
    buffer = torch.tensor(1)
    first = tiled_dropout(x, FIELDS, buffer)
    buffer.fill_(2)
    assert not torch.equal(tiled_dropout(x, FIELDS, buffer), first)
    buffer.fill_(1)
    assert torch.equal(tiled_dropout(x, FIELDS, buffer), first)


def test_without_a_seed_manual_seed_decides() -> None:
    x = torch.ones(4, 8, 16, 16)
    torch.manual_seed(3)
    first, second = tiled_dropout(x, FIELDS), tiled_dropout(x, FIELDS)
    torch.manual_seed(3)
    assert torch.equal(tiled_dropout(x, FIELDS), first)
    assert torch.equal(tiled_dropout(x, FIELDS), second)
    assert not torch.equal(first, second)


# ---- arguments -----------------------------------------------------------------------------------------------------


def fields(**changes: float) -> torch.Tensor:
    values = {"size": 0.3, "stride": 0.2, "repeat": 2.0, "rotate": 10.0, "shear_x": 0.0, "shear_y": 0.0} | changes
    return torch.tensor(list(values.values()), dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 6, 7, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": torch.ones(2, 3, 6, 7, dtype=torch.complex64)}, TypeError, "x must be float64, .* got torch.complex64"),
        (
            {"x": torch.ones(6, 7)},
            ValueError,
            r"x must have 4 dimensions \(N, C, H, W\) or 3 \(N, C, L\), got shape \(6, 7\)",
        ),
        ({"x": torch.ones(2, 3, 7, 6)}, ValueError, "atlas must be of x's map 7x6, got one of a map 6x7"),
        ({"atlas": PATTERN}, TypeError, "atlas must be an Atlas or a tensor of fields, got TiledPattern"),
        ({"atlas": 0.3}, TypeError, "atlas must be an Atlas or a tensor of fields, got float"),
        ({"atlas": fields().float()}, ValueError, r"atlas must be an Atlas or a float64 CPU tensor .*torch.float32"),
        ({"atlas": fields()[:5]}, ValueError, r"atlas must be an Atlas or a float64 CPU tensor .*shape \(5,\)"),
        ({"atlas": fields().to("meta")}, ValueError, r"atlas must be an Atlas or a float64 CPU tensor .*on meta"),
        ({"atlas": fields(size=3.5)}, ValueError, r"size must be in \[0, 2\], got 3.5"),
        ({"atlas": fields(size=-0.1)}, ValueError, r"size must be in \[0, 2\], got -0.1"),
        ({"atlas": fields(stride=4.1)}, ValueError, r"stride must be in \[0, 4\], got 4.1"),
        ({"atlas": fields(repeat=2.5)}, ValueError, "repeat must be a whole number, got 2.5"),
        ({"atlas": fields(repeat=65)}, ValueError, r"repeat must be in \[0, 64\], got 65"),
        ({"atlas": fields(repeat=0, stride=0)}, ValueError, "stride must be above 0 when repeat is 0"),
        ({"atlas": fields(rotate=float("inf"))}, ValueError, "rotate must be finite, got inf"),
        ({"atlas": fields(size=float("nan"))}, ValueError, "size must be finite, got nan"),
        ({"atlas": fields(shear_x=2.1)}, ValueError, r"shear_x must be in \[-2, 2\], got 2.1"),
        ({"atlas": fields(shear_y=-2.1)}, ValueError, r"shear_y must be in \[-2, 2\], got -2.1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got -9223372036854775809"),
        ({"seed": 1.0}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got float"),
        ({"seed": True}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got bool"),
        ({"seed": "7"}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got str"),
        ({"seed": torch.tensor(7, dtype=torch.int32)}, TypeError, "seed must be an int64 tensor, got torch.int32"),
        ({"seed": torch.tensor([7])}, ValueError, r"seed must be a 0-d tensor, got shape \(1,\)"),
        ({"seed": torch.tensor(7).to("meta")}, ValueError, "seed must be on the device of x, cpu, got meta"),
        ({"normalize": "sum"}, ValueError, "normalize must be 'expected' or 'mask' or 'none', got 'sum'"),
        ({"normalize": None}, TypeError, "normalize must be .* got None of type NoneType"),
        ({"share_c": 1}, TypeError, "share_c must be a bool, got 1 of type int"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
        ({"rank": 2**32}, ValueError, r"rank must be in \[0, 2\^32\), got 4294967296"),
        ({"rank": 1.0}, TypeError, "rank must be None or an int, got float"),
        ({"rank": True}, TypeError, "rank must be None or an int, got bool"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    accepted = {"x": torch.ones(2, 3, 6, 7), "atlas": PATTERN.atlas(6, 7), "seed": 3, "normalize": "mask", "rank": 0}
    tiled_dropout(**accepted)
    with pytest.raises(error, match=message):
        tiled_dropout(**(accepted | arguments))


# ---- imports -------------------------------------------------------------------------------------------------------


def python(code: str, directory: Path = ROOT) -> str:
    """What a fresh interpreter prints, started in a directory, which is the first that it imports from."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("names", [("kernels", "autodropout.kernels"), ("autodropout.kernels", "kernels")])
def test_both_names_of_the_folder_reach_one_op(names: tuple[str, str]) -> None:
    printed = python(
        f"""
import importlib, torch
modules = [importlib.import_module(name) for name in {names!r}]
assert modules[0] is not modules[1] and modules[0].__file__ == modules[1].__file__
x = torch.randn(2, 3, 6, 7)
first, second = (
    module.tiled_dropout(x, module.Atlas.of(0.3, 0.25, 2, 30.0, 0.2, 0.0, 6, 7), {SEED}) for module in modules
)
crossed = modules[0].tiled_dropout(x, modules[1].Atlas.of(0.3, 0.25, 2, 30.0, 0.2, 0.0, 6, 7), {SEED})
assert torch.equal(first, second) and torch.equal(first, crossed) and 0 < (first == 0).sum() < x.numel()
assert torch.ops.autodropout.tiled_apply.overloads() == ["default"]
print("same")
"""
    )
    assert printed == "same\n"


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither the package nor its op on the CPU needs Triton; plots and data sets are for those who ask."""
    loaded = "print(sorted(set(sys.modules) & {'triton', 'datasets', 'matplotlib', 'torchvision', 'timm', 'sklearn'}))"
    assert python(f"import sys, autodropout\n{loaded}", tmp_path) == "[]\n"
    use = "autodropout.pattern_dropout(torch.ones(1, 2, 4, 4), autodropout.TiledPattern(size=0.3))"
    assert python(f"import sys, torch, autodropout, autodropout.kernels\n{use}\n{loaded}", tmp_path) == "[]\n"


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cuda_graph_capture(memory_format: torch.memory_format) -> None:
    """Forward and backward are captured, and replayed with other seeds and activations; without a seed, too."""
    x = torch.randn(4, 8, 16, 16, device="cuda").to(memory_format=memory_format).requires_grad_()
    seed = torch.tensor(SEED, device="cuda")

    def step(seed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        y = tiled_dropout(x, FIELDS, seed)
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        return y.detach(), gradient

    for given in (seed, None):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, gradient = step(given)
        replayed = []
        for value in (1, 2):
            seed.fill_(value)
            x.data.normal_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, gradient)
            if given is not None:
                assert torch.equal(y, step(seed)[0])
            replayed.append(y == 0)
        assert not torch.equal(*replayed)
