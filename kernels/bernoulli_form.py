"""Where in memory the decisions of Bernoulli dropout lie, for the GPU's kernels and the CPU's compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Form:
    """A dense tensor as kernels and compiled loops see it: (samples, outer, decisions, inner) in the order of memory.

    All cells of `outer` and `inner` share a decision. With `places` (then outer = inner = 1) the decisions lie as
    (decisions / places channels within places), numbered channel by channel.
    """

    samples: int
    outer: int
    decisions: int
    inner: int
    places: int = 0


def form_of(shape: Sequence[int], strides: Sequence[int], shared: Sequence[int]) -> Form | None:
    """The form of a dense tensor without empty dimensions; None if it has none of those."""
    number_stride, number = {}, 1
    for dim in range(len(shape) - 1, 0, -1):
        number_stride[dim] = 0 if dim in shared else number
        number *= 1 if dim in shared else shape[dim]
    number_stride[0] = 0
    memory = sorted((dim for dim, side in enumerate(shape) if side > 1), key=lambda dim: -strides[dim])
    samples = 1
    if 0 in memory and 0 not in shared:
        if memory[0] != 0:
            return None
        samples = shape[0]
        del memory[0]
    groups: list[tuple[int, int]] = []  # neighbours in memory whose numbers go on without a break: size, stride
    for dim in memory:
        size, stride = shape[dim], number_stride[dim]
        if groups and groups[-1][1] == size * stride:
            size *= groups.pop()[0]
        groups.append((size, stride))
    strides_left = [stride for _, stride in groups]
    if len(groups) == 2 and strides_left == [1, groups[0][0]]:
        return Form(samples, 1, number, 1, places=groups[0][0])
    outer = groups.pop(0)[0] if strides_left[:1] == [0] and len(groups) > 1 else 1
    inner = groups.pop()[0] if strides_left[-1:] == [0] else 1
    if len(groups) > 1 or (groups and groups[0][1] != 1):
        return None
    return Form(samples, outer, number, inner)


def is_laid_out_as(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x has the strides of y, a tensor of its shape; those of sides of 1 do not matter."""
    return all(a == b for a, b, side in zip(x.stride(), y.stride(), x.shape, strict=True) if side > 1)
