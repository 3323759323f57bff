"""Trains one ImageNet model on one or many processes: the loop, its checkpoint after every epoch, exact continuation.

Every random number of an epoch derives from (seed, epoch) and, for what the model draws, the rank. An epoch begins from
what the checkpoint holds and nothing else: rank 0 writes weights, optimizer and averages, and every rank goes on with
its buffers. So a training that was killed and continued ends in the same weights bit for bit (on GPUs: as far as
cuDNN's kernels and nccl's sums repeat themselves).
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import TypeVar
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from autodropout import Policy
from autodropout import apply_policy
from autodropout.files import write_atomically

from . import group
from .augment import derive
from .imagenet_augment import dealt
from .imagenet_augment import epoch_order
from .imagenet_augment import evaluation_batches
from .imagenet_augment import train_batches
from .imagenet_data import Images
from .models.imagenet import NETWORKS
from .models.imagenet import build_network
from .training import MOMENTUM

Batch = TypeVar("Batch")

LABEL_SMOOTHING = 0.1
EVAL_BATCH = 100
# Of ImageNet's pixels in [0, 255], as everywhere.
MEAN = (123.675, 116.28, 103.53)
DEVIATION = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ImageNetRecipe:
    """What determines a training besides data, policy and seed.

    SGD with Nesterov momentum 0.9, weight decay on all parameters, label smoothing 0.1; the learning rate rises along a
    line over `warmup` epochs to `learning_rate` and then falls to 0 along a cosine, step by step.

    Args:
        model: one of `models.imagenet.NETWORKS`.
        epochs: of training.
        batch_size: images of a step, on all ranks together.
        micro_batch: images that a rank sends through the network at once; batch normalisation normalises over these,
            and a step accumulates the gradients of `batch_size / (micro_batch * ranks)` of them on each rank.
        ranks: processes.
        learning_rate, warmup, weight_decay: see above.
        average: decay per step of the exponential moving average of the weights that is evaluated, less in the first
            steps (`_average`); None: none.
        augment: one of `imagenet_augment.AUGMENTS`.
        compile: whether `torch.compile` is used.

    Raises:
        ValueError: the batch is not a multiple of what the ranks take at once.
    """

    model: str
    epochs: int
    batch_size: int
    micro_batch: int
    ranks: int
    learning_rate: float
    warmup: int
    weight_decay: float
    average: float | None
    augment: str
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch * self.ranks) != 0:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch * ranks = {self.micro_batch} * {self.ranks}, "
                f"got {self.batch_size}"
            )

    @property
    def accumulated(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.batch_size // (self.micro_batch * self.ranks)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 0, of an epoch's `steps`."""
        warm, total = self.warmup * steps, self.epochs * steps
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


@dataclass(frozen=True)
class TrainedModel:
    """`model`: to be evaluated. `loss`: mean of the last epoch over all ranks. `seconds`: of training, all sittings."""

    model: nn.Module
    loss: float
    seconds: float


def build_imagenet_model(recipe: ImageNetRecipe, classes: int, seed: int) -> nn.Module:
    """The network of the recipe, its weights a function of `seed` alone."""
    torch.manual_seed(derive(seed, "weights"))
    return build_network(recipe.model, classes)


def example_input(recipe: ImageNetRecipe, device: torch.device) -> torch.Tensor:
    """Two images' worth of zeros, from which `apply_policy` learns the sizes of the maps."""
    size = NETWORKS[recipe.model].image_size
    return torch.zeros(2, 3, size, size, device=device)


def train_imagenet_model(
    recipe: ImageNetRecipe,
    policy: Policy,
    images: Images,
    classes: int,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> TrainedModel:
    """Trains from scratch, or on from `checkpoint` if rank 0 finds that file. Every rank of the group must call it.

    Args:
        recipe, policy, seed: what is trained.
        images: to train on.
        classes: how many.
        device: of this rank. On GPUs: bfloat16 where autocast uses it, and channels_last.
        checkpoint: written by rank 0 after every epoch and left where it is; the others neither read nor need it.
        on_epoch: called after every epoch of the recipe, and once for each that the checkpoint has already behind it.

    Raises:
        ValueError: the group has not the recipe's number of ranks; fewer images than a batch.
        RuntimeError: the ranks ended with different weights.
    """
    normalise = Normalise(device)

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = NETWORKS[recipe.model].image_size
        order = epoch_order(len(images), recipe.batch_size, seed, epoch)
        positions = dealt(order, recipe.micro_batch, recipe.ranks, group.rank())
        distortion = derive(seed, epoch, "augment")
        return train_batches(images, recipe.augment, size, order, positions, distortion, loading_processes(device))

    def loss(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], progress: float) -> torch.Tensor:
        chosen, labels = batch
        guesses = network(normalise(chosen))
        return F.cross_entropy(guesses, labels.to(device, non_blocking=True), label_smoothing=LABEL_SMOOTHING)

    steps = len(images) // recipe.batch_size
    return fit(recipe, policy, classes, batches, steps, loss, seed, device, checkpoint, on_epoch)


def fit(
    recipe: ImageNetRecipe,
    policy: Policy,
    classes: int,
    batches: Callable[[int], Iterator[Batch]],
    steps: int,
    loss: Callable[[nn.Module, Batch, float], torch.Tensor],
    seed: int,
    device: torch.device,
    checkpoint: Path | None,
    on_epoch: Callable[[], None],
) -> TrainedModel:
    """Takes the steps of a recipe on any loss, or those that `checkpoint` has not yet behind it.

    Args:
        recipe, policy, classes, seed, device, checkpoint, on_epoch: as in `train_imagenet_model`.
        batches: this rank's micro-batches of an epoch, `recipe.accumulated` for each of its `steps`.
        loss: mean of (the network, in training mode; a micro-batch; the share of all steps taken before).

    Raises:
        ValueError, RuntimeError: as `train_imagenet_model`.
    """
    if recipe.ranks != group.ranks():
        raise ValueError(f"ranks must be {group.ranks()}, the processes of this group, got {recipe.ranks}")
    on_gpu = device.type == "cuda"
    model = build_imagenet_model(recipe, classes, seed).to(device)
    apply_policy(model, policy, example=example_input(recipe, device))
    if on_gpu:
        model.to(memory_format=torch.channels_last)
    average = _average(model, recipe.average)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, MOMENTUM, weight_decay=recipe.weight_decay, nesterov=True
    )
    state: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "loss": math.nan}
    if checkpoint is not None and group.rank() == 0 and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = group.broadcast(state)
    if state["epoch"] > 0:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
    done, seconds, mean = int(state["epoch"]), float(state["seconds"]), float(state["loss"])
    compiled = cast(nn.Module, torch.compile(model)) if recipe.compile else model
    for epoch in range(recipe.epochs):
        if epoch < done:
            on_epoch()
            continue
        start = time.perf_counter()
        mean = _train_epoch(
            recipe, model, compiled, average, optimizer, batches(epoch), steps, loss, seed, epoch, device
        )
        seconds += time.perf_counter() - start
        if checkpoint is not None and group.rank() == 0:
            contents = {
                "epoch": epoch + 1,
                "seconds": seconds,
                "loss": mean,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": None if average is None else average.state_dict(),
            }
            write_atomically(checkpoint, lambda file, contents=contents: torch.save(contents, file))  # type: ignore[misc]
        on_epoch()
    final = model if average is None else average.module
    group.check_same("the final weights", weights_digest(final))
    return TrainedModel(final, mean, seconds)


def _train_epoch(
    recipe: ImageNetRecipe,
    model: nn.Module,
    compiled: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    steps: int,
    loss: Callable[[nn.Module, Batch, float], torch.Tensor],
    seed: int,
    epoch: int,
    device: torch.device,
) -> float:
    """Leaves every rank with the same weights and buffers, and returns the mean loss over all images of the epoch."""
    # What the model draws. The ranks' masks would differ under one seed, too; those of nn.Dropout would not.
    torch.manual_seed(derive(seed, epoch, group.rank(), "masks"))
    model.train()
    # A wrapper changes the order of its sums after its first step. So that an epoch after a restart does what it does
    # without one, each has a wrapper of its own.
    network: nn.Module = compiled
    if group.started():
        network = DistributedDataParallel(compiled, device_ids=[device] if device.type == "cuda" else None)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_step, batch in enumerate(batches):
        step, part = divmod(micro_step, recipe.accumulated)
        taken = epoch * steps + step
        if part == 0:
            optimizer.param_groups[0]["lr"] = recipe.rate(taken, steps)
            optimizer.zero_grad(set_to_none=True)
        last = part + 1 == recipe.accumulated
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(network, batch, taken / (recipe.epochs * steps))
            (value / recipe.accumulated).backward()
        total += value.detach()
        if last:
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
    group.broadcast_buffers(model)
    if average is not None:
        group.broadcast_buffers(average)
    (summed,) = group.summed([float(total)])
    return summed / (steps * recipe.accumulated * recipe.ranks)


def _average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Of the weights and of the statistics of batch normalisation. After n updates the decay is at most (1 + n) / (10 +
    n), as in the code of the EfficientNets' authors: else a short training would end near where it began.
    """
    if decay is None:
        return None

    def update(averages: Any, values: Any, updates: Any) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, values, updates)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class Normalise:
    """uint8 `(N, 3, H, W)`, from any device, as the network on `device` wants them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mean, self.deviation = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, non_blocking=True).float()
        return ((images - self.mean) / self.deviation).contiguous(memory_format=self.memory_format)


def accuracy(model: nn.Module, recipe: ImageNetRecipe, images: Images, device: torch.device) -> float:
    """Share of all `images` classified correctly, in evaluation mode and full precision; the same on every rank."""
    model.eval()
    correct, normalise = 0, Normalise(device)
    crop = recipe.augment.startswith("resized_crop")
    size = NETWORKS[recipe.model].image_size
    batches = evaluation_batches(images, crop, size, EVAL_BATCH, group.rank(), group.ranks(), loading_processes(device))
    with torch.inference_mode():
        for chosen, labels in batches:
            correct += int((model(normalise(chosen)).argmax(1).cpu() == labels).sum())
    (total,) = group.summed([correct])
    return total / len(images)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def loading_processes(device: torch.device) -> int:
    """Processes that load and augment: on a GPU's machine its cores, shared by the ranks there."""
    if device.type != "cuda":
        return 0
    return max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
