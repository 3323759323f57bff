"""The data sets: their splits, their fingerprints, and one clear line for whatever is wrong with a folder."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from autodropout.reproduce.data import DataError
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import Split
from autodropout.reproduce.data import open_data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection without being asked fails at once."""
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)


def write_parquet(path: Path, images: np.ndarray, labels: list[int], column: str = "img", form: str = "PNG") -> None:
    cells = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format=form)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(cells, type=kind), "label": pa.array(labels, type=pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "cifar10" / "train.parquet", pixels(12), [i % 10 for i in range(12)])
    write_parquet(tmp_path / "cifar10" / "test.parquet", pixels(5, seed=1), [9, 8, 7, 6, 5])
    return tmp_path


def test_digits_are_all_used_once() -> None:
    data = open_data("digits", 500, 500)
    assert (len(data.train), len(data.valid), len(data.test)) == (500, 500, 797)
    together = data.train + data.valid + data.test
    assert together.images.shape == (1797, 1, 8, 8)
    assert together.images.dtype == torch.uint8
    bunch = load_digits()
    original = np.concatenate([bunch.images.reshape(1797, -1), bunch.target[:, None]], axis=1)
    # 0..16 becomes 0..255; 16 levels stay apart, so the original can be compared as a multiset of rows.
    levels = (together.images.reshape(1797, -1).double() * 16 / 255).ceil()
    ours = torch.cat([levels, together.labels[:, None].double()], dim=1).numpy()
    assert np.array_equal(original[np.lexsort(original.T)], ours[np.lexsort(ours.T)])
    assert int(together.images.max()) == 255


def test_digits_take_the_first_rows_and_keep_the_test_split() -> None:
    large, small = open_data("digits", 500, 500), open_data("digits", 40, 30)
    assert torch.equal(small.train.images, large.train.images[:40])
    assert torch.equal(small.valid.labels, large.train.labels[40:70])
    assert torch.equal(small.test.images, large.test.images)
    # Shuffled, not sorted by writer: every class is in a short prefix.
    assert set(small.train.labels.tolist()) == set(range(10))
    assert (large.augment, large.block_size) == ("none", 3)


def test_fingerprint_names_pixels_labels_and_division() -> None:
    prints = {open_data("digits", train, valid).fingerprint for train, valid in ((300, 500), (300, 499), (301, 500))}
    assert len(prints) == 3
    assert open_data("digits", 300, 500).fingerprint in prints


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_folder_itself_or_the_one_above(folder: Path, below: str) -> None:
    data = open_data(folder / below, 7, 3)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), pixels(12)[:7])
    assert np.array_equal(data.valid.images.permute(0, 2, 3, 1).numpy(), pixels(12)[7:10])
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), pixels(5, seed=1))
    assert data.valid.labels.tolist() == [7, 8, 9]
    assert data.test.labels.tolist() == [9, 8, 7, 6, 5]
    assert data.title == "CIFAR-10 (local parquet, PNG images)"
    assert (data.augment, data.block_size) == ("flip_crop", 7)


def test_encoding_is_part_of_title_and_fingerprint(folder: Path) -> None:
    lossless = open_data(folder, 7, 3)
    write_parquet(folder / "cifar10" / "train.parquet", pixels(12), [i % 10 for i in range(12)], form="JPEG")
    lossy = open_data(folder, 7, 3)
    assert lossy.title == "CIFAR-10 (local parquet, JPEG images)"
    assert lossy.fingerprint != lossless.fingerprint


def problem(source: Path | str, train: int = 7, valid: int = 3) -> str:
    with pytest.raises(DataError) as caught:
        open_data(source, train, valid)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folders_and_files(folder: Path, tmp_path: Path) -> None:
    assert problem(tmp_path / "nowhere") == f"the data folder {tmp_path / 'nowhere'} does not exist"
    (tmp_path / "empty").mkdir()
    assert "has neither train.parquet nor cifar10/train.parquet" in problem(tmp_path / "empty")
    (folder / "cifar10" / "test.parquet").unlink()
    assert "has train.parquet but no test.parquet" in problem(folder)


def test_damaged_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "cifar10" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    assert f"cannot read CIFAR-10 from {folder / 'cifar10'}: " in problem(folder)
    assert capfd.readouterr().err == ""


def test_damaged_image(folder: Path) -> None:
    table = pq.read_table(folder / "cifar10" / "train.parquet")
    cells = table["img"].to_pylist()
    cells[2]["bytes"] = cells[2]["bytes"][:60]
    changed = table.set_column(0, "img", pa.array(cells, type=table.schema.field("img").type))
    pq.write_table(changed, folder / "cifar10" / "train.parquet")
    assert "train row 2: cannot decode the image: " in problem(folder)


def test_wrong_contents(folder: Path) -> None:
    train = folder / "cifar10" / "train.parquet"
    shutil.copy(train, folder / "kept")
    write_parquet(train, pixels(12), [0] * 12, column="image")
    assert "cannot read CIFAR-10 from" in problem(folder)  # two files with different columns
    shutil.copy(train, folder / "cifar10" / "test.parquet")
    assert problem(folder).endswith("must have the columns img and label, has ['image', 'label']")
    shutil.copy(folder / "kept", folder / "cifar10" / "test.parquet")
    write_parquet(train, pixels(12)[:, :16], [0] * 12)
    assert problem(folder) == "train row 0: the image must be 32x32, is 32x16"
    write_parquet(train, pixels(12), [0, 1, 10] + [0] * 9)
    assert problem(folder) == "train row 2: the label must be in 0..9, is 10"
    shutil.copy(folder / "kept", train)
    assert "has 12 images for training and validation, fewer than the 10 + 3 asked for" in problem(folder, 10, 3)
    assert "at least 1 training and 1 validation image" in problem(folder, 0, 3)


def test_hub_is_asked_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, data_files: object = None) -> None:
        asked.append((path, data_files))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert problem("hub") == "cannot read CIFAR-10 from uoft-cs/cifar10: ConnectionError: no route to host"
    assert asked == [("uoft-cs/cifar10", None)]


def test_splits_add() -> None:
    one = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 2]))
    other = Split(torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([3]))
    assert (one + other).labels.tolist() == [1, 2, 3]
    assert (one + other).images.flatten(1).amax(1).tolist() == [0, 0, 1]


def test_real_cifar10(data_dir: Path) -> None:
    data: ImageData = open_data(data_dir, 4500, 500)
    assert data.train.images.shape == (4500, 3, 32, 32)
    assert len(data.test) == 10_000
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.title.startswith("CIFAR-10 (local parquet, ")
    # The published channel means, within five standard errors of the mean of 10,000 images (image means vary by 0.13).
    means = data.test.images.double().mean(dim=(0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5 * 0.13 / 100)
