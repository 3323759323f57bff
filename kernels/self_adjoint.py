"""Ops that multiply an activation by a mask: linear and self-adjoint in it, and constant in all other arguments.

So one op is its own backward and its own forward-mode derivative, and this file is all that differentiates it.

Two mechanisms are needed. What torch.compile traces is the op of torch.library, with its rule for backward. But of such
an op forward mode takes the tangent to be zero without a word, and `torch.func.grad` refuses it. Eager code therefore
calls it inside an `autograd.Function`, which knows both; Dynamo traces no Function with a `jvp` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .registration import register_op
from .unwatched import by_the_shortest_way
from .unwatched import is_differentiated
from .unwatched import unwatched_function

Apply = Callable[..., torch.Tensor]  # (x, *others) -> y
OverBatch = Callable[..., torch.Tensor]  # (apply, x with the batch in front, *others) -> y with the batch in front


def register_self_adjoint(schema: str, implementation: Apply, over_batch: OverBatch | None = None) -> Apply:
    """Define `autodropout::<schema>`, an op that is linear and self-adjoint in its first argument x.

    Args:
        schema: `name(Tensor x, ...) -> Tensor`, among the other arguments the tensors first. y is like x.
        implementation: the op on all devices.
        over_batch: applies the op to every element of a batch, for vmap; None calls it once an element.

    Returns:
        The op as a function of the same arguments, to be called by position, that `torch.func`, forward mode and
        torch.compile differentiate. Nothing but its first argument is differentiable or can be batched by vmap.
    """
    name = schema.partition("(")[0]
    over_batch = over_batch or _element_by_element

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> list[torch.Tensor]:
        tensors = [other for other in inputs[1:] if isinstance(other, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.rest = inputs[1 + len(tensors) :]
        return tensors

    def backward(ctx: Any, apply: Apply, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        others = (*ctx.saved_tensors, *ctx.rest)
        return apply(grad, *others), *([None] * len(others))

    def vmap(apply: Apply, in_dims: tuple[int | None, ...], x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise ValueError(
                "seed and fields must not be batched by vmap: draw outside it, or call the op once per seed"
            )
        return over_batch(apply, x.movedim(in_dims[0], 0), *others), 0

    def traced(*args: Any) -> torch.Tensor:
        y: torch.Tensor = getattr(torch.ops.autodropout, name)(*args)
        return y

    def short(*args: Any) -> torch.Tensor:
        y: torch.Tensor = unwatched(*args) if is_differentiated(args[0]) else implementation(*args)
        return y

    def eager(*args: Any) -> torch.Tensor:
        y: torch.Tensor = traced(*args) if _is_constant(args[0]) else _Eager.apply(*args)
        return y

    apply = by_the_shortest_way(name, short, eager, traced)

    class _Eager(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> torch.Tensor:
            return traced(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            ctx.save_for_forward(*save(ctx, inputs, output))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return backward(ctx, apply, grad)

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> Any:
            return apply(tangent, *ctx.saved_tensors, *ctx.rest)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
            return vmap(apply, in_dims, *args)

    unwatched = unwatched_function(implementation, save, _Eager.backward)
    register_op(
        schema,
        implementation,
        lambda x, *others: torch.empty_like(x),
        setup_context=save,
        backward=lambda ctx, grad: backward(ctx, traced, grad),
        vmap=lambda info, in_dims, *args: vmap(traced, in_dims, *args),
    )

    return apply


def _is_constant(x: torch.Tensor) -> bool:
    """Whether nobody differentiates by x, as in the last backward: a Function costs more than the op on a small x."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not is_differentiated(x)


def _element_by_element(apply: Apply, x: torch.Tensor, *others: Any) -> torch.Tensor:
    """Every element is a call of its own with the same seed, and so gets the same mask."""
    return torch.stack([apply(element, *others) for element in x.unbind(0)]) if len(x) else torch.empty_like(x)
