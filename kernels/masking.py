"""What the ops that draw their mask anew in every pass share: checks, slices that bound memory, the masked product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence
from itertools import product

import torch

NORMALIZE = ("expected", "mask", "none")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Cells masked at a time. The six int64 buffers of Philox then take 3 MB, few enough to stay in a cache.
SLICE_CELLS = 1 << 18


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuses a string argument that is none of `allowed`: ValueError, or TypeError if it is no string."""
    stated = " or ".join(repr(choice) for choice in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {stated}, got {value!r} of type {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be {stated}, got {value!r}")


def check_activation(x: object) -> None:
    """Refuses what is not a tensor of a floating dtype that the ops know (TypeError)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float64, float32, float16 or bfloat16, got {x.dtype}")


def check_real(name: str, value: object, low: float, high: float) -> float:
    """A Python number in [low, high] as a float; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r} of type {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def check_fields(fields: torch.Tensor, names: Sequence[str]) -> None:
    """Refuses what is not a float64 CPU tensor with one number a name (ValueError). Reads no value: traceable."""
    if fields.dtype != torch.float64 or tuple(fields.shape) != (len(names),) or fields.device.type != "cpu":
        raise ValueError(
            f"fields must be a float64 CPU tensor ({', '.join(names)}), "
            f"got {fields.dtype}, shape {tuple(fields.shape)}, on {fields.device}"
        )


def boxes(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a shape into runs of at most `limit` neighbours in logical order (at least one), as leading index slices.

    All slices but the last hold one index, and the dimensions that follow are whole, so that a box is one contiguous
    run of logical indices.
    """
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) > limit:
        axis += 1
    step = max(1, limit // max(1, math.prod(shape[axis + 1 :])))
    for outer in product(*(range(side) for side in shape[:axis])):
        head = tuple(slice(i, i + 1) for i in outer)
        for start in range(0, shape[axis], step):
            yield (*head, slice(start, min(start + step, shape[axis])))


def scale_of_mask(size: int, kept: torch.Tensor) -> torch.Tensor:
    """Size / Sum of a mask as a 0-d float64 tensor on the device of `kept`, an integer tensor; 0 if nothing is kept."""
    total = torch.full((), size, dtype=torch.float64, device=kept.device)
    # torch.div of two tensors: `int / tensor` is a reciprocal and a product, rounded twice.
    return torch.where(kept > 0, torch.div(total, kept.to(torch.float64)), 0.0)


def write_product(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> None:
    """`out = x * factor` (which broadcasts), formed in the compute type, that of `factor`, and then cast."""
    if x.dtype == factor.dtype:
        torch.mul(x, factor, out=out)
        return
    factor = factor.expand(x.shape)
    for box in boxes(x.shape, 4 * SLICE_CELLS):
        out[box] = x[box].to(factor.dtype).mul_(factor[box])


def write_masked(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, dropped: torch.Tensor) -> None:
    """`out = x * scale`, zero where `dropped` (which broadcasts), whatever stood there, NaN and Inf included.

    The scale is rounded once to the compute type, float32 or for float64 tensors float64.
    """
    factor = scale.to(compute_type(x))
    if dropped.numel() < x.numel() and x.device.type == "cpu":
        # The mask of a few shared decisions costs nothing as a factor, but 0 * NaN is NaN: then, or when the sum itself
        # overflows, zeros are written as well. Asking another device would make the host wait.
        write_product(out, x, torch.where(dropped, 0.0, factor))
        if out.sum(dtype=factor.dtype).isfinite():
            return
    else:
        write_product(out, x, factor)
    out.masked_fill_(dropped, 0.0)


def compute_type(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unbatched(in_dims: tuple[int | None, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of a tensor batched by vmap; ValueError when anything else is batched too."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise ValueError("seed and fields must not be batched by vmap: draw outside it, or call the op once per seed")
    return x.unbind(in_dims[0])
