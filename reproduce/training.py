"""Trains one network on images; see epochs.py for checkpoints and exact continuation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from autodropout import Policy
from autodropout import apply_policy

from .augment import derive
from .augment import epoch_batches
from .data import Split
from .epochs import Part
from .epochs import run_epochs
from .models.wide_resnet import WideResNet

Batch = TypeVar("Batch")

MOMENTUM = 0.9
EVAL_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """What determines a training besides data, policy and seed.

    SGD with Nesterov momentum 0.9, weight decay on all parameters, learning rate from `learning_rate` to 0 along a
    cosine over all steps (the schedule is our choice; the rest is that of the wide residual networks' paper).
    """

    depth: int
    width: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    augment: str


@dataclass(frozen=True)
class Outcome:
    """`accuracy` in [0, 1] on the evaluation split after the last epoch; `seconds` of training in all sittings."""

    accuracy: float
    seconds: float


def build_model(recipe: Recipe, images: torch.Tensor, classes: int, seed: int) -> WideResNet:
    """The network of the recipe for images `(N, C, H, W)`, its weights a function of `seed` alone."""
    torch.manual_seed(derive(seed, "weights"))
    return WideResNet(recipe.depth, recipe.width, classes, images.shape[1])


def train_model(
    recipe: Recipe,
    policy: Policy,
    train: Split,
    evaluation: Split,
    classes: int,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
    on_accuracy: Callable[[int, float], None] | None = None,
    accuracy_every: int = 1,
) -> Outcome:
    """Trains from scratch, or on from `checkpoint` if that file exists, and measures the accuracy on `evaluation`.

    `on_epoch` is called after every epoch of the recipe, and once for each that the checkpoint has already behind it.
    `on_accuracy` is called with (epochs, accuracy on `evaluation`) after every `accuracy_every` epochs but the last;
    measuring changes nothing of the training, and what it raises ends it.
    `checkpoint` is written after every epoch and left where it is.
    """
    model = build_model(recipe, train.images, classes, seed)
    apply_policy(model, policy, example=example_input(train.images))
    normalise = Normalise(train.images, device)
    workers = loading_processes(device)

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return epoch_batches(train, recipe.augment, seed, epoch, recipe.batch_size, device, workers)

    def loss(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], progress: float) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(network(normalise(images)), labels)

    def after_epoch(done: int) -> None:
        if on_accuracy is not None and done % accuracy_every == 0 and done < recipe.epochs:
            on_accuracy(done, accuracy(model, evaluation, normalise, device))

    steps = max(1, len(train) // recipe.batch_size)
    seconds = fit(model, recipe, batches, steps, loss, seed, device, checkpoint, on_epoch, after_epoch)
    return Outcome(accuracy(model, evaluation, normalise, device), seconds)


def fit(
    model: nn.Module,
    recipe: Recipe,
    batches: Callable[[int], Iterator[Batch]],
    steps: int,
    loss: Callable[[nn.Module, Batch, float], torch.Tensor],
    seed: int,
    device: torch.device,
    checkpoint: Path | None,
    on_epoch: Callable[[], None],
    after_epoch: Callable[[int], None] = lambda done: None,
) -> float:
    """Takes the steps of a recipe on any loss, or those that `checkpoint` has not yet behind it.

    Args:
        model: with its policy, on the CPU; moved to `device`.
        batches: of an epoch, `steps` of them.
        loss: of (the network, compiled on a GPU, in training mode; a batch; the share of all steps taken before).
        seed: of the masks, with the epoch.
        checkpoint, on_epoch: as in `train_model`.
        after_epoch: called with the number of epochs done; may leave the model in evaluation mode.

    Returns:
        Seconds of training in all sittings.
    """
    on_gpu = device.type == "cuda"
    model.to(device)
    if on_gpu:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, MOMENTUM, weight_decay=recipe.weight_decay, nesterov=True
    )
    half = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and half == torch.float16)
    network = cast(nn.Module, torch.compile(model)) if on_gpu else model

    def train_epoch(epoch: int) -> None:
        model.train()
        for step, batch in enumerate(batches(epoch)):
            progress = (epoch * steps + step) / (recipe.epochs * steps)
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, half, enabled=on_gpu):
                value = loss(network, batch, progress)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()

    parts: dict[str, Part] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    return run_epochs(recipe.epochs, train_epoch, parts, seed, device, checkpoint, on_epoch, after_epoch)


def loading_processes(device: torch.device) -> int:
    """For augmentation image by image: none on a CPU, which has enough to do."""
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0


class Normalise:
    """Zero mean and unit variance per channel over the images given first, which are training images."""

    def __init__(self, images: torch.Tensor, device: torch.device) -> None:
        # From the histogram: exact, and no float copy of the data set.
        levels = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in range(images.shape[1]):
            share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
            share /= share.sum()
            mean = (share * levels).sum()
            means.append(mean)
            deviations.append(((share * (levels - mean) ** 2).sum()).sqrt().clamp(min=1.0))
        self.mean = torch.stack(means).float().view(1, -1, 1, 1).to(device)
        self.deviation = torch.stack(deviations).float().view(1, -1, 1, 1).to(device)
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() - self.mean) / self.deviation).contiguous(memory_format=self.memory_format)


def accuracy(model: nn.Module, split: Split, normalise: Normalise, device: torch.device) -> float:
    """Share of `split` classified correctly, in evaluation mode and full precision."""
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(split), EVAL_BATCH):
            chosen = slice(start, start + EVAL_BATCH)
            guesses = model(normalise(split.images[chosen].to(device))).argmax(1).cpu()
            correct += int((guesses == split.labels[chosen]).sum())
    return correct / len(split)


def example_input(images: torch.Tensor) -> torch.Tensor:
    """Two images' worth of zeros, from which `apply_policy` learns the sizes of the maps."""
    return torch.zeros(2, *images.shape[1:])
