"""What every benchmark shares: red tests forbid its figures, and its rows end in a table and in one results file."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
from datetime import timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import DEVICE
from clock import ON_GPU
from interleaved import Timing

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results.jsonl"

Row = dict[str, Any]


_GREEN: set[str] = set()  # tests that another module has asked for


@pytest.fixture(scope="module", autouse=True)
def _tests_are_green(request: pytest.FixtureRequest) -> None:
    """Runs the tests of `TESTS`, globs in tests/ that the benchmark's module names; figures of a wrong op mislead.

    On a GPU all of them; on the CPU those that compare with twins and golden masks, which take seconds.
    """
    tests = sorted({str(path) for glob in request.module.TESTS for path in (ROOT / "tests").glob(glob)} - _GREEN)
    if not tests:
        return
    chosen = [] if ON_GPU else ["-k", "twin or golden"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *chosen, *tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"nothing is timed, these tests are red: {' '.join(command[3:])}\n{run.stdout[-2000:]}")
    _GREEN.update(tests)


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        shape: Sequence[int],
        variant: str,
        timings: dict[str, Timing],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """One line of the table: `timings` by contender, the unit first."""
        self.rows.append(
            {
                "what": what,
                "shape": list(shape),
                "variant": variant,
                "dtype": str(dtype).removeprefix("torch."),
                "unit_bytes": 2 * math.prod(shape) * dtype.itemsize,
                "seconds": {name: timing._asdict() for name, timing in timings.items()},
            }
        )

    def lines(self) -> list[str]:
        lines = []
        for what in dict.fromkeys(row["what"] for row in self.rows):
            rows = [row for row in self.rows if row["what"] == what]
            unit = next(iter(rows[0]["seconds"]))
            names = ["ours", *(name for name in rows[0]["seconds"] if name not in ("ours", unit))]
            last = ["ms", "GB/s"] if unit == "x * 2" else ["ms"]
            lines += ["", f"{what}: times in units of {unit}, and {unit} in {' and '.join(last)}", ""]
            cells = [["", *names, *last]] + [_cells(row, names)[: 1 + len(names) + len(last)] for row in rows]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += [" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return lines


def _cells(row: Row, names: list[str]) -> list[str]:
    unit, *_ = (timing["median"] for timing in row["seconds"].values())
    label = " ".join(filter(None, ("x".join(map(str, row["shape"])), _SHORT[row["dtype"]], row["variant"])))
    ratios = [f"{row['seconds'][name]['median'] / unit:.2f}" if name in row["seconds"] else "–" for name in names]
    return [label, *ratios, f"{unit * 1e3:.3g}", f"{row['unit_bytes'] / unit / 1e9:.3g}"]


_SHORT = {"float32": "", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_REPORT = Report()


@pytest.fixture
def report() -> Report:
    return _REPORT


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _REPORT.lines():
        terminalreporter.write_line(line)


def pytest_sessionfinish() -> None:
    if not _REPORT.rows:
        return
    machine = _machine()
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(machine | row) + "\n" for row in _REPORT.rows)


def _machine() -> Row:
    import triton

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(DEVICE) if ON_GPU else f"CPU, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "kernels") else ""),
    }
