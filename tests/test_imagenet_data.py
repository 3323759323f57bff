"""The images of table 1: four kinds of sources, the proxy's part of them, batches of the ranks, and refusals."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import CLASSES
from image_folders import pixels
from image_folders import write_folder
from image_folders import write_parquet
from PIL import Image
from sklearn.datasets import load_digits

from autodropout.reproduce import imagenet_data
from autodropout.reproduce.data import DataError
from autodropout.reproduce.imagenet_augment import dealt
from autodropout.reproduce.imagenet_augment import epoch_order
from autodropout.reproduce.imagenet_augment import evaluation_batches
from autodropout.reproduce.imagenet_augment import train_batches
from autodropout.reproduce.imagenet_data import ImageNetData
from autodropout.reproduce.imagenet_data import TensorImages
from autodropout.reproduce.imagenet_data import open_imagenet
from autodropout.reproduce.imagenet_data import proxy


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the tests in the user's cache, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def everything(data: ImageNetData) -> list[list[tuple[bytes, int]]]:
    return [
        [(np.asarray(split[i]).tobytes(), int(split.labels[i])) for i in range(len(split))]
        for split in (data.train, data.valid, data.pool, data.test)
    ]


def test_a_folder_and_parquet_files_hold_the_same_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    write_parquet(tmp_path / "parquet" / "data")
    files, table = open_imagenet(tmp_path / "folder", 7, 4), open_imagenet(tmp_path / "parquet", 7, 4)
    order = sorted(range(12), key=lambda number: number % 3)
    expected = [(pixels("train", number).tobytes(), number % 3) for number in order]
    train, valid, pool, test = everything(files)
    assert pool == expected
    assert test == [
        (pixels("validation", number).tobytes(), number % 3) for number in sorted(range(6), key=lambda n: n % 3)
    ]
    random.Random(0).shuffle(expected)
    assert (train, valid) == (expected[:7], expected[7:11])
    assert everything(table) == [train, valid, pool, test]
    assert files.fingerprint == table.fingerprint
    assert (files.classes, files.augment) == (3, "resized_crop_flip")
    assert (files.title, table.title) == ("ImageNet (a folder of images)", "ImageNet (parquet)")


def test_the_fingerprint_knows_labels_pixels_and_parts(tmp_path: Path) -> None:
    write_folder(tmp_path)
    prints = {open_imagenet(tmp_path, *sizes).fingerprint for sizes in ((7, 4), (7, 5), (8, 4))}
    moved = tmp_path / "train" / CLASSES[0] / "000.png"
    moved.rename(tmp_path / "train" / CLASSES[1] / "000.png")
    prints.add(open_imagenet(tmp_path, 7, 4).fingerprint)
    image = pixels("validation", 2).copy()
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(tmp_path / "val" / CLASSES[2] / "002.png")
    prints.add(open_imagenet(tmp_path, 7, 4).fingerprint)
    assert len(prints) == 5


def test_the_proxy_is_the_one_that_was_fixed() -> None:
    train, valid = proxy(1_281_167, 80_000, 5_000)
    assert (len(train), len(valid)) == (80_000, 5_000)
    assert len({*train, *valid}) == 85_000
    assert 0 <= min(*train, *valid) <= max(*train, *valid) < 1_281_167
    digest = hashlib.sha256(np.array([*train, *valid], dtype="<i8").tobytes()).hexdigest()
    assert digest[:16] == "c5b0da634a257d0a"


def test_digits_are_enlarged_in_three_equal_channels() -> None:
    data = open_imagenet("digits", 100, 500)
    assert [len(split) for split in (data.train, data.valid, data.pool, data.test)] == [100, 500, 600, 797]
    assert (data.classes, data.augment) == (10, "none")
    image = data.train[0]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    order = list(range(1797))
    random.Random(0).shuffle(order)
    small = torch.from_numpy(load_digits().images[order[0]].astype(np.int64) * 255 // 16)
    # Bilinear: the centre of row 5 lies 7/8 of the way from the centre of the small row 0 to that of row 1.
    column = small[0] * 0.125 + small[1] * 0.875
    assert int(image[0, 5, 0]) == round(float(column[0]))
    assert int(image[0, 5, 31]) == round(float(column[7]))
    assert torch.equal(data.pool.labels, torch.cat((data.train.labels, data.valid.labels)))
    assert open_imagenet("digits", 100, 499).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        ("missing", (7, 4), "the data folder missing does not exist"),
        ("empty", (7, 4), "the data folder empty has neither train/ nor train*.parquet nor data/train*.parquet"),
        ("half", (7, 4), "half has train/ but no val/"),
        ("folder", (10, 3), "ImageNet (a folder of images) has 12 training images, fewer than the 10 + 3 asked for"),
        ("folder", (0, 3), "at least 1 training and 1 validation image are needed, got 0 and 3"),
        ("other", (7, 4), "train/ and val/ of other must have the same classes; n01484850 is in one of them only"),
        ("column", (7, 4), "train must have the columns image and label, has ['image', 'labels']"),
        ("negative", (7, 4), "the training labels of ImageNet (parquet) must be in 0..1, are in -1..1"),
        ("alone", (7, 4), "alone has train-0.parquet but no validation*.parquet"),
        ("damaged", (7, 4), "cannot read parquet as ImageNet: "),
    ],
)
def test_refusals(
    source: str, sizes: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source in ("folder", "other"):
        write_folder(Path(source))
    if source == "other":
        (Path(source) / "val" / CLASSES[2]).rename(Path(source) / "val" / "n9")
    elif source in ("empty", "half"):
        Path(source).mkdir()
        if source == "half":
            (Path(source) / "train").mkdir()
    elif source in ("column", "negative", "alone", "damaged"):
        write_parquet(Path(source), "labels" if source == "column" else "label", lambda number: number % 3 - 1)
        for file in Path(source).glob("validation*" if source == "alone" else "train-1*"):
            if source == "alone":
                file.unlink()
            elif source == "damaged":
                file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=re.escape(message)):
        open_imagenet(source, *sizes)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_damaged_image_is_named(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        write_folder(tmp_path)
        path = tmp_path / "val" / CLASSES[1] / "001.png"
        path.write_bytes(path.read_bytes()[:60])
        message = f"cannot decode {path}: "
    else:
        import pyarrow.parquet as pq

        write_parquet(tmp_path)
        table = pq.read_table(tmp_path / "train-0.parquet").to_pylist()
        table[0]["image"]["bytes"] = table[0]["image"]["bytes"][:60]
        pq.write_table(imagenet_data_table(table), tmp_path / "train-0.parquet")
        message = "train row 0: cannot decode the image: "
    with pytest.raises(DataError, match=re.escape(message)):
        open_imagenet(tmp_path, 7, 4)


def imagenet_data_table(rows: list[Any]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def test_the_hub_is_asked_only_when_the_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def tables(*arguments: Any) -> None:
        asked.append(arguments)
        raise DataError("no network")

    monkeypatch.setattr(imagenet_data, "_tables", tables)
    with pytest.raises(DataError, match="no network"):
        open_imagenet("hub", 7, 4)
    assert asked == [("ILSVRC/imagenet-1k", None)]


def test_an_epoch_is_dealt_out_to_ranks_and_micro_batches() -> None:
    order = epoch_order(35, 12, seed=3, epoch=1)
    assert order.shape == (2, 12)
    assert len(set(order.flatten().tolist())) == 24
    assert torch.equal(order, epoch_order(35, 12, seed=3, epoch=1))
    assert not torch.equal(order, epoch_order(35, 12, seed=3, epoch=2))
    # Step by step and micro-batch by micro-batch: ranks 0, 1, 2 with two positions each.
    shares = [dealt(order, 2, 3, rank).tolist() for rank in range(3)]
    assert shares[0] == [[0, 1], [6, 7], [12, 13], [18, 19]]
    assert shares[1] == [[2, 3], [8, 9], [14, 15], [20, 21]]
    assert shares[2] == [[4, 5], [10, 11], [16, 17], [22, 23]]


@pytest.mark.parametrize("augment", ["resized_crop_flip", "resized_crop_flip+randaugment"])
def test_a_position_has_its_image_whoever_loads_it(augment: str, tmp_path: Path) -> None:
    """Neither ranks, nor micro-batches, nor workers, nor the default generator change what is trained on."""
    write_folder(tmp_path)
    images = open_imagenet(tmp_path, 9, 3).train
    order = epoch_order(9, 8, seed=1, epoch=0)

    def batches(micro_batch: int, ranks: int, workers: int, seed: int = 7) -> dict[int, bytes]:
        found = {}
        for rank in range(ranks):
            positions = dealt(order, micro_batch, ranks, rank)
            loaded = train_batches(images, augment, 16, order, positions, seed, workers)
            for row, (pictures, labels) in zip(positions, loaded, strict=True):
                assert (pictures.shape, pictures.dtype) == ((micro_batch, 3, 16, 16), torch.uint8)
                assert labels.tolist() == images.labels[order.flatten()[row]].tolist()
                for position, picture in zip(row.tolist(), pictures, strict=True):
                    found[position] = picture.numpy().tobytes()
        return found

    state = torch.random.get_rng_state()
    expected = batches(8, 1, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert batches(2, 2, 0) == expected
    assert batches(4, 1, 1) == expected
    assert len(set(expected.values())) == 8
    other = batches(8, 1, 0, seed=8)
    assert all(other[position] != expected[position] for position in range(8))


def test_evaluation_sees_the_middle_of_every_image_once(tmp_path: Path) -> None:
    write_folder(tmp_path)
    test = open_imagenet(tmp_path, 7, 4).test
    seen = []
    for rank in range(4):
        for pictures, labels in evaluation_batches(test, True, 14, 2, rank, 4, workers=0):
            assert pictures.shape[1:] == (3, 14, 14)
            seen += list(zip(pictures, labels.tolist(), strict=True))
    assert sorted(label for _, label in seen) == sorted(test.labels.tolist())
    # The shorter side becomes 16, and a margin of 1 is cut off it.
    picture = test[0]
    larger = picture.resize((round(16 * picture.width / picture.height), 16), Image.Resampling.BILINEAR)
    left = round((larger.width - 14) / 2)
    expected = torch.from_numpy(np.asarray(larger.crop((left, 1, left + 14, 15))).copy()).permute(2, 0, 1)
    assert any(torch.equal(picture, expected) for picture, _ in seen)


def test_without_a_crop_images_are_as_they_are() -> None:
    images = TensorImages(torch.arange(3 * 48, dtype=torch.uint8).view(3, 3, 4, 4), torch.tensor([0, 1, 2]))
    order = torch.tensor([[2, 0]])
    ((pictures, labels),) = train_batches(images, "none", 4, order, dealt(order, 2, 1, 0), 0, 0)
    assert torch.equal(pictures, images.images[[2, 0]])
    assert labels.tolist() == [2, 0]
    assert [len(p) for p, _ in evaluation_batches(images, False, 4, 2, 0, 1, 0)] == [2, 1]
