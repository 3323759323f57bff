"""What the compiler makes of the kernels of the fused neighbours. Needs no GPU; compiled in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_fused.py"

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

OVER_ACTIVATIONS = {
    "moments_kernel",
    "forward_kernel",
    "sums_kernel",
    "backward_kernel",
    "run_moments_kernel",
    "run_forward_kernel",
    "run_sums_kernel",
    "run_backward_kernel",
    "add_tiled_kernel",
    "add_scaled_samples_kernel",
    "softmax_forward_kernel",
    "softmax_backward_kernel",
}
WRITING = OVER_ACTIVATIONS - {"moments_kernel", "sums_kernel", "run_moments_kernel", "run_sums_kernel"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return lines_of(SCRIPT, ["compile"])


def label(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "shape", "layout", "dtype", "target"))


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    """With 128 registers four programs of 128 threads fit on a processor of 65,536; float64 takes twice the space."""
    assert {row["kernel"] for row in compiled} >= OVER_ACTIVATIONS
    for row in compiled:
        assert row["spills"] == row["scratch"] == 0, label(row)
        assert row["registers"] <= (255 if row["dtype"] == "fp64" else 128), label(row)


def test_accesses_are_as_wide_as_memory_allows(compiled: list[dict[str, Any]]) -> None:
    """All of these runs of memory are divisible by 16 bytes. Stored are activations; by softmax, two numbers a row."""
    for row in compiled:
        assert row["run"] % 16 == 0
        if row["kernel"] in OVER_ACTIVATIONS:
            assert row["loads"].get("16", 0) > 0, label(row)
        if row["kernel"] in WRITING:
            of_rows = {"8" if row["dtype"] == "fp64" else "4"} if row["kernel"] == "softmax_forward_kernel" else set()
            assert set(row["stores"]) - of_rows == {"16"}, label(row)


def test_activations_are_addressed_with_64_bits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["kernel"] in OVER_ACTIVATIONS:
            assert row["wide"], label(row)


def test_no_recompilation_when_pattern_scale_or_eps_change() -> None:
    (found,) = lines_of(SCRIPT, ["keys"])
    assert found.keys() > OVER_ACTIVATIONS
    assert set(found.values()) == {1}, found
