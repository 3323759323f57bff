"""Trains one network on few labels and many images without: UDA's loss in the loop of training.py.

A step takes labelled images (weakly augmented, like the recipe's) and unlabelled ones, each twice: as the teacher sees
them, weakly augmented, and as the student does, strongly. What the paper of AutoDropout leaves open, and what is chosen
here (docs/fewer-labels.md has what each choice costs):

- The teacher is the network of the moment, without gradient and without patterns: a target with holes in it would be
  noise that the student is asked to repeat. Only the patterns are in evaluation mode; batch normalisation is in
  training mode, as for the student, because its running averages are far off in the first epochs.
- The student sees labelled and unlabelled images in one forward pass: they share the statistics of batch normalisation
  and, with `normalize="mask"`, the scale of a pattern, Size/Sum over the masks of all samples of a call. In two passes
  one image, labelled and not, would differ by more than its augmentation. The teacher's pass is another one, as its
  patterns are off; both passes move the running averages.

Every random number of an epoch derives from (seed, epoch), see epochs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from autodropout import Policy
from autodropout import apply_policy
from autodropout.nn import PatternDropout

from .augment import derive
from .augment import epoch_batches
from .data import Split
from .training import Normalise
from .training import Outcome
from .training import Recipe
from .training import accuracy
from .training import build_model
from .training import example_input
from .training import fit
from .training import loading_processes
from .uda import annealing_threshold
from .uda import consistency_loss
from .uda import supervised_loss


class Consistency(Protocol):
    """What a recipe says of the loss: `weight` (lambda), `temperature` and `confidence` of `uda.consistency_loss`."""

    @property
    def weight(self) -> float: ...

    @property
    def temperature(self) -> float: ...

    @property
    def confidence(self) -> float: ...


@dataclass(frozen=True)
class UdaRecipe(Recipe):
    """`batch_size` and `augment` are those of the labelled images, `augment` also what the teacher sees.

    Args:
        unlabelled_batch: unlabelled images of a step; an epoch is one pass over all of them.
        strong_augment: what the student sees of them; one of `augment.AUGMENTS`.
        weight: lambda; with 0 the unlabelled images take no part, in as many steps.
        temperature, confidence: of `uda.consistency_loss`.
        annealing: of `uda.annealing_threshold`.

    The defaults are what UDA's paper has for CIFAR-10; its annealing is for other data.
    """

    unlabelled_batch: int
    strong_augment: str
    weight: float = 1.0
    temperature: float = 0.4
    confidence: float = 0.8
    annealing: str = "none"


@dataclass(frozen=True)
class FewLabels:
    """What is trained on: `labelled`, and `unlabelled` images uint8 `(M, C, H, W)`, whose labels are not here."""

    labelled: Split
    unlabelled: torch.Tensor


@dataclass(frozen=True)
class Step:
    """A batch: `images`, `labels`, and the same unlabelled images as the teacher and as the student see them, or None
    where they take no part.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weak: torch.Tensor | None
    strong: torch.Tensor | None


def labelled_rows(count: int, labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `count` images keep their labels, `labels` of them, and which do not; both int64, ascending.

    Raises:
        ValueError: `labels` out of range.
    """
    if not 1 <= labels < count:
        raise ValueError(f"labels must be at least 1 and below the {count} training images, got {labels}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, "labels")))
    return order[:labels].sort().values, order[labels:].sort().values


def hide_labels(split: Split, labels: int, seed: int, more: torch.Tensor | None = None) -> FewLabels:
    """Keeps the labels of that many images, drawn by `seed` without looking at them, and leaves out all others.

    So seeds differ in which images are labelled, too, and intervals over seeds contain that; classes may be unequally
    frequent. (Our choice: the data sets of the literature are fixed and balanced.)

    Args:
        split: of training.
        labels: how many are kept, at least 1, and fewer than there are images.
        seed: of the draw.
        more: further images without labels, `(M, C, H, W)`.

    Raises:
        ValueError: `labels` out of range.
    """
    kept, hidden = labelled_rows(len(split), labels, seed)
    unlabelled = split.images[hidden]
    if more is not None:
        unlabelled = torch.cat((unlabelled, more))
    return FewLabels(Split(split.images[kept], split.labels[kept]), unlabelled)


def steps_per_epoch(recipe: UdaRecipe, unlabelled: int) -> int:
    """One pass over so many unlabelled images, without those that do not fill a last batch."""
    return max(1, unlabelled // recipe.unlabelled_batch)


def epoch_steps(
    recipe: UdaRecipe, data: FewLabels, seed: int, epoch: int, device: torch.device, workers: int = 0
) -> Iterator[Step]:
    """The batches of an epoch: a function of (seed, epoch) alone, whatever the weight and the policy.

    The labelled images are passed over again and again, shuffled anew each time.
    """
    labelled = _labelled_batches(recipe, data, seed, epoch, device, workers)
    if recipe.weight == 0:
        for _ in range(steps_per_epoch(recipe, len(data.unlabelled))):
            yield Step(*next(labelled), None, None)
        return
    # Rows in place of labels. The order of an epoch depends on seed and epoch only: both views are of the same images.
    rows = Split(data.unlabelled, torch.arange(len(data.unlabelled)))
    views = [
        epoch_batches(rows, augment, derive(seed, "unlabelled"), epoch, recipe.unlabelled_batch, device, workers)
        for augment in (recipe.augment, recipe.strong_augment)
    ]
    for (weak, row), (strong, same) in zip(*views, strict=True):
        assert torch.equal(row, same)
        yield Step(*next(labelled), weak, strong)


def train_uda(
    recipe: UdaRecipe,
    policy: Policy,
    data: FewLabels,
    evaluation: Split,
    classes: int,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> Outcome:
    """As `training.train_model`, on few labels."""
    images = torch.cat((data.labelled.images, data.unlabelled))
    model = build_model(recipe, images, classes, seed)
    apply_policy(model, policy, example=example_input(images))
    normalise = Normalise(images, device)
    workers = loading_processes(device)

    def batches(epoch: int) -> Iterator[Step]:
        return epoch_steps(recipe, data, seed, epoch, device, workers)

    def loss(network: nn.Module, step: Step, progress: float) -> torch.Tensor:
        threshold = annealing_threshold(recipe.annealing, progress, classes)
        return step_loss(network, step, recipe, threshold, normalise)

    steps = steps_per_epoch(recipe, len(data.unlabelled))
    seconds = fit(model, recipe, batches, steps, loss, seed, device, checkpoint, on_epoch)
    return Outcome(accuracy(model, evaluation, normalise, device), seconds)


def step_loss(
    network: nn.Module,
    step: Step,
    recipe: Consistency,
    threshold: float,
    normalise: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """UDA's loss of a batch; without unlabelled images its supervised term alone.

    Args:
        network: with its patterns, in training mode.
        step: its labels on the device of the network.
        recipe: weight, temperature and confidence.
        threshold: of `annealing_threshold`.
        normalise: makes of images what the network takes.
    """
    own = normalise(step.images)
    if step.weak is None or step.strong is None:
        return supervised_loss(network(own), step.labels, threshold)
    with torch.no_grad(), patterns_off(network):
        teacher = network(normalise(step.weak))
    scores = network(torch.cat((own, normalise(step.strong))))
    guesses, student = scores.split((len(step.images), len(step.strong)))
    supervised = supervised_loss(guesses, step.labels, threshold)
    return supervised + recipe.weight * consistency_loss(student, teacher, recipe.temperature, recipe.confidence)


@contextmanager
def patterns_off(model: nn.Module) -> Iterator[None]:
    """Inside, the patterns of a model are in evaluation mode, and nothing else is; they also draw no seeds then."""
    active = [module for module in model.modules() if isinstance(module, PatternDropout) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


def _labelled_batches(
    recipe: UdaRecipe, data: FewLabels, seed: int, epoch: int, device: torch.device, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for turn in count():
        passes = derive(seed, epoch, "labelled")
        yield from epoch_batches(data.labelled, recipe.augment, passes, turn, recipe.batch_size, device, workers)
