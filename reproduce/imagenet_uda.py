"""UDA in the loop of imagenet_training.py: ImageNet with a share of its labels, on one or many processes.

The choices are those of uda_training.py, whose loss of a step this is. Labelled and unlabelled images of a step are
each dealt out to the ranks and their micro-batches as those of a supervised training are, so every rank has its own;
order and distortion of an image depend on (seed, epoch, position) and not on ranks, micro-batches or methods.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autodropout import Policy

from . import group
from .augment import derive
from .imagenet_augment import dealt
from .imagenet_augment import epoch_order
from .imagenet_augment import train_batches
from .imagenet_augment import view_batches
from .imagenet_data import Images
from .imagenet_data import Part
from .imagenet_training import ImageNetRecipe
from .imagenet_training import Normalise
from .imagenet_training import TrainedModel
from .imagenet_training import fit
from .imagenet_training import loading_processes
from .models.imagenet import NETWORKS
from .uda import annealing_threshold
from .uda_training import Step
from .uda_training import labelled_rows
from .uda_training import step_loss

# Processes that load the labelled images beside those for the unlabelled ones, which are many times as many.
FEW = 2


@dataclass(frozen=True, kw_only=True)
class ImageNetUdaRecipe(ImageNetRecipe):
    """`batch_size`, `micro_batch` and `augment` are those of the labelled images, `augment` also what the teacher sees.
    There is no label smoothing: UDA's loss has none.

    Args:
        unlabelled: images without labels beside each labelled one of a step, and so of a micro-batch: the student sees
            `micro_batch * (1 + unlabelled)` at once. An epoch is one pass over all of them.
        strong_augment: what the student sees of them; one of `imagenet_augment.AUGMENTS`.
        weight: lambda; with 0 the unlabelled images take no part, in as many steps.
        temperature, confidence: of `uda.consistency_loss`; the defaults are what UDA's paper has for ImageNet.
        annealing: of `uda.annealing_threshold`, over the labelled images of a micro-batch (our choice).
    """

    unlabelled: int
    strong_augment: str
    weight: float = 1.0
    temperature: float = 0.4
    confidence: float = 0.5
    annealing: str = "none"

    @property
    def unlabelled_batch(self) -> int:
        """Unlabelled images of a step, on all ranks together."""
        return self.batch_size * self.unlabelled


class Unlabelled(Part):
    """Some of the images, with their row numbers in place of labels, which are not looked up."""

    def __init__(self, images: Images, indices: torch.Tensor) -> None:
        self.images, self.indices = images, indices
        self.labels = torch.arange(len(indices))


@dataclass(frozen=True)
class FewLabels:
    """What is trained on."""

    labelled: Images
    unlabelled: Unlabelled


def hide_labels(images: Images, labels: int, seed: int) -> FewLabels:
    """Keeps the labels of that many images, drawn by `seed` without looking at them, and never reads the others.

    Raises:
        ValueError: `labels` is not between 1 and the number of images, less one.
    """
    kept, hidden = labelled_rows(len(images), labels, seed)
    return FewLabels(Part(images, kept.tolist()), Unlabelled(images, hidden))


def steps_per_epoch(recipe: ImageNetUdaRecipe, labelled: int, unlabelled: int) -> int:
    """One pass over so many unlabelled images, without those that do not fill a last batch.

    Raises:
        ValueError: fewer images of a kind than a batch has.
    """
    kinds = {"labelled": (labelled, recipe.batch_size), "unlabelled": (unlabelled, recipe.unlabelled_batch)}
    for kind, (images, batch) in kinds.items():
        if images < batch:
            raise ValueError(f"the {images:,} {kind} images must be at least those of a step, {batch:,}")
    return unlabelled // recipe.unlabelled_batch


def epoch_steps(recipe: ImageNetUdaRecipe, data: FewLabels, seed: int, epoch: int, workers: int) -> Iterator[Step]:
    """This rank's micro-batches of an epoch, on the CPU: a function of (seed, epoch, rank), whatever the weight and the
    policy. The labelled images are passed over again and again, shuffled anew each time.

    Args:
        workers: processes that load; 0 is this one.
    """
    size = NETWORKS[recipe.model].image_size
    steps = steps_per_epoch(recipe, len(data.labelled), len(data.unlabelled))
    passes = -(-steps // (len(data.labelled) // recipe.batch_size))
    turns = [
        epoch_order(len(data.labelled), recipe.batch_size, derive(seed, epoch, "labelled"), turn)
        for turn in range(passes)
    ]
    order = torch.cat(turns)[:steps]
    positions = dealt(order, recipe.micro_batch, recipe.ranks, group.rank())
    few = workers if recipe.weight == 0 else min(workers, FEW)
    own = train_batches(data.labelled, recipe.augment, size, order, positions, derive(seed, epoch, "augment"), few)
    if recipe.weight == 0:
        for images, labels in own:
            yield Step(images, labels, None, None)
        return
    order = epoch_order(len(data.unlabelled), recipe.unlabelled_batch, derive(seed, "unlabelled"), epoch)
    positions = dealt(order, recipe.micro_batch * recipe.unlabelled, recipe.ranks, group.rank())
    views = [(recipe.augment, derive(seed, epoch, "weak")), (recipe.strong_augment, derive(seed, epoch, "strong"))]
    both = view_batches(data.unlabelled, views, size, order, positions, workers)
    for (images, labels), (weak, strong, _) in zip(own, both, strict=True):
        yield Step(images, labels, weak, strong)


def train_uda_imagenet(
    recipe: ImageNetUdaRecipe,
    policy: Policy,
    data: FewLabels,
    classes: int,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> TrainedModel:
    """As `imagenet_training.train_imagenet_model`, on few labels."""
    normalise = Normalise(device)

    def batches(epoch: int) -> Iterator[Step]:
        for step in epoch_steps(recipe, data, seed, epoch, loading_processes(device)):
            yield Step(step.images, step.labels.to(device, non_blocking=True), step.weak, step.strong)

    def loss(network: nn.Module, step: Step, progress: float) -> torch.Tensor:
        return step_loss(network, step, recipe, annealing_threshold(recipe.annealing, progress, classes), normalise)

    steps = steps_per_epoch(recipe, len(data.labelled), len(data.unlabelled))
    return fit(recipe, policy, classes, batches, steps, loss, seed, device, checkpoint, on_epoch)
