"""A residual branch joined by dropout: `residual + dropout(x)` as one op, for DropPath, tiled and token patterns.

    y = residual + x * mask * scale

The masks are those of `bernoulli_dropout(..., shared="sample")`, `tiled_dropout` and `token_dropout` under the same
seed, and so are their counters. The sum is formed in the compute type (float32, float64 for float64) and rounded once
to x's type. Linear in both tensors: the gradient of residual is the incoming one itself, without a copy, and that of x
is the masked product of it. Saved are decisions (4 bytes a sample), placements (4 a plane) or a seed, never a mask.

Bytes moved per element: x and residual are read once, y is written once; backward reads and writes one activation. On
the CPU the masked product of a block of samples is added while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import torch

from .atlas import Atlas
from .atlas import atlas_of
from .bernoulli import bernoulli_dropout
from .checks import check_activation
from .checks import check_maps
from .compiled import has_numba
from .devices import triton_runs_on
from .masking import compute_type
from .masking import is_finite
from .placements import place
from .registration import register_op
from .seeds import Seed
from .self_adjoint import Apply
from .self_adjoint import register_self_adjoint
from .unwatched import by_the_shortest_way
from .unwatched import unwatched_function

# Cells whose masked product is in memory at a time: 1 MB in fp32.
BLOCK_CELLS = 1 << 18


def drop_path_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    fields: float | torch.Tensor,
    seed: Seed = None,
    normalize: str = "expected",
    rank: int | None = None,
) -> torch.Tensor:
    """`residual + bernoulli_dropout(x, fields, seed, "sample")`: stochastic depth (Huang et al. 2016) with its sum.

    Args:
        x: any shape with the batch first, at least 1 dimension; float64, float32, float16 or bfloat16.
        residual: as x: shape, dtype and device.
        fields, seed, normalize, rank: as of `bernoulli_dropout`; under one seed the same samples are dropped.

    Returns:
        Tensor with x's shape, dtype and memory format; at dropped samples the residual, whatever x holds.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """
    check_activation(x)
    _check_residual(residual, x)
    if x.dim() < 1:
        raise ValueError(f"x must have at least 1 dimension, got shape {tuple(x.shape)}")
    ones = torch.ones(x.shape[:1], dtype=compute_type(x), device=x.device)
    return _scaled_add(x, residual, bernoulli_dropout(ones, fields, seed, "sample", normalize, rank))


def tiled_dropout_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    atlas: Atlas | torch.Tensor,
    seed: Seed = None,
    share_c: bool = False,
    normalize: str = "mask",
    rank: int | None = None,
) -> torch.Tensor:
    """`residual + tiled_dropout(x, atlas, seed)`.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        residual: as x: shape, dtype and device.
        atlas, seed, share_c, normalize, rank: as of `tiled_dropout`; under one seed the masks are equal.

    Returns:
        Tensor with x's shape, dtype and memory format; at dropped cells the residual, whatever x holds.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """
    check_maps(x)
    _check_residual(residual, x)
    return _tiled_add(x, residual, *place(x, atlas, seed, share_c, normalize, rank))


def _check_residual(residual: object, x: torch.Tensor) -> None:
    check_activation(residual, "residual")
    assert isinstance(residual, torch.Tensor)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be of x's dtype {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"residual must be of x's shape {tuple(x.shape)} on {x.device}, "
            f"got {tuple(residual.shape)} on {residual.device}"
        )


# ---- implementations -----------------------------------------------------------------------------------------------


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    """Blocks of samples that stay in a cache; elsewhere than on the CPU all at once."""
    n = x.shape[0]
    at_once = max(1, BLOCK_CELLS * n // x.numel()) if x.is_cpu else n
    for first in range(0, n, at_once):
        yield slice(first, first + at_once)


def _factor_like(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return factor.view(-1, *[1] * (x.dim() - 1))


def _scale_samples(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x times the factor of its sample; 0 where that is 0, whatever x holds."""
    factor = _factor_like(factor, x)
    y = torch.empty_like(x)
    if x.dtype == factor.dtype:
        torch.mul(x, factor, out=y)
    elif x.numel():
        for block in _blocks(x):
            y[block] = x[block].to(factor.dtype).mul_(factor[block])
    if not x.is_cpu or (x.numel() and not is_finite(y)):
        y.masked_fill_(factor == 0, 0.0)
    return y


def _add_scaled_samples(x: torch.Tensor, residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if triton_runs_on(x):
        from . import residual_triton

        with torch.cuda.device(x.device):
            return residual_triton.add_scaled_samples(x, residual, factor)
    compute = factor.dtype
    factor = _factor_like(factor, x)
    for block in _blocks(x):
        if x.dtype == compute:
            torch.addcmul(residual[block], x[block], factor[block], out=y[block])
        else:
            y[block] = x[block].to(compute).mul_(factor[block]).add_(residual[block])
        if not x.is_cpu or not is_finite(y[block]):
            y[block] = torch.where(factor[block] == 0, residual[block], y[block])
    return y


def _add_tiled(
    x: torch.Tensor, residual: torch.Tensor, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if triton_runs_on(x):
        from . import residual_triton

        with torch.cuda.device(x.device):
            return residual_triton.add_tiled(x, residual, atlas_of(fields, x.shape[2:]), starts, scale)
    in_one_type = x.dtype == compute_type(x)
    if x.is_cpu and in_one_type and x.is_contiguous() and residual.is_contiguous() and has_numba():
        from . import residual_numba

        residual_numba.add_tiled(x, residual, y, atlas_of(fields, x.shape[2:]), starts, scale.item())
        return y
    for block in _blocks(x):
        part = x[block].to(compute_type(x))
        masked = torch.ops.autodropout.tiled_apply(part, fields, starts[block], scale)
        if in_one_type:
            torch.add(masked, residual[block], out=y[block])
        else:
            y[block] = masked.add_(residual[block])
    return y


# ---- registration --------------------------------------------------------------------------------------------------


def _register_add(schema: str, implementation: Callable[..., torch.Tensor], masked: Apply, masked_op: str) -> Apply:
    """Define `autodropout::<schema>`, `(Tensor x, Tensor residual, Tensor ...) -> Tensor`: residual + masked(x, ...).

    Args:
        schema: all arguments are tensors.
        implementation: the op on all devices.
        masked: the self-adjoint op as a function that eager code differentiates.
        masked_op: its name, for what torch.compile traces.

    Returns:
        The op as a function of the same arguments, which `torch.func`, forward mode and torch.compile differentiate.
    """
    name = schema.partition("(")[0]

    def traced(*args: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(torch.ops.autodropout, name)(*args)
        return y

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    def backward(ctx: Any, apply: Apply, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        others = ctx.saved_tensors
        of_x = apply(grad, *others) if ctx.needs_input_grad[0] else None
        return of_x, grad, *([None] * len(others))

    class _Eager(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> torch.Tensor:
            return traced(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            save(ctx, inputs, output)
            ctx.save_for_forward(*inputs[2:])

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return backward(ctx, masked, grad)

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor, of_residual: torch.Tensor, *_: None) -> Any:
            return masked(tangent, *ctx.saved_tensors) + of_residual

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], x: Any, residual: Any, *others: Any
        ) -> tuple[torch.Tensor, int]:
            if any(dim is not None for dim in in_dims[2:]):
                raise ValueError(
                    "seed and fields must not be batched by vmap: draw outside it, or call the op once per seed"
                )
            if info.batch_size == 0:
                batched, dim = (residual, in_dims[1]) if in_dims[0] is None else (x, in_dims[0])
                return torch.empty_like(batched), dim or 0
            both = [
                [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
                for tensor, dim in ((x, in_dims[0]), (residual, in_dims[1]))
            ]
            # Every element is a call of its own with the same seed, and so gets the same mask.
            return torch.stack([apply(one, other, *others) for one, other in zip(*both, strict=True)]), 0

    unwatched = unwatched_function(implementation, save, _Eager.backward)
    apply = by_the_shortest_way(name, unwatched, _Eager.apply, traced)
    register_op(
        schema,
        implementation,
        lambda x, *others: torch.empty_like(x),
        setup_context=save,
        backward=lambda ctx, grad: backward(ctx, getattr(torch.ops.autodropout, masked_op), grad),
    )
    return apply


def _tiled(x: torch.Tensor, *placements: torch.Tensor) -> torch.Tensor:
    from .tiled import _differentiable

    return _differentiable(x, *placements)


_scaled_add = _register_add(
    "drop_path_add(Tensor x, Tensor residual, Tensor factor) -> Tensor",
    _add_scaled_samples,
    register_self_adjoint("scale_samples(Tensor x, Tensor factor) -> Tensor", _scale_samples),
    "scale_samples",
)
_tiled_add = _register_add(
    "tiled_add(Tensor x, Tensor residual, Tensor fields, Tensor starts, Tensor scale) -> Tensor",
    _add_tiled,
    _tiled,
    "tiled_apply",
)
