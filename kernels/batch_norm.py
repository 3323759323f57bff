"""Batch normalisation, tiled pattern and ReLU as one op, for training (Ioffe & Szegedy 2015; Pham & Le 2021).

    y = relu(bn) * mask * scale,    bn = (x - mean) * rstd * weight + bias

mean and variance are those of the batch, over (N, H, W). The pattern masks the output of the normalisation, as in the
paper; it is 0 or a positive scale, so it changes places with the ReLU. Statistics, affine map, ReLU and mask are
computed in the compute type (float32, float64 for float64 x) and rounded once, to x's type.

Backward recomputes mask and sign of bn from what is saved: x, mean, rstd, weight, bias, and the placements, 4 bytes a
plane. With g = grad * mask * scale * (bn > 0), xhat = (x - mean) * rstd, and m = N * H * W (docs/fused.md):

    dbias = sum g,    dweight = sum g * xhat,    dx = weight * rstd * (g - dbias / m - xhat * dweight / m)

Mask bits and counters are those of tiled.py. Activations moved on the GPU: forward reads x twice and writes y,
backward reads x and grad twice and writes dx. The CPU leaves the normalisation to PyTorch's own kernels and does ReLU
and mask in place: in a compiled loop (batch_norm_numba.py), or block by block, while the block is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from .atlas import Atlas
from .atlas import atlas_of
from .checks import check_maps
from .checks import check_real
from .compiled import has_numba
from .compiled import is_dense
from .devices import triton_runs_on
from .masking import compute_type
from .placements import place
from .seeds import Seed
from .tiled import kept_windows
from .with_backward import Op
from .with_backward import register_with_backward

# Cells of a block of samples, and of a group of channels, on the CPU: 1 MB in fp32. From half to twice of it the times
# agree within their scatter, an eighth is slower by half.
BLOCK_CELLS = 1 << 18

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch_norm_pattern_relu(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    atlas: Atlas | torch.Tensor,
    seed: Seed = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    share_c: bool = False,
    normalize: str = "mask",
    rank: int | None = None,
) -> torch.Tensor:
    """`relu(tiled_dropout(batch_norm(x), atlas, seed))` in training, saving x and 4 bytes a plane for backward.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        running_mean, running_var: (C,), updated in place as by `torch.nn.functional.batch_norm` (the variance
            unbiased), or None.
        weight, bias: (C,), floating; None is 1 and 0.
        atlas, seed, share_c, normalize, rank: as of `tiled_dropout`; under one seed the masks are equal.
        momentum: share of the batch in the new running averages, in [0, 1].
        eps: added to the variance, in [0, 1].

    Returns:
        Tensor with x's shape, dtype and memory format. Dropped cells are 0, whatever x holds. Twice differentiable in
        x, weight and bias, the second time by the separate operations, and not by `torch.func`; forward mode and vmap
        are refused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed. Also for one value a channel, of
            which there is no variance.
    """
    check_maps(x)
    n, c, h, w = x.shape
    _check_vector("running_mean", running_mean, x)
    _check_vector("running_var", running_var, x)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be both given or both None")
    momentum, eps = check_real("momentum", momentum, 0, 1), check_real("eps", eps, 0, 1)
    if n * h * w == 1:
        raise ValueError(f"x must have more than 1 value per channel when training, got shape {tuple(x.shape)}")
    compute = compute_type(x)
    weight = torch.ones(c, dtype=compute, device=x.device) if weight is None else weight
    bias = torch.zeros(c, dtype=compute, device=x.device) if bias is None else bias
    fields, starts, scale = place(x, atlas, seed, share_c, normalize, rank)
    arguments = (x, weight, bias, fields, starts, scale, eps)
    y, mean, _, var = _op(*arguments)
    if running_mean is not None and running_var is not None and x.numel():
        _average(running_mean, mean, momentum)
        _average(running_var, var, momentum)
    result: torch.Tensor = y
    return result


@torch.no_grad()
def _average(running: torch.Tensor, of_batch: torch.Tensor, momentum: float) -> None:
    """In place, and past the transforms of `torch.func`, to which it is a tensor of the outside that changes."""
    if not torch._C._are_functorch_transforms_active():
        running.lerp_(of_batch.to(running.dtype), momentum)
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        running, of_batch = _innermost(running), _innermost(of_batch)
        running.lerp_(of_batch.to(running.dtype), momentum)


def _innermost(x: torch.Tensor) -> torch.Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _check_vector(name: str, tensor: object, x: torch.Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be None or a floating-point tensor, got {got}")
    if tensor.shape != (x.shape[1],) or tensor.device != x.device:
        raise ValueError(
            f"{name} must be of shape ({x.shape[1]},), x's channels, on {x.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )


# ---- forward -------------------------------------------------------------------------------------------------------


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    fields: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> Tensors4:
    """y, and of every channel mean, 1 / sqrt(variance + eps), and the unbiased variance, in the compute type."""
    weight, bias = weight.to(compute_type(x)), bias.to(compute_type(x))
    if x.numel() == 0:
        zeros = torch.zeros_like(weight)
        return torch.empty_like(x), zeros, zeros.clone(), zeros.clone()
    if triton_runs_on(x):
        from . import batch_norm_triton

        with torch.cuda.device(x.device):
            return batch_norm_triton.forward(x, weight, bias, atlas_of(fields, x.shape[2:]), starts, scale, eps)
    y: torch.Tensor | None = None
    mean, rstd, var = (torch.zeros_like(weight) for _ in range(3))
    mask = _Mask(fields, starts, scale, x)
    for group in _groups(x):
        # With a momentum of 1 the running averages are mean and unbiased variance of the batch.
        bn, mean[group], rstd[group] = torch.native_batch_norm(
            _part(x, group), weight[group], bias[group], mean[group], var[group], True, 1.0, eps
        )
        if _in_loops(bn):
            from . import batch_norm_numba

            batch_norm_numba.relu_(bn, mask.atlas, mask.starts_of(slice(None), group), scale.item())
        else:
            slope = weight[group] * rstd[group]
            # No |x - mean| is above sqrt(m) standard deviations: if this is finite, all cells are.
            ends = weight[group] * math.sqrt(x.numel()) + bias[group].abs() + mean[group] * slope
            finite = bool(ends.mul_(4).isfinite().all())
            for block in _blocks(bn):
                mask.multiply_(bn[block].clamp_min_(0.0), block, group, finite)
        y = _joined(y, x, group, bn)
    assert y is not None
    return y, mean, rstd, var


def _in_loops(part: torch.Tensor) -> bool:
    """Whether ReLU and mask, and their gradient, are compiled loops."""
    return part.is_cpu and is_dense(part) and has_numba()


def _joined(whole: torch.Tensor | None, x: torch.Tensor, group: slice, part: torch.Tensor) -> torch.Tensor:
    """A result like x with its channels `group` written; the part itself where that is all of it."""
    if whole is None:
        like = torch.empty_like(x, device="meta")
        if part.dtype == x.dtype and part.shape == x.shape and part.stride() == like.stride():
            return part
        whole = torch.empty_like(x)
    whole[:, group] = part
    return whole


def _groups(x: torch.Tensor) -> Iterator[slice]:
    """Channels that are taken together: all, or in 16 bits few, so that a copy in the compute type stays small."""
    n, c, h, w = x.shape
    wanted = c
    if x.dtype != compute_type(x) and x.is_contiguous():
        # PyTorch's kernel gives every thread a channel.
        wanted = max(torch.get_num_threads(), BLOCK_CELLS // (n * h * w))
    for first in range(0, c, wanted):
        yield slice(first, min(first + wanted, c))


def _part(x: torch.Tensor, group: slice) -> torch.Tensor:
    """Channels of x in the compute type, with the strides of a contiguous tensor or of channels_last.

    Where a side is 1 others count as such, but PyTorch's batch normalisation goes by strides, and rounds otherwise.
    """
    part = x[:, group].to(compute_type(x))
    _, c, h, w = part.shape
    contiguous, channels_last = (c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)
    if part.stride() in (contiguous, channels_last):
        return part
    if part.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(part.shape, channels_last)
    return part.contiguous().as_strided(part.shape, contiguous)


def _blocks(part: torch.Tensor) -> Iterator[slice]:
    """Samples whose masked product is formed while they are in the cache."""
    n = part.shape[0]
    at_once = max(1, BLOCK_CELLS * n // part.numel())
    for first in range(0, n, at_once):
        yield slice(first, first + at_once)


class _Mask:
    """The mask times the scale, as a factor on blocks of x in the compute type."""

    def __init__(self, fields: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
        self.fields, self.starts, self.scale = fields, starts, scale
        self.atlas = atlas_of(fields, x.shape[2:])
        self.compute, self.on_cpu = compute_type(x), x.is_cpu

    @cached_property
    def rows(self) -> torch.Tensor | None:
        """Row `start` is the window that begins in cell start * W. The rows overlap; nothing is written to them."""
        flat = self.atlas.kept_flat
        if flat is None or not self.on_cpu:
            return None
        height, width = self.atlas.height, self.atlas.width
        table = flat.to(self.compute).mul_(self.scale.to(self.compute))
        return table.as_strided((width * (2 * height - 1) - height + 1, height * width), (width, 1))

    def starts_of(self, block: slice, group: slice) -> torch.Tensor:
        return self.starts[block] if self.starts.shape[1] == 1 else self.starts[block, group].contiguous()

    def multiply_(self, part: torch.Tensor, block: slice, group: slice, finite: bool) -> None:
        """Masks samples `block` and channels `group` in place; dropped cells become 0, also what is not finite."""
        starts = self.starts_of(block, group)
        if self.rows is None or not part.is_contiguous():
            part.copy_(torch.ops.autodropout.tiled_apply(part, self.fields, starts, self.scale))
            return
        factors = self.rows.index_select(0, starts.reshape(-1))
        part.mul_(factors.view(*starts.shape, *part.shape[2:]))
        if not finite:
            part.masked_fill_(~kept_windows(self.atlas, starts), 0.0)


# ---- backward ------------------------------------------------------------------------------------------------------


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    fields: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> Tensors3:
    """The gradients of x, weight and bias, in their types. eps is for the second derivative alone."""
    types = weight.dtype, bias.dtype
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    if x.numel() == 0:
        return torch.empty_like(x), dweight.to(types[0]), dbias.to(types[1])
    if triton_runs_on(x):
        from . import batch_norm_triton

        with torch.cuda.device(x.device):
            of_x, dweight, dbias = batch_norm_triton.backward(
                grad, x, weight, bias, mean, rstd, atlas_of(fields, x.shape[2:]), starts, scale
            )
        return of_x, dweight.to(types[0]), dbias.to(types[1])
    dx: torch.Tensor | None = None
    mask = _Mask(fields, starts, scale, x)
    for group in _groups(x):
        part, of_group = _part(x, group), (weight[group], bias[group], mean[group], rstd[group])
        for finite in (True, False):
            if _in_loops(part):
                from . import batch_norm_numba

                g = _affine(part, *of_group)
                layout = torch.contiguous_format if g.is_contiguous() else torch.channels_last
                of_y = grad[:, group].to(g.dtype).contiguous(memory_format=layout)
                batch_norm_numba.gradient_(g, of_y, mask.atlas, mask.starts_of(slice(None), group), scale.item())
            else:
                g = torch.empty_like(part)
                for block in _blocks(part):
                    bn = _affine(part[block], *of_group)
                    of_y = grad[block, group].to(g.dtype)
                    torch.ops.aten.threshold_backward.grad_input(of_y, bn, 0.0, grad_input=g[block])
                    mask.multiply_(g[block], block, group, finite)
            gradients = torch.ops.aten.native_batch_norm_backward(
                g, part, weight[group], None, None, mean[group], rstd[group], True, 0.0, [True, True, True]
            )
            # A cell of grad that is not finite makes its sum so. Where it is dropped it must not, so once more. (Loops
            # select, and need no second time.)
            if _in_loops(part) or bool(gradients[2].isfinite().all()):
                break
        dx_of_group, dweight[group], dbias[group] = gradients
        dx = _joined(dx, x, group, dx_of_group)
    assert dx is not None
    return dx, dweight.to(types[0]), dbias.to(types[1])


def _affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """bn once more: the affine map of forward in the same operations, so that its sign is the same to the last bit."""
    return torch.native_batch_norm(x, weight * rstd, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


def _second_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the gradients, by the separate operations; a third one PyTorch refuses (2.6 gives it)."""
    if all(grad is None for grad in grads):
        return (None,) * 10
    further = torch.is_grad_enabled()
    grad, x, weight, bias, _, _, fields, starts, scale = ctx.saved_tensors
    with torch.enable_grad():
        # Views, because one tensor may be here twice.
        inputs = (grad, x, weight, bias)
        leaves = [one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in inputs]
        # In the compute type, as forward; together in another one than x's they would also be refused.
        of_x, of_weight, of_bias = (leaf.to(compute_type(x)) for leaf in leaves[1:])
        bn = F.batch_norm(of_x, None, None, of_weight, of_bias, True, 0.0, ctx.eps)
        y = torch.relu(torch.ops.autodropout.tiled_apply(bn, fields, starts, scale)).to(x.dtype)
        first = torch.autograd.grad(y, leaves[1:], leaves[0], create_graph=True)
        asked = [(one, other) for one, other in zip(first, grads, strict=True) if other is not None]
        outputs, upstream = zip(*asked, strict=True)
        second = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, create_graph=further)
    return (*second, *([None] * 6))


# ---- registration --------------------------------------------------------------------------------------------------


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> Tensors4:
    of_channels = [torch.empty_like(weight, dtype=compute_type(x)) for _ in range(3)]
    return torch.empty_like(x), of_channels[0], of_channels[1], of_channels[2]


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *others: Any
) -> Tensors3:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors4) -> None:
    x, weight, bias, fields, starts, scale, ctx.eps = inputs
    _, mean, rstd, var = output
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, fields, starts, scale)


def _differentiated(ctx: Any, backward: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return *backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
    *tensors, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


_op = register_with_backward(
    Op(
        "batch_norm_pattern_relu(Tensor x, Tensor weight, Tensor bias, Tensor fields, Tensor starts, Tensor scale, "
        "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _forward_fake,
        _save,
    ),
    Op(
        "batch_norm_pattern_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "Tensor fields, Tensor starts, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
        _backward,
        _backward_fake,
        _save_for_second,
    ),
    _differentiated,
    _second_backward,
)
