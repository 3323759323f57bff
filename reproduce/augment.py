"""Augmentation of uint8 images, a pure function of (seed, epoch, position in the epoch).

So a resumed training sees the images that the interrupted one would have seen, and two methods with the same seed see
the same images however many random numbers their masks draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from .data import Split

AUGMENTS = ("none", "flip_crop", "randaugment", "flip_crop+randaugment")
# Zero padding on each side before the crop, for images of this side (the usual 4 for 32x32).
CROP_PADDING = 4


def derive(*words: object) -> int:
    """An integer in [0, 2^63) from the words, the same in every process and version: part of a SHA-256."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def epoch_batches(
    split: Split, augment: str, seed: int, epoch: int, batch_size: int, device: torch.device, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches `(images uint8 (B, C, H, W), labels int64 (B,))` on `device`, all of one size.

    The images that do not fill a last batch are left out of this epoch; a split smaller than a batch is one batch.
    Neither the default generators nor the number of `workers` (processes for RandAugment) change the result.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, got {augment!r}")
    size = min(batch_size, len(split))
    order = torch.randperm(len(split), generator=_generator(seed, epoch, "order"))[: len(split) // size * size]
    crop = _generator(seed, epoch, "crop")
    if augment.endswith("randaugment"):
        # The loader would draw its own seed from the default generator.
        batches: Any = DataLoader(
            _RandAugmented(split, order, augment != "randaugment", derive(seed, epoch, "randaugment")),
            batch_size=size,
            num_workers=workers,
            generator=_generator(seed, epoch, "loader"),
        )
        for images, labels in batches:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return
    for index in order.view(-1, size):
        images = split.images[index]
        if augment == "flip_crop":
            images = flip_and_crop(images, crop)
        yield images.to(device), split.labels[index].to(device)


def flip_and_crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image with probability 1/2, then cut it out of its zero-padded version at a random place.

    `images` is `(N, C, H, W)`; the result has the same shape and dtype. The draws come from `generator` (CPU).
    """
    N, _, H, W = images.shape
    corner = torch.randint(0, 2 * CROP_PADDING + 1, (2, N), generator=generator)
    mirror = torch.randint(0, 2, (N, 1), generator=generator).bool()
    rows = corner[0, :, None] + torch.arange(H)
    columns = corner[1, :, None] + torch.where(mirror, torch.arange(W).flip(0), torch.arange(W))
    padded = F.pad(images, [CROP_PADDING] * 4)
    # Mirroring the window instead of the image is the same in distribution: the corner is uniform.
    sample = torch.arange(N)[:, None, None]
    place = [index.to(images.device) for index in (sample, rows[:, :, None], columns[:, None, :])]
    return padded[place[0], :, place[1], place[2]].permute(0, 3, 1, 2).contiguous()


class _RandAugmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """RandAugment (Cubuk et al. 2020) with torchvision's default of two operations of magnitude 9 (our choice)."""

    def __init__(self, split: Split, order: torch.Tensor, crop: bool, seed: int) -> None:
        from torchvision.transforms import v2

        self.split, self.order, self.crop, self.seed = split, order, crop, seed
        self.transform = v2.RandAugment()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.order[position]
        image = self.split.images[index]
        if self.crop:
            image = flip_and_crop(image[None], _generator(self.seed, position))[0]
        with torch.random.fork_rng(devices=[]):  # v2 draws from the default generator
            torch.default_generator.manual_seed(derive(self.seed, position, "v2"))
            return self.transform(image), self.split.labels[index]


def _generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*words))
