"""The short way to an op, for eager code on the CPU at which nothing looks on but autograd.

Modes, transforms, tracers and profilers see an op through PyTorch's dispatcher, and `torch.func` an
`autograd.Function` through its `setup_context`. They take half of the time of a call on a small activation
(docs/cpu-speed.md). What others register for the ops, a rule of autocast or an implementation for the CPU, is not asked
on the short way, and an `ExecutionTraceObserver` alone does not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd import profiler


def _bits(*names: str) -> int:
    """Sets of keys are compared by their bits: in torch 2.6 they are equal to nothing but themselves."""
    keys = [getattr(torch._C.DispatchKey, name) for name in names]
    bits: int = reduce(lambda key_set, key: key_set.add(key), keys[1:], torch._C.DispatchKeySet(keys[0])).raw_repr()
    return bits


try:
    from torch._C import _dispatch_keys
    from torch._C import _dispatch_tls_local_include_set
    from torch._C import _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled

    # What an ordinary tensor of the CPU has, and a thread in which no mode, transform or tracer is on.
    _OF_TENSOR = _bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _OF_THREAD = _bits("BackendSelect", "ADInplaceOrView")
    _CAN_ASK = True
except (AttributeError, ImportError):  # private names, which another PyTorch may lack: all go the long way then
    _CAN_ASK = False

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_unwatched(args: tuple[Any, ...]) -> bool:
    """Whether dispatcher and `torch.func` would do nothing but call the implementation of an op of these arguments."""
    if not _CAN_ASK or torch.compiler.is_compiling():
        return False
    if _dispatch_tls_local_include_set().raw_repr() != _OF_THREAD:
        return False
    if (
        _len_torch_function_stack()
        or _profiler_enabled()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    ):
        return False
    for arg in args:
        if isinstance(arg, torch.Tensor) and (
            type(arg) not in _ORDINARY or _dispatch_keys(arg).raw_repr() != _OF_TENSOR
        ):
            return False
    return True


def is_differentiated(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def unwatched_function(
    implementation: Callable[..., Any], save: Callable[..., object], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An `autograd.Function` of the form before `setup_context`, to be applied where `is_unwatched`.

    Args:
        implementation: of the op.
        save: what would be the `setup_context`: called with ctx, the tuple of arguments and the output.
        backward: as of a Function.
    """

    class _Unwatched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = implementation(*args)
            save(ctx, args, output)
            return output

    _Unwatched.backward = staticmethod(backward)  # type: ignore[method-assign]
    apply: Callable[..., Any] = _Unwatched.apply
    return apply


def by_the_shortest_way(
    name: str, short: Callable[..., Any], eager: Callable[..., Any], traced: Callable[..., Any]
) -> Callable[..., Any]:
    """An op as a function of its arguments, by position.

    Args:
        name: of the op, for errors.
        short: where nothing looks on.
        eager: where something does, outside torch.compile: a Function that knows how it is differentiated.
        traced: inside torch.compile: the op of torch.library.
    """

    def op(*args: Any) -> Any:
        if is_unwatched(args):
            return short(*args)
        if not torch.compiler.is_compiling():
            return eager(*args)
        if forward_ad._current_level >= 0:
            # Dynamo leaves the graph here, and raises if it must not. Going on would give zeros.
            raise RuntimeError(f"{name} has no forward-mode derivative inside torch.compile")
        return traced(*args)

    return op
