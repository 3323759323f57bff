"""The images of table 1: ImageNet from a folder, from parquet files or from the hub, and digits offline.

Random access to every image, by its number: the order of an epoch is a function of its seed, which a stream of files
cannot follow exactly. Nothing here reaches for a network unless the source is "hub".
"""

from __future__ import annotations

import hashlib
import os
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from .data import DIGITS
from .data import HUB
from .data import DataError
from .data import open_data

HUB_NAME = "ILSVRC/imagenet-1k"
# The paper's proxy for the search: so many images for training and for validation. Which ones is our choice.
PROXY_TRAIN, PROXY_VALID = 80_000, 5_000
DIGITS_SIDE = 32
# Of each split; the pixels of these are in the fingerprint.
FINGERPRINTED = 64
PARQUET_FILES = {"train": "train*.parquet", "validation": "val*.parquet"}


class Images(Dataset[Any]):
    """Images by number, with their labels.

    Attributes:
        labels: int64 `(N,)`.
    """

    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """An RGB image: of Pillow, or uint8 `(3, H, W)`.

        Raises:
            DataError: it cannot be decoded; names it.
        """


class TensorImages(Images):
    """`images` uint8 `(N, 3, H, W)` in memory."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class FileImages(Images):
    """Image files and their classes."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.paths = np.array([os.fsencode(path) for path, _ in samples])  # one object: forked workers do not copy it
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path = os.fsdecode(self.paths[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # whatever Pillow raises on damaged bytes
            raise DataError(f"cannot decode {path}: {_one_line(error)}") from error


class TableImages(Images):
    """Rows of a table of the library `datasets`, with the columns `image` and `label`."""

    def __init__(self, table: Any, split: str) -> None:
        self.table, self.split = table, split
        self.labels = torch.tensor(table["label"][:], dtype=torch.int64)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.table[int(index)]["image"].convert("RGB")
        except Exception as error:  # whatever Pillow or pyarrow raise on damaged bytes
            raise DataError(f"{self.split} row {int(index)}: cannot decode the image: {_one_line(error)}") from error


class Part(Images):
    """Some of the images, in the order of `indices`."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, torch.tensor(indices)
        self.labels = images.labels[self.indices]

    def __getitem__(self, index: int) -> Any:
        return self.images[int(self.indices[index])]


@dataclass(frozen=True)
class ImageNetData:
    """Splits of one data set.

    Args:
        title: where they come from.
        fingerprint: SHA-256 (hex) of all labels, the division into splits and the pixels of 64 evenly spaced images of
            each. Of the other images it knows the labels only: hashing the pixels of ImageNet takes hours.
        train, valid: disjoint parts of `pool`, for the choice of strengths.
        pool: all training images.
        test: never trained on.
        classes: how many.
        augment: the usual augmentation of such images, "resized_crop_flip" or "none".
        block_size: side of DropBlock's blocks in cells (our choice).
    """

    title: str
    fingerprint: str
    train: Images
    valid: Images
    pool: Images
    test: Images
    classes: int
    augment: str
    block_size: int


def open_imagenet(source: str | Path, train_images: int, valid_images: int) -> ImageNetData:
    """The images of a source.

    Args:
        source: "digits", scikit-learn's, enlarged from 8x8 to 32x32 in three equal channels; "hub", ILSVRC/imagenet-1k,
            downloaded; else a folder, with `train/CLASS/*` and `val/CLASS/*`, or with `train*.parquet` and
            `validation*.parquet` (or `val*.parquet`), in itself or in its folder `data`.
        train_images, valid_images: sizes of the parts `train` and `valid`, see `proxy`.

    Raises:
        DataError: missing or damaged data, or fewer images than asked for.
    """
    if train_images < 1 or valid_images < 1:
        raise DataError(f"at least 1 training and 1 validation image are needed, got {train_images} and {valid_images}")
    if source == DIGITS:
        return _digits(train_images, valid_images)
    if source == HUB:
        name, (pool, test) = f"ImageNet (hub {HUB_NAME})", _tables(HUB_NAME, None)
    else:
        name, (pool, test) = _from_folder(Path(source))
    if train_images + valid_images > len(pool):
        raise DataError(
            f"{name} has {len(pool):,} training images, fewer than the {train_images:,} + {valid_images:,} asked for"
        )
    if len(test) == 0:
        raise DataError(f"{name} has no validation images")
    classes = int(pool.labels.max()) + 1
    for split, images in (("training", pool), ("validation", test)):
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= classes:
            raise DataError(f"the {split} labels of {name} must be in 0..{classes - 1}, are in {low}..{high}")
    train, valid = proxy(len(pool), train_images, valid_images)
    chosen, held_out = Part(pool, train), Part(pool, valid)
    fingerprint = _fingerprint(chosen, held_out, pool, test)
    return ImageNetData(name, fingerprint, chosen, held_out, pool, test, classes, "resized_crop_flip", block_size=7)


def proxy(count: int, train: int, valid: int) -> tuple[list[int], list[int]]:
    """Which of `count` images are for training and for validation where not all are used, in random order.

    The first `train` and the next `valid` of `random.Random(0).shuffle(list(range(count)))`, which no version of
    Python has changed. The paper says how many images its proxy has (80,000 and 5,000) and not which; a uniform
    choice has about 80 and 5 images of each of the 1,000 classes.
    """
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order[:train], order[train : train + valid]


def _digits(train_images: int, valid_images: int) -> ImageNetData:
    digits = open_data(DIGITS, train_images, valid_images)

    def enlarged(split: Any) -> TensorImages:
        side = (DIGITS_SIDE, DIGITS_SIDE)
        larger = F.interpolate(split.images.float(), side, mode="bilinear", align_corners=False)
        return TensorImages(larger.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), split.labels)

    train, valid, test = (enlarged(split) for split in (digits.train, digits.valid, digits.test))
    pool = enlarged(digits.train + digits.valid)
    title = f"scikit-learn digits, enlarged from 8x8 to {DIGITS_SIDE}x{DIGITS_SIDE}"
    fingerprint = _fingerprint(train, valid, pool, test)
    return ImageNetData(title, fingerprint, train, valid, pool, test, digits.classes, "none", digits.block_size)


def _from_folder(folder: Path) -> tuple[str, tuple[Images, Images]]:
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    if (folder / "train").is_dir():
        return "ImageNet (a folder of images)", _files(folder)
    for candidate in (folder, folder / "data"):
        files = {split: sorted(str(path) for path in candidate.glob(name)) for split, name in PARQUET_FILES.items()}
        if files["train"]:
            if not files["validation"]:
                raise DataError(f"{candidate} has {Path(files['train'][0]).name} but no validation*.parquet")
            return "ImageNet (parquet)", _tables("parquet", files)
    raise DataError(f"the data folder {folder} has neither train/ nor train*.parquet nor data/train*.parquet")


def _files(folder: Path) -> tuple[Images, Images]:
    from torchvision.datasets import ImageFolder

    if not (folder / "val").is_dir():
        raise DataError(f"{folder} has train/ but no val/")
    try:
        train, valid = (ImageFolder(str(folder / part)) for part in ("train", "val"))
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"cannot read {folder}: {_one_line(error)}") from error
    if train.classes != valid.classes:
        first = sorted(set(train.classes) ^ set(valid.classes))[0]
        raise DataError(f"train/ and val/ of {folder} must have the same classes; {first} is in one of them only")
    return FileImages(train.samples), FileImages(valid.samples)


def _tables(path: str, files: dict[str, list[str]] | None) -> tuple[Images, Images]:
    import datasets

    # It logs a damaged file as well as raising; the caller says it once, in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    splits = ("train", "validation")
    try:
        tables = datasets.load_dataset(path, data_files=files, split=list(splits))
        for split, table in zip(splits, tables, strict=True):
            if not {"image", "label"} <= set(table.column_names):
                raise DataError(f"{split} must have the columns image and label, has {sorted(table.column_names)}")
        tables = [table.cast_column("image", datasets.Image()) for table in tables]
        train, valid = (TableImages(table, split) for split, table in zip(splits, tables, strict=True))
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and the hub's client raise types without a common base
        raise DataError(f"cannot read {path} as ImageNet: {_one_line(error.__cause__ or error)}") from error
    return train, valid


def _fingerprint(*splits: Images) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{len(split)}\0".encode())
        digest.update(split.labels.numpy().tobytes())
        for index in range(0, len(split), -(-len(split) // FINGERPRINTED)):
            image = split[index]
            pixels = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
            digest.update(repr(pixels.shape).encode())
            digest.update(pixels.tobytes())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
