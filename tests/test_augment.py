"""Augmentation: a function of (seed, epoch, position), with the distribution that is claimed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autodropout.reproduce.augment import AUGMENTS
from autodropout.reproduce.augment import derive
from autodropout.reproduce.augment import epoch_batches
from autodropout.reproduce.augment import flip_and_crop
from autodropout.reproduce.data import Split

CPU = torch.device("cpu")


def split(rows: int, channels: int = 3, side: int = 8) -> Split:
    """Every image differs, and its label is its row."""
    torch.manual_seed(0)
    images = torch.randint(1, 256, (rows, channels, side, side), dtype=torch.uint8)
    return Split(images, torch.arange(rows))


def epoch(data: Split, augment: str, seed: int = 0, number: int = 0, batch: int = 4, workers: int = 0) -> Split:
    batches = list(epoch_batches(data, augment, seed, number, batch, CPU, workers))
    assert {len(labels) for _, labels in batches} == {min(batch, len(data))}
    return Split(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))


def test_derived_seeds_are_pinned() -> None:
    # The first 8 bytes of sha256("(0, 1, 'order')"), halved: resuming with another version must give the same numbers.
    import hashlib

    digest = hashlib.sha256(b"(0, 1, 'order')").hexdigest()
    assert derive(0, 1, "order") == int(digest[:16], 16) // 2
    assert len({derive(seed, number, "order") for seed in range(50) for number in range(50)}) == 2500


def test_every_image_once_per_epoch_except_the_remainder() -> None:
    data = split(10)
    labels = epoch(data, "none").labels
    assert len(labels) == 8
    assert len(set(labels.tolist())) == 8
    assert len(epoch(data, "none", batch=64).labels) == 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_pure_function_of_seed_and_epoch(augment: str, channels: int) -> None:
    data = split(12, channels)
    first = epoch(data, augment)
    torch.manual_seed(123)
    torch.rand(7)
    before = torch.get_rng_state()
    again = epoch(data, augment)
    assert torch.equal(torch.get_rng_state(), before), "the default generator belongs to the masks"
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.images.dtype == torch.uint8
    assert first.images.shape[1:] == data.images.shape[1:]
    for other in (epoch(data, augment, seed=1), epoch(data, augment, number=1)):
        assert not torch.equal(first.labels, other.labels)


def test_randaugment_does_not_depend_on_workers() -> None:
    data = split(12)
    alone, helped = (epoch(data, "flip_crop+randaugment", workers=workers) for workers in (0, 2))
    assert torch.equal(alone.images, helped.images)
    assert torch.equal(alone.labels, helped.labels)


def test_randaugment_changes_images_one_by_one() -> None:
    data = Split(split(1, side=16).images.repeat(16, 1, 1, 1), torch.arange(16))
    images = epoch(data, "randaugment").images
    assert len({tuple(image.flatten().tolist()) for image in images}) > 8


def test_none_gives_the_images_themselves() -> None:
    data = split(12)
    seen = epoch(data, "none")
    assert torch.equal(seen.images, data.images[seen.labels])


def test_flip_and_crop_gives_only_windows_of_the_padded_image_and_all_of_them_equally_often() -> None:
    data = split(1, side=6)
    n = 40_500
    out = flip_and_crop(data.images.expand(n, -1, -1, -1), torch.Generator().manual_seed(0))
    padded = F.pad(data.images[0], [4] * 4)
    windows = [padded[:, y : y + 6, x : x + 6] for y in range(9) for x in range(9)]
    windows += [window.flip(2) for window in windows]
    counts = {tuple(window.flatten().tolist()): 0 for window in windows}
    assert len(counts) == 162
    for image in out.flatten(1).tolist():
        counts[tuple(image)] += 1  # KeyError: no window of the padded image
    # Chi-squared with 161 degrees of freedom, alpha = 1e-6: 262.
    expected = n / 162
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 262


def test_unknown_augmentation() -> None:
    with pytest.raises(ValueError, match=r"augment must be one of none, .*, got 'mixup'"):
        next(epoch_batches(split(4), "mixup", 0, 0, 2, CPU))
