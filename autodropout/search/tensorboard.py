"""Scalars of a search for TensorBoard, under `tensorboard/` in the folder of the run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .history import History
from .history import posix
from .history import total_entropy
from .journal import Record

FOLDER = "tensorboard"


def available() -> bool:
    """Whether TensorBoard is installed."""
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None


class TensorBoard:
    """An observer of a driver, and a context manager around its run.

    What is replayed was written by the sitting that it happened in, and is not written again.

    Args:
        folder: of the run.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.history = History()
        self._writer: Any = SummaryWriter(str(folder / FOLDER))

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def __call__(self, record: Record, replayed: bool = False) -> None:
        """Takes the next record."""
        history = self.history
        history(record, replayed)
        if replayed:
            return
        time, kind = posix(record["time"]), record["record"]
        if kind == "tell":
            over = len(history.told) + history.failed
            self._add("trial/metric", record["metric"], over, time)
            if history.best is not None:
                self._add("trial/best", history.best.metric, over, time)
            self._add("trial/seconds", record["seconds"], over, time)
        elif kind == "fail" and record["final"]:
            self._add("trial/failed", history.failed, len(history.told) + history.failed, time)
        elif kind == "update":
            number, figures = record["update"], record["figures"]
            self._add("update/mean_age", statistics.fmean(record["ages"]), number, time)
            self._add("update/entropy", total_entropy(record), number, time)
            for name in ("baseline", "loss", "gradient_norm", "clipped"):
                self._add(f"update/{name}", figures.get(name), number, time)
            for name, value in figures.get("entropy_by_kind", {}).items():
                self._add(f"entropy/{name}", value, number, time)

    def _add(self, name: str, value: float | None, step: int, time: float) -> None:
        if value is not None:
            self._writer.add_scalar(name, value, step, walltime=time)
