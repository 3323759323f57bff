"""Small data sets in the two forms that ImageNet comes in: folders of images, and parquet files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850")
COUNTS = {"train": 12, "validation": 6}


def pixels(split: str, number: int) -> np.ndarray[Any, Any]:
    """(H, W, 3): of different sizes, as photographs are."""
    generator = np.random.default_rng([len(split), number])
    return generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)


def write_folder(folder: Path) -> None:
    for split, part in (("train", "train"), ("validation", "val")):
        for number in range(COUNTS[split]):
            path = folder / part / CLASSES[number % 3] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(split, number)).save(path)


def encoded(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(folder: Path, column: str = "label", label: Callable[[int], int] = lambda number: number % 3) -> None:
    """In files of 5 rows, sorted by class as the folder is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        order = sorted(range(COUNTS[split]), key=lambda number: number % 3)
        rows = [{"image": encoded(Image.fromarray(pixels(split, n))), column: label(n)} for n in order]
        for part, begin in enumerate(range(0, len(rows), 5)):
            pq.write_table(pa.Table.from_pylist(rows[begin : begin + 5]), folder / f"{split}-{part}.parquet")
