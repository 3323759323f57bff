"""What UDA's training would cost, for the dry runs of tables 1 and 2; see dry_run.py."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .dry_run import Cost
from .dry_run import classification_step
from .dry_run import cost_lines
from .dry_run import cost_of
from .dry_run import models_line
from .uda_task import uses_labels_alone
from .uda_training import Consistency
from .uda_training import Step
from .uda_training import step_loss


@dataclass(frozen=True)
class UdaCost:
    """Of a step of UDA on one device.

    Args:
        both: of the student's and the teacher's pass over `labelled` and `unlabelled` images.
        student: operations of the student's pass alone, forward and backward.
        passes: of a step, their gradients being accumulated.
        labelled, unlabelled: images of a pass.
    """

    both: Cost
    student: int
    passes: int
    labelled: int
    unlabelled: int

    def flops(self, method: str) -> int:
        """Of a step of a method of uda_task.py. What convolutions and matrix products do is proportional to the images,
        so labelled images alone are a part of the student's pass.
        """
        if uses_labels_alone(method):
            return self.student * self.labelled // (self.labelled + self.unlabelled) * self.passes
        return self.both.flops * self.passes

    def lines(self, size: int, copies: int, width: int) -> list[str]:
        """For the user, as `cost_lines`; `size`: side of the images."""
        images = f"{self.labelled} labelled and {self.unlabelled} unlabelled images of {size}x{size}"
        student, teacher = self.student * self.passes, (self.both.flops - self.student) * self.passes
        parameters, operations, memory = cost_lines(self.both, images, self.passes, copies, width)
        return [
            parameters,
            operations,
            f"Of these the student's pass, with gradient: {student:.3g}; the teacher's, without: {teacher:.3g}. "
            f"Supervised training on the labelled images of a step: {self.flops('supervised'):.3g}",
            memory,
        ]


def uda_cost(
    build: Callable[[], nn.Module],
    recipe: Consistency,
    labelled: int,
    unlabelled: int,
    channels: int,
    size: int,
    passes: int = 1,
) -> UdaCost:
    """The cost of UDA for a network that `build` makes, on images of `channels` x `size` x `size`; see `UdaCost`."""

    def step() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = build()
        own, other = torch.empty(labelled, channels, size, size), torch.empty(unlabelled, channels, size, size)
        images = Step(own, torch.empty(labelled, dtype=torch.int64), other, other)
        return model, lambda: step_loss(model, images, recipe, 1.0, lambda pixels: pixels)

    student = cost_of(classification_step(build, labelled + unlabelled, channels, size))
    return UdaCost(cost_of(step), student.flops, passes, labelled, unlabelled)


def uda_models_lines(
    phase: str,
    models: Mapping[str, int],
    labels: int,
    images: int,
    epochs: int,
    steps: int,
    cost: UdaCost,
    devices: int,
) -> list[str]:
    """For the user, as `models_line`: what the models of a phase cost, supervised ones and those of UDA apart.

    Args:
        phase: its name.
        models: so many of each method.
        labels, images: what each is trained on.
        epochs, steps: of each, all in all.
        cost: of a step on a device; `devices`: so many.
    """
    lines = []
    for name, alone in (("supervised", True), ("UDA", False)):
        chosen = [method for method in models if uses_labels_alone(method) == alone]
        if chosen:
            data = f"{images:,} images, {labels:,} of them with labels"
            together, flops = sum(models[method] for method in chosen), cost.flops(chosen[0]) * devices
            lines.append(models_line(f"{phase}, {name}", together, data, epochs, steps, flops))
    return lines
