"""Ops whose backward is an op of its own, with second derivatives by the separate operations.

Two mechanisms are needed, as in self_adjoint.py. What torch.compile traces are the ops of torch.library. But of such an
op forward mode takes the tangent to be zero without a word; eager code therefore calls the ops inside Functions, of
which forward mode and vmap know that they cannot differentiate or batch them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import torch

from .registration import register_op
from .unwatched import by_the_shortest_way
from .unwatched import is_unwatched
from .unwatched import unwatched_function


class Op(NamedTuple):
    """What `register_op` takes; `save`: the `setup_context` that keeps what the op's derivative needs."""

    schema: str
    implementation: Callable[..., Any]
    fake: Callable[..., Any]
    save: Callable[..., Any]


def register_with_backward(
    forward: Op,
    backward: Op,
    differentiated: Callable[..., Any],
    second_backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Define both ops.

    Args:
        forward: its first output is the differentiable one.
        backward: called by `differentiated`.
        differentiated: from ctx, a function that calls the backward op, and the gradient of the first output (None if
            there is none), the gradients of all inputs.
        second_backward: from ctx and the gradients of the backward op's outputs, those of all its inputs.

    Returns:
        The forward op as a function of the same arguments, to be called by position.
    """
    name, backward_name = (op.schema.partition("(")[0] for op in (forward, backward))
    save, save_for_second = forward.save, backward.save

    def call(*args: Any) -> Any:
        return getattr(torch.ops.autodropout, name)(*args)

    def call_backward(*args: Any) -> Any:
        return getattr(torch.ops.autodropout, backward_name)(*args)

    class _Eager(torch.autograd.Function):
        setup_context = staticmethod(save)

        @staticmethod
        def forward(*args: Any) -> Any:
            return call(*args)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
            return differentiated(ctx, op_of_backward, grad)

    class _EagerBackward(torch.autograd.Function):
        setup_context = staticmethod(save_for_second)
        backward = staticmethod(second_backward)

        @staticmethod
        def forward(*args: Any) -> Any:
            return call_backward(*args)

    unwatched = unwatched_function(forward.implementation, save, _Eager.backward)
    unwatched_backward = unwatched_function(backward.implementation, save_for_second, second_backward)
    op = by_the_shortest_way(name, unwatched, _Eager.apply, call)

    def op_of_backward(*args: Any) -> Any:
        if is_unwatched(args):
            return unwatched_backward(*args)
        # Compiled autograd traces this, and no Function in it.
        return call_backward(*args) if torch.compiler.is_compiling() else _EagerBackward.apply(*args)

    def traced(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        return differentiated(ctx, call_backward, grad)

    register_op(*forward[:3], setup_context=save, backward=traced)
    register_op(*backward[:3], setup_context=save_for_second, backward=second_backward)

    return op
