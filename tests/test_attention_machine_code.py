"""What the compiler makes of the kernels of attention. Needs no GPU; compiled in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_attention.py"
KERNELS = {"forward_kernel", "dq_kernel", "dkv_kernel"}
# Bytes of shared memory that a program can have: CUDA C++ Programming Guide, compute capabilities 8.0, 9.0 and 10.0
# (one KB of which is the system's); CDNA 3 ISA, local data share.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return lines_of(SCRIPT, ["compile"])


def label(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "head", "dtype", "causal", "share_c", "target"))


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    """But for heads of 41, see docs/attention.md."""
    assert {(row["kernel"], row["target"]) for row in compiled} == {
        (name, target) for name in KERNELS for target in SHARED
    }
    for row in compiled:
        if row["head"] % 8 == 0:
            assert row["spills"] == row["scratch"] == 0, label(row)


def test_two_programs_fit_the_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert 2 * row["shared"] <= SHARED[row["target"]], label(row)


def test_accesses_are_as_wide_as_rows_allow(compiled: list[dict[str, Any]]) -> None:
    """Beside tensors there are 4 bytes a key and a row, and scalars.

    AMD's matrix cores leave a thread 4 results that follow each other, and small tiles of fp32 have 8 bytes a thread.
    """
    for row in compiled:
        if row["head"] % 8 == 0:
            assert row["loads"].keys() & ({"8", "16"} if row["dtype"] == "fp32" else {"16"}), label(row)
            whole = row["dtype"] != "fp32" and row["target"] != "gfx942"
            assert set(row["stores"]) - {"4"} <= ({"16"} if whole else {"8", "16"}), label(row)


def test_no_recompilation_when_pattern_seed_or_scales_change() -> None:
    (found,) = lines_of(SCRIPT, ["keys"])
    assert found == dict.fromkeys(KERNELS, 1)
