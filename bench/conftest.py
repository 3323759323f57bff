"""The table at the end of a benchmark run: every contender in units of the plain multiply of its round."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pytest


@dataclass
class Report:
    rows: list[tuple[str, str, str, dict[str, float]]] = field(default_factory=list)

    def add(self, what: str, shape: tuple[int, ...], variant: str, medians: dict[str, float]) -> None:
        self.rows.append((what, "x".join(map(str, shape)), variant, medians))

    def lines(self) -> list[str]:
        lines = []
        for what in dict.fromkeys(row[0] for row in self.rows):
            lines += ["", f"{what}: times in units of x * 2, and x * 2 in ms", ""]
            for _, shape, variant, medians in (row for row in self.rows if row[0] == what):
                unit = medians["x * 2"]
                ratios = [f"{name} {median / unit:.2f}" for name, median in medians.items() if name != "x * 2"]
                label = f"{shape:>15} {variant}".rstrip()
                lines.append(f"{label}  {'  '.join(reversed(ratios))}  ({unit * 1e3:.1f} ms)")
        return lines


_REPORT = Report()


@pytest.fixture
def report() -> Report:
    return _REPORT


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _REPORT.lines():
        terminalreporter.write_line(line)
