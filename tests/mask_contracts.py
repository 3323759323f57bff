"""What every op that draws its mask from a seed has to keep: checks that the tests of the ops call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

SEED = 2**40 + 8
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced")

Call = Callable[..., torch.Tensor]  # (x, fields, seed) -> y


def activation(
    layout: str, shape: tuple[int, int, int, int] = (3, 5, 6, 7), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Random numbers whose memory is laid out as named, in every dtype (a cast makes what is sliced dense)."""
    N, C, H, W = shape
    generator = torch.Generator().manual_seed(1)
    if layout == "expanded":
        return torch.randn(1, C, H, W, generator=generator).to(dtype).expand(N, -1, -1, -1)
    if layout == "sliced":
        return torch.randn(N + 1, 2 * C, H + 2, W, generator=generator).to(dtype)[1:, ::2, 1:-1]
    if layout == "transposed":
        return torch.randn(N, C, W, H, generator=generator).to(dtype).transpose(2, 3)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def check_values(x: torch.Tensor, y: torch.Tensor, kept: torch.Tensor, scale: float) -> None:
    """y is x * scale, formed in the compute type and then cast, and zero where not kept: bit for bit."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = (x.to(compute) * torch.tensor(scale, dtype=torch.float64).to(compute)).to(x.dtype)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.equal(y, torch.where(kept, product, torch.zeros((), dtype=x.dtype)))


def check_memory_format(call: Call, fields: torch.Tensor) -> None:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        x = activation(layout, dtype=dtype)
        y = call(x, fields, SEED)
        assert torch.equal(y, call(x.contiguous(), fields, SEED)), (layout, dtype)
        assert y.stride() == torch.empty_like(x).stride(), (layout, dtype)


def check_non_finite(call: Call, fields: torch.Tensor, dtype: torch.dtype) -> None:
    """Where x is NaN or Inf, dropped cells are 0 and the others are as without them."""
    x = activation("contiguous").to(dtype)
    kept = call(torch.ones_like(x), fields, SEED) != 0
    assert 0 < int(kept.sum()) < kept.numel()
    for value in (float("nan"), float("inf"), -float("inf")):
        y = call(torch.where(kept, x, value), fields, SEED)
        assert torch.equal(y, call(torch.where(kept, x, 0.0), fields, SEED))
        assert bool((y[~kept] == 0).all())
        everywhere = call(torch.full_like(x, value), fields, SEED)
        assert not bool(everywhere[kept].isfinite().any())


def check_gradients(call: Call, fields: torch.Tensor) -> None:
    x = activation("contiguous", (2, 2, 3, 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(x, fields, SEED), (x,))
    assert torch.autograd.gradgradcheck(lambda x: call(x, fields, SEED), (x,))


def check_forward_mode(call: Call, fields: torch.Tensor) -> None:
    """The op is linear: the tangent is masked as x is, with and without `torch.func`."""
    x, tangent = activation("contiguous"), activation("channels_last").neg()
    y, derivative = torch.func.jvp(lambda x: call(x, fields, SEED), (x,), (tangent,))
    assert torch.equal(y, call(x, fields, SEED))
    assert torch.equal(derivative, call(tangent, fields, SEED))
    assert bool(derivative.any())
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, tangent), fields, SEED)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, derivative)


def check_modes_of_differentiation_agree(call: Call, fields: torch.Tensor) -> None:
    x = activation("contiguous", (2, 2, 3, 3)).double().requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        return call(x, fields, SEED)

    assert torch.autograd.gradcheck(
        function, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True)
    forward, reverse = (jacobian(function)(x.detach()) for jacobian in (torch.func.jacfwd, torch.func.jacrev))
    assert torch.equal(forward, reverse)
    factors = call(torch.ones_like(x.detach()), fields, SEED).flatten()
    assert torch.equal(forward.view(36, 36), torch.diag(factors))


def check_functional_gradients(call: Call, fields: torch.Tensor) -> None:
    """`torch.func.grad`, of itself and by sample, against `backward` and against calls sample by sample."""
    x = activation("contiguous")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (call(x, fields, SEED) ** 3).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)
    per_sample = torch.func.vmap(torch.func.grad(lambda sample: loss(sample[None])))(x)
    for i in range(len(x)):
        assert torch.equal(per_sample[i], torch.func.grad(loss)(x[i : i + 1])[0])
    hessian_times_one = torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    mask = call(torch.ones_like(x), fields, SEED)
    torch.testing.assert_close(hessian_times_one, 6 * x * mask**3)


def check_compiled_transformations(call: Call, fields: torch.Tensor) -> None:
    """Transformations inside torch.compile give what they give outside, or refuse where the graph must be whole."""
    x, seed = activation("contiguous"), torch.tensor(SEED)
    grad = torch.func.grad(lambda x: (call(x, fields, seed) ** 3).sum())
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "jvp": lambda x: torch.func.jvp(lambda x: call(x, fields, seed), (x,), (x,))[1],
        "grad": grad,
        "vmap": torch.func.vmap(lambda sample: call(sample[None], fields, seed)),
        "per-sample gradients": torch.func.vmap(lambda sample: grad(sample[None])),
    }
    for name, function in functions.items():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(function, backend="aot_eager")(x), function(x)), name
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(functions["jvp"], backend="aot_eager", fullgraph=True)(x)


def check_backward_is_the_op(call: Call, fields: torch.Tensor) -> None:
    for dtype in DTYPES:
        x = activation("contiguous").to(dtype).requires_grad_()
        grad = activation("channels_last").to(dtype)
        call(x, fields, SEED).backward(grad)
        assert torch.equal(x.grad, call(grad, fields, SEED))


def saved_bytes(call: Call, fields: torch.Tensor) -> int:
    """Bytes of what a call saves for backward."""
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    x = activation("contiguous", (4, 8, 32, 32)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x, fields, torch.tensor(SEED))
    return sum(saved)


def check_opcheck(call: Call, fields: torch.Tensor, layout: str, dtype: torch.dtype) -> None:
    """opcheck on every op that a call reaches, with the arguments that reach it."""
    reached: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "autodropout":
                reached.append((func, args))
            return func(*args, **(kwargs or {}))

    x = activation(layout, dtype=dtype)
    with Record():
        call(x, fields, torch.tensor(SEED))
    assert len(reached) == 2
    for op, args in reached:
        inputs = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args)
        torch.library.opcheck(op, inputs)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that a cell that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fresh = torch.empty(3)
    assert fresh.isnan().all()
    assert torch.empty_like(fresh).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled_equals_eager(call: Call, fields: torch.Tensor, layout: str) -> None:
    """Forward and backward bitwise, with a seed and with one drawn after the same `manual_seed`."""

    def step(x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        return call(x * 3, fields, seed) * 0.7

    compiled = torch.compile(step, fullgraph=True)
    for seed in (torch.tensor(SEED), None):
        results = []
        for function in (step, compiled):
            x = activation(layout).detach().requires_grad_()
            torch.manual_seed(11)
            y = function(x, fields, seed)
            y.backward(activation("contiguous"))
            results.append((y.detach(), x.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def check_no_recompilation(call: Call, values: list[torch.Tensor]) -> None:
    """Other fields and other seeds, and a fallback to eager, would raise."""
    compiled = torch.compile(call, fullgraph=True)
    x = activation("contiguous")
    compiled(x, values[0], torch.tensor(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, fields in enumerate(values):
            assert torch.equal(compiled(x, fields, torch.tensor(seed)), call(x, fields, seed))


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that PyTorch's CPU allocator had handed out at once during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    steps: list[tuple[int, int]] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            steps.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        held += size
        peak = max(peak, held)
    assert peak > 0
    return peak
