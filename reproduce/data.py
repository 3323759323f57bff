"""The images of the experiments: CIFAR-10 from a folder or the Hugging Face hub, and scikit-learn's digits offline.

Nothing here reaches for a network unless the source is "hub".
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

DIGITS = "digits"
HUB = "hub"
HUB_NAME = "uoft-cs/cifar10"
# Of the 1,797 digits; the rest is for training and validation.
DIGITS_TEST = 797


class DataError(ValueError):
    """The data are missing, damaged or too few; the message is one line for the user."""


@dataclass(frozen=True)
class Split:
    """`images` uint8 `(N, C, H, W)` in [0, 255] and `labels` int64 `(N,)`."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Split) -> Split:
        return Split(torch.cat((self.images, other.images)), torch.cat((self.labels, other.labels)))


@dataclass(frozen=True)
class ImageData:
    """Three disjoint splits.

    `title` says where they come from. `fingerprint` is the SHA-256 (hex) of all pixels, labels and the division into
    splits, so it changes with the number of training images and with lossy re-encoding. `augment` is the usual
    augmentation of such images ("flip_crop" or "none"), `block_size` the side of DropBlock's blocks (our choice).
    """

    title: str
    fingerprint: str
    train: Split
    valid: Split
    test: Split
    classes: int
    augment: str
    block_size: int


def open_data(source: str | Path, train_images: int, valid_images: int) -> ImageData:
    """The first `train_images` rows for training, the following `valid_images` for validation, and all test images.

    `source` is "digits", "hub" or a folder: one with `train.parquet` and `test.parquet`, or above `cifar10/` with them.

    Raises:
        DataError: missing or damaged data, or fewer rows than asked for.
    """
    if train_images < 1 or valid_images < 1:
        raise DataError(f"at least 1 training and 1 validation image are needed, got {train_images} and {valid_images}")
    if source == DIGITS:
        title, pool, test = _digits()
        augment, block_size = "none", 3
    else:
        title, pool, test = _cifar(source, train_images + valid_images)
        augment, block_size = "flip_crop", 7
    if train_images + valid_images > len(pool):
        raise DataError(
            f"{title} has {len(pool)} images for training and validation, "
            f"fewer than the {train_images} + {valid_images} asked for"
        )
    train = Split(pool.images[:train_images], pool.labels[:train_images])
    valid = Split(
        pool.images[train_images : train_images + valid_images], pool.labels[train_images : train_images + valid_images]
    )
    return ImageData(title, _fingerprint(train, valid, test), train, valid, test, 10, augment, block_size)


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.images.contiguous().numpy().tobytes())
        digest.update(split.labels.numpy().tobytes())
    return digest.hexdigest()


def _digits() -> tuple[str, Split, Split]:
    """1,797 handwritten digits, 8x8, one channel, shuffled once and for all, as the original is sorted by writer."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = list(range(len(bunch.target)))
    random.Random(0).shuffle(order)
    images = torch.from_numpy((bunch.images.astype(np.int64) * 255 // 16).astype(np.uint8))[order].unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))[order]
    pool = len(order) - DIGITS_TEST
    title = "scikit-learn digits (8x8)"
    return title, Split(images[:pool], labels[:pool]), Split(images[pool:], labels[pool:])


def _cifar(source: str | Path, rows: int) -> tuple[str, Split, Split]:
    """CIFAR-10 through `datasets`: at most `rows` rows of the training set, in their order, and the whole test set."""
    if source == HUB:
        name, loaded = f"hub {HUB_NAME}", _load(HUB_NAME, None)
    else:
        folder = _parquet_folder(Path(source))
        name, loaded = (
            "local parquet",
            _load("parquet", {part: str(folder / f"{part}.parquet") for part in ("train", "test")}),
        )
    splits = []
    for part in ("train", "test"):
        table = loaded[part]
        count = min(rows, len(table)) if part == "train" else len(table)
        splits.append(_decode(table.select(range(count)), part))
    encoding = _encoding(loaded["train"])
    return f"CIFAR-10 ({name}, {encoding} images)", splits[0], splits[1]


def _parquet_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "cifar10"):
        if (candidate / "train.parquet").is_file():
            if not (candidate / "test.parquet").is_file():
                raise DataError(f"{candidate} has train.parquet but no test.parquet")
            return candidate
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    raise DataError(f"the data folder {folder} has neither train.parquet nor cifar10/train.parquet")


def _load(path: str, files: dict[str, str] | None) -> Any:
    import datasets

    # It logs a damaged file as well as raising; the caller says it once, in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(path, data_files=files)
        columns = {part: set(loaded[part].column_names) for part in ("train", "test")}
        for part, names in columns.items():
            if not {"img", "label"} <= names:
                raise DataError(f"{part} of {files or path} must have the columns img and label, has {sorted(names)}")
        return loaded.cast_column("img", datasets.Image())
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and the hub's client raise types without a common base
        cause = error.__cause__ or error
        where = files["train"].rsplit("/", 1)[0] if files else path
        raise DataError(f"cannot read CIFAR-10 from {where}: {_one_line(cause)}") from error


def _decode(table: Any, part: str) -> Split:
    images = np.empty((len(table), 32, 32, 3), dtype=np.uint8)
    labels = np.empty(len(table), dtype=np.int64)
    row = 0
    try:
        for example in table:
            pixels = np.asarray(example["img"].convert("RGB"))
            if pixels.shape != images.shape[1:]:
                raise DataError(f"{part} row {row}: the image must be 32x32, is {pixels.shape[1]}x{pixels.shape[0]}")
            if not 0 <= int(example["label"]) < 10:
                raise DataError(f"{part} row {row}: the label must be in 0..9, is {example['label']}")
            images[row], labels[row] = pixels, example["label"]
            row += 1
    except DataError:
        raise
    except Exception as error:  # whatever Pillow or pyarrow raise on damaged bytes
        raise DataError(f"{part} row {row}: cannot decode the image: {_one_line(error)}") from error
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def _encoding(table: Any) -> str:
    """Format of the first image, for the title: a JPEG copy gives other accuracies than the lossless original."""
    return str(table[0]["img"].format or "raw")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
