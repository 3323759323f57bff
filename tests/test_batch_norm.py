"""batch_norm_pattern_relu on the CPU: values against a float64 twin and the chain of the three, and the contracts."""

from __future__ import annotations

from typing import Any

import batch_norm_cases as cases
import mask_contracts as contracts
import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import DTYPES
from batch_norm_cases import EPS
from marks import TORCH_2_6
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import both_ways  # noqa: F401
from plain_torch import plain

from autodropout import TiledPattern
from autodropout.kernels import batch_norm_pattern_relu
from autodropout.kernels import tiled_dropout

OPS = torch.ops.autodropout
PATTERN = TiledPattern(0.3, 0.25, 2, 30.0, 0.2)
FIELDS = PATTERN.fields()
LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced")
NORMALIZE = ("mask", "expected", "none")
# The last has no table of all windows; on the one before PyTorch takes several blocks of samples.
SHAPES = [
    (2, 3, 6, 7),
    (3, 5, 1, 9),
    (5, 4, 8, 8),
    (2, 1, 5, 5),
    (4, 3, 1, 1),
    (40, 16, 32, 32),
    (2, 3, 130, 90),
]


def fused(
    x: torch.Tensor, weight: Any, bias: Any, seed: Any = SEED, fields: Any = FIELDS, **options: Any
) -> torch.Tensor:
    return batch_norm_pattern_relu(x, None, None, weight, bias, fields, seed, eps=EPS, **options)


def chain(
    x: torch.Tensor, weight: Any, bias: Any, seed: Any = SEED, fields: Any = FIELDS, **options: Any
) -> torch.Tensor:
    return torch.relu(tiled_dropout(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS), fields, seed, **options))


# ---- values --------------------------------------------------------------------------------------------------------


# In float32 PyTorch adds up channels_last maps one after the other: only short sums keep the bound of pairwise ones. Of
# the long ones the comparison with the chain, which is to the bit, says more.
TWIN_CASES = [
    (index, dtype)
    for index, (n, _, h, w) in enumerate(SHAPES)
    for dtype in DTYPES
    if dtype != torch.float32 or n * h * w <= 4096
]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("index", "dtype"), TWIN_CASES)
def test_equals_the_twin(index: int, dtype: torch.dtype) -> None:
    shape = SHAPES[index]
    share_c, normalize, rank = bool(index % 2), NORMALIZE[index % 3], index % 2 * 3
    case = cases.case(shape, dtype, 2**40 + index, share_c, normalize, rank)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = case.x.clone(memory_format=memory_format).requires_grad_()
        weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
        options = {"share_c": share_c, "normalize": normalize, "rank": rank}
        y = fused(x, weight, bias, 2**40 + index, **options)
        y.backward(case.upstream)
        assert x.grad is not None
        assert (y.dtype, x.grad.dtype) == (dtype, dtype)
        assert y.stride() == x.grad.stride() == x.stride()
        cases.check({"y": y, "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}, case)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("share_c", [False, True])
# Not one channel or one cell, where contiguous and channels_last are one and PyTorch may take either kernel.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1 and shape[2:] != (1, 1)])
def test_equals_the_chain(shape: tuple[int, ...], share_c: bool) -> None:
    """In float32 on the CPU the fused op runs the operations of the chain: bit for bit, in both directions."""
    torch.manual_seed(0)
    upstream = torch.randn(shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for function in (fused, chain):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=layout).requires_grad_()
            weight, bias = (tensor.requires_grad_() for tensor in cases.affine(shape[1]))
            y = function(x, weight, bias, share_c=share_c)
            results.append((y, *torch.autograd.grad(y, (x, weight, bias), upstream)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_without_affine_parameters() -> None:
    x = torch.randn(3, 4, 6, 7)
    assert torch.equal(fused(x, None, None), chain(x, None, None))
    assert torch.equal(fused(x, None, torch.ones(4)), chain(x, None, torch.ones(4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_running_averages(momentum: float, dtype: torch.dtype) -> None:
    """As PyTorch's, but for one rounding more of the statistics and two of the sum, each of the size of its terms."""
    buffers = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = ([torch.full((5,), 3.0, dtype=buffers), torch.full((5,), 2.0, dtype=buffers)] for _ in "ab")
    for step in range(3):
        x = (torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(step)) * 3 - 1).to(dtype)
        batch_norm_pattern_relu(x, *ours, None, None, FIELDS, SEED, momentum=momentum)
        F.batch_norm(x.to(buffers), *theirs, None, None, True, momentum)
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).abs().max()) <= 3 * (step + 1) * torch.finfo(buffers).eps * 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((1, 9, 32, 48), (9, 1, 432, 9)), ((5, 2, 1, 40), (80, 1, 1, 2)), ((1, 4, 3, 5), (7, 15, 5, 1))],
)
def test_odd_strides_of_sides_of_one_cell(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
    """An image in rows of pixels, for one: it counts as channels_last, but PyTorch's kernels go by strides."""
    torch.manual_seed(0)
    cells = torch.randn(20_000).to(dtype)

    def run() -> tuple[torch.Tensor | None, ...]:
        x = cells.as_strided(shape, strides).detach().requires_grad_()
        weight, bias = (tensor.requires_grad_() for tensor in cases.affine(shape[1]))
        y = fused(x, weight, bias)
        y.backward(cells[-x.numel() :].view(shape))
        return y, x.grad, weight.grad, bias.grad

    for with_loops, without in zip(run(), plain(run)(), strict=True):
        assert torch.equal(with_loops, without)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_a_number_and_infinity(layout: str, dtype: torch.dtype) -> None:
    """A NaN spoils its channel, as in the chain, but no dropped cell; one in the gradient only where it is kept."""
    x = contracts.activation(layout).to(dtype)
    kept = tiled_dropout(torch.ones_like(x), FIELDS, SEED) != 0
    for value in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[1, 2, 3, 4] = value
        y = fused(poisoned, None, None)
        assert bool((y[~kept] == 0).all())
        assert bool(y[:, 2][kept[:, 2]].isnan().all())
        assert torch.equal(y[:, [0, 1, 3, 4]], fused(x, None, None)[:, [0, 1, 3, 4]])
        leaf = x.clone().requires_grad_()
        weight, bias = (tensor.requires_grad_() for tensor in cases.affine(5))
        leaves = (leaf, weight, bias)
        clean = torch.autograd.grad(fused(*leaves), leaves, torch.ones_like(x))
        upstream = torch.where(kept, 1.0, value).to(dtype)
        for ours, expected in zip(torch.autograd.grad(fused(*leaves), leaves, upstream), clean, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.usefixtures("both_ways")
def test_everything_dropped() -> None:
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    y = fused(x, None, None, fields=TiledPattern(2.0).fields())
    assert not bool(y.any())
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.usefixtures("both_ways")
def test_a_constant_channel_and_a_large_mean() -> None:
    """No variance: bn is the bias, but for the rounding of 5 / sqrt(eps). A large mean costs no digits of the rest."""
    x = torch.full((2, 3, 6, 7), 5.0)
    bias = torch.tensor([-1.0, 0.5, 2.0])
    largest = fused(x, None, bias, normalize="none").amax((0, 2, 3))
    rounding = 4 * torch.finfo(torch.float32).eps * 5 / EPS**0.5
    assert float((largest - torch.tensor([0.0, 0.5, 2.0])).abs().max()) <= rounding
    case = cases.case((4, 3, 6, 7), torch.float32, 3, offset=1000.0)
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias))
    y = fused(x, weight, bias, 3)
    y.backward(case.upstream)
    cases.check({"y": y, "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}, case)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    running = [torch.zeros(shape[1]), torch.ones(shape[1])]
    leaves = [torch.empty(shape), torch.ones(shape[1]), torch.ones(shape[1])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = batch_norm_pattern_relu(leaves[0], *running, *leaves[1:], FIELDS, SEED)
    assert y.shape == shape
    y.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not bool(leaf.grad.any())
    assert torch.equal(running[1], torch.ones(shape[1]))


# ---- differentiation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("share_c", [False, True])
def test_gradients_and_their_gradients(share_c: bool, normalize: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    leaves = (x, *(tensor.double().requires_grad_() for tensor in cases.affine(2)))

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return fused(*leaves, share_c=share_c, normalize=normalize)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_the_second_derivative_is_the_chains_and_the_third_is_refused() -> None:
    """To the rounding of float64; upstream of the first is x itself, which enters twice.

    PyTorch refuses the third derivative of batch normalisation; 2.6 gives one, and so do we.
    """
    results, thirds = [], []
    for function in (fused, chain):
        x = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
        (first,) = torch.autograd.grad(function(x, None, None), x, x, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), x, create_graph=True)
        results.append(second)
        if TORCH_2_6:
            thirds += torch.autograd.grad(second.sum(), x)
        else:
            with pytest.raises(RuntimeError, match=r"3rd\+ order derivatives"):
                torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(thirds[:1], thirds[1:], rtol=1e-9, atol=1e-9)


def test_forward_mode_and_vmap_are_refused() -> None:
    x = torch.randn(2, 2, 3, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward mode"):
        torch.func.jvp(lambda x: fused(x, None, None), (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: fused(x, None, None, torch.tensor(3)))(x[None])


def test_functional_gradients() -> None:
    x = torch.randn(2, 2, 3, 3).requires_grad_()
    (expected,) = torch.autograd.grad((fused(x, None, None) ** 2).sum(), x)
    assert torch.equal(torch.func.grad(lambda x: (fused(x, None, None) ** 2).sum())(x.detach()), expected)


@pytest.mark.parametrize("through_x", [False, True])
def test_running_averages_under_functional_gradients(through_x: bool) -> None:
    """They are tensors of the outside, which `torch.func` lets no op change."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((4, 2, 3, 4), generator=generator), torch.rand(2, generator=generator)
    atlas = TiledPattern(0.3, 0.3).atlas(3, 4)

    def loss(weight: torch.Tensor, running: list[torch.Tensor]) -> torch.Tensor:
        y = batch_norm_pattern_relu(x * weight.sum() if through_x else x, *running, weight, None, atlas, SEED)
        return y.sin().sum()

    expected, found = ([torch.zeros(2), torch.ones(2)] for _ in range(2))
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, expected), leaf)
    assert torch.equal(torch.func.grad(lambda weight: loss(weight, found))(weight), gradient)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert found[0].any()


@pytest.mark.parametrize(("of_x", "of_weight"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_the_second_derivative_where_dtypes_differ(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    """Equal to the one where they do not, but for the rounding of the results to their dtypes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((4, 2, 3, 4), generator=generator), torch.rand(2, generator=generator).to(of_weight)
    atlas = TiledPattern(0.3, 0.3).atlas(3, 4)

    def second(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, weight = values[0].to(of_x).requires_grad_(), values[1].to(dtype).requires_grad_()
        y = batch_norm_pattern_relu(x, None, None, weight, None, atlas, SEED)
        first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(one.double().square().sum() for one in first), (x, weight))

    for one, other in zip(second(of_weight), second(of_x), strict=True):
        assert one.isfinite().all()
        # Rounded once as a gradient and once as its gradient, of at most the largest.
        unit = torch.finfo(of_weight).eps
        assert (one.double() - other.double()).abs().max() <= 4 * unit * other.abs().max()


# ---- memory --------------------------------------------------------------------------------------------------------


def saved_bytes(function: Any, x: torch.Tensor) -> int:
    """Of storages, each once, without the parameters, which live anyway."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weight, bias = (torch.nn.Parameter(tensor) for tensor in cases.affine(x.shape[1]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(x, weight, bias)
    del kept
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (128, 32, 16, 16), (8, 16, 56, 56), (128, 64, 8, 8)])
def test_saved_for_backward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """x, the placements, mean and rstd, the scale and six fields; at most 0.51 of what the chain saves."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    ours, theirs = saved_bytes(fused, x), saved_bytes(chain, x)
    n, c = shape[:2]
    assert ours == x.nbytes + 4 * n * c + 2 * 4 * c + 8 + 48
    print(f"\n{shape} {dtype}: {ours / theirs:.4f} of the chain")
    assert ours <= 0.51 * theirs


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_of_the_forward(memory_format: torch.memory_format) -> None:
    """The output, and beyond it at most what a block needs: its mask or masked copy, and the table."""
    x = torch.randn(64, 32, 32, 32).to(memory_format=memory_format)
    fused(x[:2], None, None)
    extra = contracts.peak_bytes(lambda: fused(x, None, None)) - x.nbytes
    assert extra <= 4 * 2**20 < x.nbytes / 2 + 2**10


# ---- PyTorch's view ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x = contracts.activation(layout, dtype=dtype)
    weight, bias = cases.affine(5)
    starts, scale = OPS.tiled_draw(FIELDS, torch.tensor(SEED), 3, 5, [6, 7], False, "mask", 0)
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), FIELDS, starts, scale, EPS)
    torch.library.opcheck(OPS.batch_norm_pattern_relu.default, arguments)
    with torch.no_grad():
        _, mean, rstd, _ = OPS.batch_norm_pattern_relu(*arguments)
        grad = contracts.activation("channels_last").to(dtype)
    arguments = (grad, x.detach(), weight.detach(), bias.detach(), mean, rstd, FIELDS, starts, scale, EPS)
    torch.library.opcheck(OPS.batch_norm_pattern_relu_backward.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager(layout: str) -> None:
    """Forward, backward and running averages, with a seed and with one drawn after the same `manual_seed`."""

    def step(x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, seed: Any) -> torch.Tensor:
        return batch_norm_pattern_relu(x * 3, mean, var, weight, bias, FIELDS.clone(), seed) * 0.7

    compiled = torch.compile(step, fullgraph=True)
    for seed in (torch.tensor(SEED), None):
        results = []
        for function in (step, compiled):
            x = contracts.activation(layout).detach().requires_grad_()
            weight, bias = (tensor.requires_grad_() for tensor in cases.affine(5))
            running = [torch.zeros(5), torch.ones(5)]
            torch.manual_seed(11)
            y = function(x, weight, bias, *running, seed)
            y.backward(contracts.activation("contiguous"))
            results.append((y, x.grad, weight.grad, bias.grad))
            torch.testing.assert_close(running[0], results[0][0].new_tensor(running[0].tolist()))
        for ours, expected in zip(*results, strict=True):
            if layout == "channels_last" and TORCH_2_6:  # hands the op a contiguous x, whose sums have another order
                torch.testing.assert_close(ours, expected)
            else:
                assert torch.equal(ours, expected)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 6, 7, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": torch.ones(3, 6, 7)}, ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(3, 6, 7\)"),
        ({"x": torch.ones(1, 3, 1, 1)}, ValueError, r"x must have more than 1 value per channel .* \(1, 3, 1, 1\)"),
        ({"x": torch.ones(2, 3, 7, 6)}, ValueError, "atlas must be of x's map 7x6, got one of a map 6x7"),
        ({"weight": [1.0]}, TypeError, "weight must be None or a floating-point tensor, got list"),
        ({"bias": torch.ones(3, dtype=torch.int64)}, TypeError, "bias must be None or .* got torch.int64"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be of shape \(3,\), x's channels, on cpu, got \(4,\)"),
        ({"running_mean": torch.ones(3, device="meta")}, ValueError, "running_mean must be .* on cpu, got .* on meta"),
        ({"running_var": None}, ValueError, "running_mean and running_var must be both given or both None"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"momentum": None}, TypeError, r"momentum must be a number in \[0, 1\], got None"),
        ({"eps": -1e-5}, ValueError, r"eps must be in \[0, 1\], got -1e-05"),
        ({"atlas": 0.3}, TypeError, "atlas must be an Atlas or a tensor of fields, got float"),
        ({"atlas": FIELDS.float()}, ValueError, "atlas must be an Atlas or a float64 CPU tensor"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\)"),
        ({"normalize": "sum"}, ValueError, "normalize must be .* got 'sum'"),
        ({"share_c": 1}, TypeError, "share_c must be a bool, got 1 of type int"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    accepted = {
        "x": torch.randn(2, 3, 6, 7),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "atlas": PATTERN.atlas(6, 7),
        "seed": 3,
    }
    batch_norm_pattern_relu(**accepted)
    with pytest.raises(error, match=message):
        batch_norm_pattern_relu(**(accepted | arguments))
