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

AUGMENTS = (
    "none",
    "flip_crop",
    "randaugment",
    "flip_crop+randaugment",
    # Strong ones, for consistency training: of photographs, and of digits, which must not be mirrored.
    "flip_crop+randaugment+cutout",
    "affine+cutout",
)
# Zero padding on each side before the crop, for images of this side (the usual 4 for 32x32).
CROP_PADDING = 4
# Of `affine`: rotation either way in degrees, stretch either way, shift either way as a share of the side. Our choice
# for 8x8 digits: a pixel, and nothing that makes another digit of one.
ROTATION, STRETCH, SHIFT = 15.0, 0.1, 0.125
# Side of the square that cutout blanks, as a share of the image's: the usual half for CIFAR-10; 3 pixels of 8x8 digits.
CUTOUT, DIGITS_CUTOUT = 0.5, 0.375


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
    crop, erase = _generator(seed, epoch, "crop"), _generator(seed, epoch, "cutout")
    if "randaugment" in augment:
        # The loader would draw its own seed from the default generator.
        batches: Any = DataLoader(
            _RandAugmented(split, order, augment.startswith("flip_crop"), derive(seed, epoch, "randaugment")),
            batch_size=size,
            num_workers=workers,
            generator=_generator(seed, epoch, "loader"),
        )
        for images, labels in batches:
            if augment.endswith("cutout"):
                images = cutout(images, CUTOUT, erase)
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return
    for index in order.view(-1, size):
        images = split.images[index]
        if augment == "flip_crop":
            images = flip_and_crop(images, crop)
        elif augment == "affine+cutout":
            images = cutout(affine(images, crop), DIGITS_CUTOUT, erase)
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


def affine(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns, stretches and shifts each image at random, within ROTATION, STRETCH and SHIFT; zeros come in.

    `images` is uint8 `(N, C, H, W)`; the result has the same shape and dtype, by bilinear interpolation. The draws come
    from `generator` (CPU).
    """
    N = len(images)
    turn, high, wide, down, right = (2 * torch.rand(5, N, generator=generator) - 1).unbind()
    angle = turn * (ROTATION * torch.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    # From a place of the result to one of the image, both in [-1, 1], where the side is 2 long.
    rows = [
        torch.stack((cosine * (1 + STRETCH * wide), -sine, 2 * SHIFT * right), 1),
        torch.stack((sine, cosine * (1 + STRETCH * high), 2 * SHIFT * down), 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, align_corners=False)
    return moved.round().clamp(0, 255).to(images.dtype)


def cutout(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Blanks (0) a square of each image, `share` of its sides long (DeVries & Taylor 2017).

    Its centre is uniform over the pixels, so that a part of it may lie outside. `images` is `(N, C, H, W)`; the result
    has the same shape and dtype. The draws come from `generator` (CPU).
    """
    N, _, H, W = images.shape
    inside = []
    for side in (H, W):
        length = int(share * side + 0.5)
        first = torch.randint(0, side, (N, 1), generator=generator) - length // 2
        place = torch.arange(side) - first
        inside.append((place >= 0) & (place < length))
    blank = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(blank.to(images.device), 0)


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
