"""That Triton reads every kernel whatever the shape. Needs no GPU; asked in a process without the interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_odd.py"

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def test_every_kernel_takes_every_shape() -> None:
    lines = lines_of(SCRIPT, [])
    files = (Path(__file__).parents[1] / "kernels").glob("*_triton.py")
    kernels = {f"{f.stem}.{name}" for f in files for name in re.findall(r"^def (\w+_kernel)\(", f.read_text(), re.M)}
    assert {line["kernel"] for line in lines} == kernels
    assert [line for line in lines if line["error"] is not None] == []
