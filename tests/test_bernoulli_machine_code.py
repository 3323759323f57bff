"""What the compiler makes of the Triton kernels of the Bernoulli op. Needs no GPU; compiled in processes of their own.

`pytest -s` shows a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_bernoulli.py"

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    kernels = lines_of(SCRIPT, ["compile"])
    print()
    for kernel in kernels:
        print(
            f"{kernel['case']:26} {kernel['kernel']:14} {kernel['dtype']:4} {kernel['target']:6} "
            f"{kernel['registers']:3} registers, {kernel['per_element']:4.1f} instructions per element, "
            f"stores {kernel['stores']}"
        )
    return kernels


def label(kernel: dict[str, Any]) -> str:
    return " ".join(kernel[name] for name in ("case", "dtype", "target"))


def of_the_activation(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kernel for kernel in compiled if kernel["kernel"] != "count_kernel"]


def test_what_is_compiled(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == {
        "cells_kernel", "rows_kernel", "odd_rows_kernel", "strided_kernel", "count_kernel",
    }  # fmt: skip
    assert {kernel["target"] for kernel in compiled} == {"sm_90", "gfx942"}
    assert {kernel["dtype"] for kernel in compiled} == {"fp64", "fp32", "fp16", "bf16"}


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    """At most 128 registers: four programs of 128 threads on a processor of 65,536."""
    for kernel in compiled:
        assert kernel["spilled"] == 0, label(kernel)
        assert kernel["scratch"] == 0, label(kernel)
        assert kernel["registers"] <= 128, (label(kernel), kernel["registers"])


def test_every_access_takes_16_bytes(compiled: list[dict[str, Any]]) -> None:
    """All these shapes allow it. The stores of a thread are its share of a tile; loads may include the seed."""
    for kernel in of_the_activation(compiled):
        count = kernel["tile_bytes"] // 16 // kernel["threads"]
        assert kernel["stores"] == {"16": count}, (label(kernel), kernel["raw"])
        assert kernel["loads"].get("16", 0) == count, (label(kernel), kernel["raw"])


# Kernels that add 64 bits, the first element of a tile, and then 32, the place in the tile.
FIRST_OF_TILE = {"cells_kernel", "odd_rows_kernel"}


def test_every_element_is_read_once_and_written_once(compiled: list[dict[str, Any]]) -> None:
    """Straight-line code, one load and one store; their offsets are of 64 bits, for 2^31 and more, or those of the
    first element of a tile are.
    """
    for kernel in of_the_activation(compiled):
        offsets = ["i64", "i32"] if kernel["kernel"] in FIRST_OF_TILE else ["i64"]
        assert kernel["offsets"] == {"x_ptr": offsets, "y_ptr": offsets}, label(kernel)
        assert kernel["accesses"] == {"load": 1, "store": 1}, label(kernel)
        assert kernel["loops"] == 0, label(kernel)


def test_large_activations_are_not_addressed_with_32_bits(compiled: list[dict[str, Any]]) -> None:
    """AMD's buffer instructions take 32-bit offsets: fit for less than 2^31 bytes, and only there, or from the first
    element of a tile on.
    """
    huge = [kernel for kernel in compiled if kernel["case"].startswith("huge") and kernel["target"] == "gfx942"]
    assert len(huge) == 3
    for kernel in huge:
        if kernel["kernel"] not in FIRST_OF_TILE:
            assert not any(name.startswith("buffer_") for name in kernel["raw"]), kernel["raw"]


# SASS instructions per element on sm_90, all kernels in bf16; a call of Philox takes 10 of them (docs/bernoulli.md).
MOST = {"cells_kernel": 22, "rows_kernel": 18, "odd_rows_kernel": 24, "strided_kernel": 22}
MOST_UNALIGNED = 26  # three calls for eight places


def test_instructions_per_element(compiled: list[dict[str, Any]]) -> None:
    """An H100 moves 4 bytes in the time of about 40 instructions: there all are bound by memory."""
    found = [
        kernel for kernel in of_the_activation(compiled) if (kernel["dtype"], kernel["target"]) == ("bf16", "sm_90")
    ]
    assert len(found) >= 10
    for kernel in found:
        most = MOST_UNALIGNED if kernel["case"].endswith("channels_last 7x7") else MOST[kernel["kernel"]]
        assert kernel["per_element"] <= most, (label(kernel), kernel["per_element"])


def test_no_recompilation_when_rate_seed_or_rank_change() -> None:
    (keys,) = lines_of(SCRIPT, ["keys"])
    assert keys.pop("control") == 2
    assert len(keys) == 8
    assert set(keys.values()) == {1}, keys
