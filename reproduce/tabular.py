"""The tabular benchmark: digits_table.json, a thousand trained policies, as a task that answers in microseconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .benchmark_task import BenchmarkTask
from .digits_table import TABLE
from .digits_table import table_space


class TabularTask(BenchmarkTask):
    """Digits, three sites, 1,000 policies.

    An observation is the validation accuracy of one of the trained seeds; the value of a policy is its accuracy on
    validation and test images together, mean over all seeds, which lowers the noise that a table cannot be without.

    Raises:
        ValueError: the file is of another space than that of digits_table.py.
    """

    name = "digits"

    def __init__(self, path: Path = TABLE) -> None:
        table = json.loads(path.read_text(encoding="utf-8"))
        self.space = table_space()
        if table["space"] != self.space.to_json():
            raise ValueError(f"{path} must be the table of digits_table.py's space, got that of another one")
        self.seeds: int = table["seeds"]
        images, tested = table["valid_images"], table["test_images"]
        self._observed: dict[tuple[int, ...], list[float]] = {}
        self._values: dict[tuple[int, ...], float] = {}
        for choices, valid, test in table["rows"]:
            self._observed[tuple(choices)] = [correct / images for correct in valid]
            self._values[tuple(choices)] = statistics.fmean(
                (of_valid + of_test) / (images + tested) for of_valid, of_test in zip(valid, test, strict=True)
            )
        self.optimum = max(self._values.values())

    def value(self, choices: Sequence[int]) -> float:
        return self._values[self._checked(choices)]

    def observe(self, choices: Sequence[int], seed: int) -> float:
        # Which of the trained seeds: a hash of the number, so that consecutive trials do not run through them in turn.
        scrambled = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
        return self._observed[self._checked(choices)][(scrambled >> 32) % self.seeds]

    def _checked(self, choices: Sequence[int]) -> tuple[int, ...]:
        key = tuple(choices)
        return key if key in self._values else self.space.check(key)
