"""What a training would cost, without doing any of it: parameters, floating-point operations and memory of a step.

The step runs on PyTorch's meta device, where tensors have shapes and no numbers, so a model of any size is looked at in
seconds, on any machine. Only where the numbers decide what is computed, as in an adaptive softmax, it runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass.

    Args:
        parameters: trainable numbers.
        flops: floating-point operations of convolutions and matrix products, a multiplication and an addition being
            two; what only passes over the memory (normalisation, activations, patterns) is not counted.
        saved_numbers: floating-point numbers that autograd keeps from forward to backward, parameters not among them.
        saved_bytes: bytes of what else it keeps (integers, booleans).
    """

    parameters: int
    flops: int
    saved_numbers: int
    saved_bytes: int

    def activation_bytes(self, width: int) -> int:
        """Of what autograd keeps, if its floating-point numbers have `width` bytes."""
        return self.saved_numbers * width + self.saved_bytes


def cost_of(build: Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]], device: str = "meta") -> Cost:
    """The cost of a step.

    Args:
        build: called with `device` as the default: returns the model, in training mode, and a function that computes
            the loss of a batch from it.
        device: "cpu" for a model whose numbers decide what it computes, which then does it.
    """
    saved: dict[int, tuple[torch.Tensor, int, bool]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The tensor is held, or another storage could get its address.
        saved[storage._cdata] = (tensor, storage.nbytes() // tensor.element_size(), tensor.is_floating_point())
        return tensor

    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
    )
    with torch.device(device):
        model, loss = build()
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss().backward()
    kept = [(tensor, numbers, real) for key, (tensor, numbers, real) in saved.items() if key not in own]
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        flops=counter.get_total_flops(),
        saved_numbers=sum(numbers for _, numbers, real in kept if real),
        saved_bytes=sum(numbers * tensor.element_size() for tensor, numbers, real in kept if not real),
    )


def convolution_backward_flops(
    grad_out_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    out_shape: Any = None,
) -> int:
    """The gradients of the input and of the weights cost what the forward pass costs, each.

    PyTorch's own formula ignores groups in the gradient of the weights, which makes an EfficientNet-B0 14 times as
    expensive as it is.
    """
    # weight: (out, in / groups, ...) and one product per output cell; transposed: (in, out / groups, ...), per input.
    cells = x_shape if transposed else grad_out_shape
    products = cells[0] * torch.Size(cells[2:]).numel() * torch.Size(weight_shape).numel()
    return 2 * products * sum(bool(wanted) for wanted in output_mask[:2])


def cost_lines(cost: Cost, batch: str, passes: int, copies: int, width: int) -> list[str]:
    """For the user: parameters, operations and memory of a step on each device.

    Args:
        cost: of one pass.
        batch: what goes through the network in one pass, in words.
        passes: of a step, their gradients being accumulated.
        copies: numbers that optimizer and averages keep for each parameter.
        width: bytes of a kept floating-point number: 2 under autocast to bfloat16, else 4.
    """
    weights, averages = 8 * cost.parameters / GIB, 4 * copies * cost.parameters / GIB
    kept = cost.activation_bytes(width) / GIB
    times = "" if passes == 1 else f", {passes} times a step"
    return [
        f"Parameters: {cost.parameters:,}",
        f"Operations: {cost.flops * passes:.3g} floating-point operations a step on each device, forward and backward "
        f"({batch}{times}; convolutions and matrix products, by torch.utils.flop_counter)",
        f"Memory of a device, estimated: {weights + averages + kept:.2f} GiB = weights and gradients {weights:.2f} + "
        f"optimizer and averages {averages:.2f} + what autograd keeps of one pass, {width} bytes a number, {kept:.2f} "
        "(no workspaces, no fragmentation)",
    ]


def models_line(name: str, models: int, data: str, epochs: int, steps: int, flops: int) -> str:
    """For the user: what all models of a phase cost.

    Args:
        name: of the phase.
        models: so many.
        data: what each is trained on.
        epochs, steps: of each.
        flops: of a step, on all devices.
    """
    return (
        f"{models} models {name}: {data}, {epochs} epochs, {steps:,} steps, {flops * steps:.3g} floating-point "
        f"operations each, {models * flops * steps:.3g} together"
    )


def classification_step(
    build: Callable[[], nn.Module], batch: int, channels: int, size: int, label_smoothing: float = 0.0
) -> Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]]:
    """For `cost_of`: a network that `build` makes, on `batch` images of `channels` x `size` x `size`."""

    def step() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = build()
        images = torch.empty(batch, channels, size, size)
        labels = torch.empty(batch, dtype=torch.int64)
        return model, lambda: F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    return step
