"""`residual + dropout(x)` as one op: values against a float64 twin, and the contracts."""

from __future__ import annotations

from typing import Any

import mask_contracts as contracts
import numpy as np
import pytest
import torch
from mask_contracts import DTYPES
from mask_contracts import LAYOUTS
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import both_ways  # noqa: F401
from torch.autograd import forward_ad
from twins import bernoulli_numpy
from twins import residual_numpy as twin
from twins import tiled_numpy
from twins.tiled_numpy import Tiling

from autodropout import TiledPattern
from autodropout.kernels import Atlas
from autodropout.kernels import bernoulli_dropout
from autodropout.kernels import drop_path_add
from autodropout.kernels import tiled_dropout
from autodropout.kernels import tiled_dropout_add

TILING = Tiling(0.3, 0.25, 2, 30.0, 0.2)
PATTERN = TiledPattern(0.3, 0.25, 2, 30.0, 0.2)
RATE = torch.tensor([0.4], dtype=torch.float64)
NORMALIZE = ("mask", "expected", "none")
# The third is taken in several blocks of samples, the last has no table of all windows.
SHAPES = [(3, 5, 6, 7), (5, 4, 1, 1), (40, 16, 32, 32), (2, 3, 130, 90)]
KINDS = ("drop path", "tiled", "tiled shared")


def fields_of(kind: str) -> torch.Tensor:
    return RATE if kind == "drop path" else PATTERN.fields()


def add(
    kind: str, x: Any, residual: Any, fields: Any = None, seed: Any = SEED, normalize: Any = "mask", rank: Any = 0
) -> Any:
    fields = fields_of(kind) if fields is None else fields
    if kind == "drop path":
        return drop_path_add(x, residual, fields, seed, normalize, rank)
    return tiled_dropout_add(x, residual, fields, seed, kind == "tiled shared", normalize, rank)


def dropout(kind: str, x: Any, fields: Any = None, seed: Any = SEED, normalize: Any = "mask", rank: Any = 0) -> Any:
    """The op without the sum."""
    fields = fields_of(kind) if fields is None else fields
    if kind == "drop path":
        return bernoulli_dropout(x, fields, seed, "sample", normalize, rank)
    return tiled_dropout(x, fields, seed, kind == "tiled shared", normalize, rank)


def drawn(kind: str, shape: tuple[int, int, int, int], seed: int, normalize: str, rank: int) -> tuple[Any, float]:
    """Mask and scale of the twins."""
    if kind == "drop path":
        samples = bernoulli_numpy.kept((shape[0], 1), 0.4, seed, "sample", rank)
        return samples.reshape(-1, 1, 1, 1), bernoulli_numpy.scale(samples, 0.4, normalize)
    kept = tiled_numpy.mask(TILING, *shape, seed, kind == "tiled shared", rank)
    if normalize == "mask":
        return kept, tiled_numpy.mask_scale(kept)
    if normalize == "none":
        return kept, 1.0
    return kept, tiled_numpy.expected_scale(tiled_numpy.expected_rate(TILING, *shape[2:]))


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in "xr"]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind: str, index: int, dtype: torch.dtype) -> None:
    shape, normalize, rank, seed = SHAPES[index], NORMALIZE[index % 3], 3 * (index % 2), 2**40 + index
    kept, scale = drawn(kind, shape, seed, normalize, rank)
    x, residual = pair(shape, dtype)
    x[torch.from_numpy(~np.broadcast_to(kept, shape))] = float("nan")
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    result = 0.0 if compute == torch.finfo(dtype).eps / 2 else torch.finfo(dtype).eps / 2
    values = (x.double().numpy(), residual.double().numpy(), kept, scale)
    expected, bound = twin.add(*values), twin.bound(*values, compute, result)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid = x.clone(memory_format=memory_format)
        y = add(kind, laid, residual, None, seed, normalize, rank)
        assert y.dtype == dtype
        assert y.stride() == laid.stride()
        assert (np.abs(y.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str) -> None:
    """Every pair of layouts gives the values of the contiguous pair, in x's layout."""
    for layout in LAYOUTS:
        x = contracts.activation(layout)
        for other in LAYOUTS:
            residual = contracts.activation(other) + 1
            y = add(kind, x, residual)
            assert torch.equal(y, add(kind, x.contiguous(), residual.contiguous()))
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_two_ops(kind: str, dtype: torch.dtype) -> None:
    """That of the residual is the incoming gradient itself, without a copy."""
    x, residual = (tensor.requires_grad_() for tensor in pair((4, 5, 6, 7), dtype))
    upstream = pair((4, 5, 6, 7), dtype, 1)[0]
    of_x, of_residual = torch.autograd.grad(add(kind, x, residual), (x, residual), upstream)
    assert torch.equal(of_x, dropout(kind, upstream))
    assert of_residual.data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_of_differentiation_agree(kind: str) -> None:
    x, residual = (tensor.double().requires_grad_() for tensor in pair((2, 2, 3, 3)))

    def function(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = add(kind, x, residual)
        return y

    assert torch.autograd.gradcheck(
        function, (x, residual), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (x, residual), check_fwd_over_rev=True)
    with forward_ad.dual_level():
        y = function(x.detach(), forward_ad.make_dual(residual.detach(), x.detach()))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, x.detach())


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_and_infinity(kind: str, dtype: torch.dtype) -> None:
    """Where it drops, the residual stands alone, whatever x holds there."""
    x, residual = pair((4, 5, 6, 7), dtype)
    kept = dropout(kind, torch.ones_like(x)) != 0
    assert 0 < int(kept.sum()) < kept.numel()
    for value in (float("nan"), float("inf"), -float("inf")):
        expected = add(kind, torch.where(kept, x, 0.0), residual)
        assert torch.equal(add(kind, torch.where(kept, x, value), residual), expected)
        everywhere = add(kind, torch.full_like(x, value), residual)
        assert torch.equal(everywhere[~kept], residual[~kept])
        assert not bool(everywhere[kept].isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_gives_every_element_the_same_mask(kind: str) -> None:
    seed, fields = torch.tensor(SEED), fields_of(kind)
    x, residual = pair((3, 2, 4, 5, 6))
    y = torch.func.vmap(lambda x, r: add(kind, x, r, fields, seed), in_dims=(1, 1), out_dims=1)(x, residual)
    alone = torch.func.vmap(lambda r: add(kind, x[:, 0], r, fields, seed), in_dims=1, out_dims=1)(residual)
    for i in range(2):
        assert torch.equal(y[:, i], add(kind, x[:, i], residual[:, i]))
        assert torch.equal(alone[:, i], add(kind, x[:, 0], residual[:, i]))
    with pytest.raises(ValueError, match="seed and fields must not be batched by vmap"):
        torch.func.vmap(lambda seed: add(kind, x[:, 0], x[:, 0], fields, seed))(torch.arange(3))
    for in_dims in ((0, 0), (None, 0), (0, None)):
        some = [x[0, :, :2, :2] if dim is None else torch.empty(0, 2, 2, 2, 6) for dim in in_dims]
        assert torch.func.vmap(lambda x, r: add(kind, x, r, fields, seed), in_dims)(*some).shape == (0, 2, 2, 2, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_for_backward(kind: str) -> None:
    """4 bytes a sample; or 4 a plane, the scale and six fields."""
    x, residual = (tensor.requires_grad_() for tensor in pair((4, 8, 32, 32)))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        add(kind, x, residual)
    assert sum(saved) == {"drop path": 4 * 4, "tiled": 4 * 32 + 56, "tiled shared": 4 * 4 + 56}[kind]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", KINDS)
def test_memory(kind: str) -> None:
    """The output, and beyond it what a block takes."""
    x, residual = pair((64, 32, 32, 32))
    add(kind, x[:2], residual[:2])
    assert contracts.peak_bytes(lambda: add(kind, x, residual)) - x.nbytes <= 3.5 * 2**20 < x.nbytes / 2


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_tensors(kind: str, shape: tuple[int, ...]) -> None:
    x, residual = (tensor.requires_grad_() for tensor in pair(shape))
    y = add(kind, x, residual)
    y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == shape


def test_drop_path_of_any_dimensions() -> None:
    for shape in ((6,), (6, 3), (6, 3, 2), (6, 2, 2, 2, 2)):
        x, residual = pair(shape)
        y = drop_path_add(x, residual, 0.5, SEED)
        assert torch.equal(y, residual + bernoulli_dropout(x, 0.5, SEED, "sample"))
    assert torch.equal(drop_path_add(x, residual, 1.0, SEED), residual)
    assert torch.equal(drop_path_add(x, residual, 0.0, SEED), x + residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x, residual = contracts.activation(layout, dtype=dtype), contracts.activation("channels_last").to(dtype)
    factor = bernoulli_dropout(torch.ones(3), RATE, SEED)
    fields = PATTERN.fields()
    starts, scale = torch.ops.autodropout.tiled_draw(fields, torch.tensor(SEED), 3, 5, [6, 7], False, "mask", 0)
    for op, others in (("drop_path_add", (factor,)), ("tiled_add", (fields, starts, scale))):
        op = getattr(torch.ops.autodropout, op).default
        torch.library.opcheck(op, (x.clone().requires_grad_(), residual.clone().requires_grad_(), *others))
    torch.library.opcheck(torch.ops.autodropout.scale_samples.default, (x.requires_grad_(), factor))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str, layout: str) -> None:
    def step(x: Any, residual: Any, fields: Any, seed: Any) -> Any:
        return add(kind, x * 3, residual, fields, seed) * 0.7

    compiled = torch.compile(step, fullgraph=True)
    for seed in (torch.tensor(SEED), None):
        results = []
        for function in (step, compiled):
            x, residual = contracts.activation(layout).detach().requires_grad_(), pair((3, 5, 6, 7))[1].requires_grad_()
            torch.manual_seed(11)
            y = function(x, residual, fields_of(kind), seed)
            y.backward(contracts.activation("contiguous"))
            results.append((y, x.grad, residual.grad))
        for eager, got in zip(*results, strict=True):
            assert torch.equal(eager, got)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["drop path", "tiled"])
def test_no_recompilation(kind: str) -> None:
    values = [torch.tensor([i / 50], dtype=torch.float64) for i in range(51)]
    if kind == "tiled":
        values = [TiledPattern(0.01 + i / 100, 0.2, i % 5, 7.0 * i).fields() for i in range(51)]
    residual = contracts.activation("contiguous")
    contracts.check_no_recompilation(lambda x, fields, seed: add(kind, x, residual, fields, seed), values)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("tiled", {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ("tiled", {"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
        ("tiled", {"residual": torch.ones(2, 3, 6, 7).double()}, TypeError, "residual must be of x's dtype"),
        ("tiled", {"residual": torch.ones(2, 3, 6, 1)}, ValueError, r"residual must be of x's shape \(2, 3, 6, 7\)"),
        ("drop path", {"residual": torch.ones(2, 3, 6, 7, device="meta")}, ValueError, "residual must .* on meta"),
        ("tiled", {"x": torch.ones(2, 3, 6)}, ValueError, r"x must have 4 dimensions \(N, C, H, W\)"),
        ("tiled", {"fields": 0.3}, TypeError, "atlas must be an Atlas or a tensor of fields, got float"),
        ("drop path", {"fields": 1.5}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ("drop path", {"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\)"),
        ("tiled", {"seed": 1.0}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got float"),
        ("drop path", {"normalize": "sum"}, ValueError, "normalize must be .* got 'sum'"),
        ("tiled", {"normalize": None}, TypeError, "normalize must be .* got None"),
        ("tiled", {"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_arguments_are_named(kind: str, arguments: Any, error: type[Exception], message: str) -> None:
    accepted = {"x": torch.ones(2, 3, 6, 7), "residual": torch.ones(2, 3, 6, 7)}
    add(kind, **accepted)
    with pytest.raises(error, match=message):
        add(kind, **(accepted | arguments))


def test_an_atlas_of_a_sequence_is_none_of_a_map_of_one_row() -> None:
    x = torch.ones(2, 2, 1, 8)
    with pytest.raises(ValueError, match=r"^atlas must be of x's map 1x8, got one of a sequence of 8$"):
        tiled_dropout_add(x, x, Atlas.of_sequence(0.25, 0.25, 3, 8), SEED)


def test_a_sparse_residual_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"^residual must be a strided tensor, got torch.sparse_coo$"):
        drop_path_add(x, x.to_sparse(), 0.5, SEED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", 0, 1, 0, 0, 0, 3, 3), "size must be a number, got 'a' of type str"),
        ((0.5, [0.5], 1, 0, 0, 0, 3, 3), r"stride must be a number, got \[0.5\] of type list"),
        ((0.5, 0, 1, 0, 0, 0, 3.5, 3), "height must be an integer, got 3.5 of type float"),
    ],
)
def test_an_atlas_of_other_types_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        Atlas.of(*arguments)
