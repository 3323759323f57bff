"""Batches of one rank, a pure function of (seed, epoch, position in the epoch), as in augment.py.

The images of an epoch are a shuffled list, cut into steps. Each step is dealt out to the ranks and their micro-batches;
which image a position has and how it is cut and distorted does not depend on ranks, micro-batches or workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .augment import derive
from .imagenet_data import Images

AUGMENTS = ("none", "resized_crop_flip", "randaugment", "resized_crop_flip+randaugment")
# The usual evaluation: the shorter side becomes 256 where the network takes 224, then the centre is cut out.
RESIZE = 256 / 224


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> torch.Tensor:
    """(steps, batch_size) int64: the images of every step. Those that do not fill a last step are left out.

    Raises:
        ValueError: fewer images than a batch.
    """
    if count < batch_size:
        raise ValueError(f"batch_size must be at most {count}, the training images, got {batch_size}")
    generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
    return torch.randperm(count, generator=generator)[: count // batch_size * batch_size].view(-1, batch_size)


def dealt(order: torch.Tensor, micro_batch: int, ranks: int, rank: int) -> torch.Tensor:
    """(micro-batches, micro_batch) int64: the positions in the epoch that a rank trains on, step after step.

    A step has `batch_size / (micro_batch * ranks)` micro-batches on each rank.
    """
    positions = torch.arange(order.numel()).view(order.shape[0], -1, ranks, micro_batch)
    return positions[:, :, rank].reshape(-1, micro_batch)


def train_batches(
    images: Images, augment: str, size: int, order: torch.Tensor, positions: torch.Tensor, seed: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches (images uint8 `(B, 3, size, size)`, labels int64 `(B,)`).

    Args:
        images: of which `order` (steps, batch_size) names some.
        augment: one of AUGMENTS; without a crop the images must have one size, and keep it.
        size: side of the cut.
        positions: (micro-batches, B), see `dealt`.
        seed: of the epoch; each position derives its own from it.
        workers: processes; 0 is this one.
    """
    yield from view_batches(images, ((augment, seed),), size, order, positions, workers)


def view_batches(
    images: Images,
    views: Sequence[tuple[str, int]],
    size: int,
    order: torch.Tensor,
    positions: torch.Tensor,
    workers: int,
) -> Iterator[Any]:
    """As `train_batches`, with as many views of the same images before the labels as `views` has (augment, seed): so
    an image that is looked at twice is decoded once.
    """
    transforms = [(training_transform(augment, size), seed) for augment, seed in views]
    dataset = _Augmented(images, transforms, order.flatten(), positions.flatten())
    # The loader would draw a seed of its own from the default generator.
    generator = torch.Generator().manual_seed(views[0][1])
    yield from _loader(dataset, positions.shape[1], workers, generator)


def evaluation_batches(
    images: Images, crop: bool, size: int, batch_size: int, rank: int, ranks: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As `train_batches`: this rank's share of all images, each of which is in the share of one rank."""
    transform = evaluation_transform(size) if crop else None
    dataset = _Evaluated(images, transform, range(rank, len(images), ranks))
    yield from _loader(dataset, batch_size, workers, torch.Generator().manual_seed(0))


def training_transform(augment: str, size: int) -> Any:
    """Random resized crop (8% to 100% of the area) and mirror, as is usual; RandAugment (Cubuk et al. 2020) after them
    with torchvision's default of two operations of magnitude 9 (our choice). None: the image as it is.

    Raises:
        ValueError: `augment` is none of AUGMENTS.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, got {augment!r}")
    steps: list[Any] = []
    if augment.startswith("resized_crop_flip"):
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if augment.endswith("randaugment"):
        steps.append(v2.RandAugment())
    return v2.Compose(steps) if steps else None


def evaluation_transform(size: int) -> Any:
    """Resized, then the `size` x `size` in the middle."""
    return v2.Compose([v2.Resize(round(size * RESIZE), antialias=True), v2.CenterCrop(size)])


class _Augmented(Dataset[tuple[torch.Tensor, ...]]):
    def __init__(
        self, images: Images, transforms: Sequence[tuple[Any, int]], order: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.images, self.transforms, self.order, self.positions = images, transforms, order, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, ...]:
        position = int(self.positions[item])
        index = int(self.order[position])
        image = self.images[index]
        views = [_view(image, transform, derive(seed, position)) for transform, seed in self.transforms]
        return *views, self.images.labels[index]


def _view(image: Any, transform: Any, seed: int) -> torch.Tensor:
    if transform is None:
        return _tensor(image)
    with torch.random.fork_rng(devices=[]):  # v2 draws from the default generator
        torch.default_generator.manual_seed(seed)
        return _tensor(transform(image))


class _Evaluated(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, images: Images, transform: Any, indices: range) -> None:
        self.images, self.transform, self.indices = images, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.indices[item]
        image = self.images[index]
        return _tensor(image if self.transform is None else self.transform(image)), self.images.labels[index]


def _tensor(image: Any) -> torch.Tensor:
    tensor: torch.Tensor = image if isinstance(image, torch.Tensor) else v2.functional.pil_to_tensor(image)
    return tensor


def _loader(dataset: Dataset[Any], batch_size: int, workers: int, generator: torch.Generator) -> Any:
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, generator=generator, pin_memory=pin)
