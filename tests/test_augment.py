"""Augmentation: a function of (seed, epoch, position), with the distribution that is claimed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autodropout.reproduce import augment
from autodropout.reproduce.augment import AUGMENTS
from autodropout.reproduce.augment import affine
from autodropout.reproduce.augment import cutout
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


def test_cutout_blanks_one_square_around_a_uniform_centre() -> None:
    n, side = 20_000, 6
    images = torch.full((n, 2, side, side), 7, dtype=torch.uint8)
    out = cutout(images, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 0], out[:, 1])
    assert set(out.unique().tolist()) == {0, 7}
    blank = out[:, 0] == 0
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    # A centre c blanks c - 1, c and c + 1 as far as they exist: 2 rows for the first and the last of 6, else 3.
    for lines in (rows, columns):
        found = lines.sum(1)
        assert set(found.tolist()) == {2, 3}
        # Two of six centres: binomial, 6 standard deviations (alpha 2e-9).
        assert abs(int((found == 2).sum()) - n / 3) < 6 * (n * 2 / 9) ** 0.5
    assert len({tuple(mask.flatten().tolist()) for mask in blank}) == side * side


def test_affine_keeps_a_centred_blob_in_the_middle_and_moves_all_else() -> None:
    n = 4000
    images = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    out = affine(images, torch.Generator().manual_seed(0))[:, 0].double()
    assert out.shape == (n, 9, 9)
    mass = out.sum((1, 2))
    rows = (out.sum(2) * torch.arange(9.0)).sum(1) / mass - 4
    columns = (out.sum(1) * torch.arange(9.0)).sum(1) / mass - 4
    for moved in (rows, columns):
        # Shifts of up to an eighth of 9 pixels over a map that may halve nothing: within 1.125 / 0.9 and a pixel's
        # width of interpolation; uniform, so on average 0 (6 standard errors of at most 1.125 / sqrt(3)).
        assert moved.abs().max() < 1.125 / 0.9 + 0.5
        assert abs(float(moved.mean())) < 6 * 1.125 / 3**0.5 / n**0.5
        assert moved.std() > 0.4
    assert len({tuple(image.flatten().tolist()) for image in out}) > n - 50


def test_affine_without_amplitude_is_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROTATION", "STRETCH", "SHIFT"):
        monkeypatch.setattr(augment, name, 0.0)
    data = split(5)
    assert torch.equal(affine(data.images, torch.Generator()), data.images)


def test_a_quarter_turn_is_rot90(monkeypatch: pytest.MonkeyPatch) -> None:
    """The axes are where they should be: at 90 degrees exactly, every pixel lands on a pixel."""
    for name in ("STRETCH", "SHIFT"):
        monkeypatch.setattr(augment, name, 0.0)
    generator = torch.Generator().manual_seed(0)
    turn = float(2 * torch.rand(5, 1, generator=generator)[0] - 1)
    monkeypatch.setattr(augment, "ROTATION", 90 / turn)
    data = split(1)
    out = affine(data.images, generator.manual_seed(0))
    assert torch.equal(out, data.images.rot90(1, (2, 3)))
