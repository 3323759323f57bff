"""What the compiler makes of the Triton kernels of the token op: widths of accesses, spills, keys. Needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_token.py"
ELEMENTWISE = ("apply_kernel", "apply_keys_kernel")
# With 128 registers a thread, a processor of these GPUs (65536 registers) runs four blocks of 128 threads.
MOST_REGISTERS = 128
# Of a thread, divided by its elements: straight code, so that what is counted is what is executed. An H100 moves the 4
# bytes of an element in bf16 at 3.35 TB/s in the time of 40 instructions (132 processors, 4 x 32 lanes, 1.98 GHz).
MOST_INSTRUCTIONS = {
    ("apply_kernel", "none"): 21,
    ("apply_kernel", "share_t"): 12,
    ("apply_kernel", "share_c"): 8,
    ("apply_keys_kernel", "none"): 23,
    ("apply_keys_kernel", "share_t"): 19,
    ("apply_keys_kernel", "share_c"): 11,
}

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    kernels = lines_of(SCRIPT, ["compile"])
    print()
    for kernel in kernels:
        print(
            f"{label(kernel):52} {kernel['registers']:3} registers, {per_element(kernel):5.1f} instructions each, "
            f"loads {kernel['loads']}, stores {kernel['stores']}"
        )
    return kernels


def label(kernel: dict[str, Any]) -> str:
    return " ".join(kernel[name] for name in ("kernel", "case", "sharing", "dtype", "target"))


def per_element(kernel: dict[str, Any]) -> float:
    return float(kernel["instructions"] * kernel["threads"] / kernel["tile"]) if kernel["tile"] else 0.0


def of_the_activation(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kernel for kernel in compiled if kernel["kernel"] in ELEMENTWISE]


def test_what_is_compiled(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["target"] for kernel in compiled} == {"sm_90", "gfx942"}
    assert {kernel["kernel"] for kernel in compiled} == {*ELEMENTWISE, "cells_kernel", "spans_kernel", "count_kernel"}
    assert len({label(kernel) for kernel in compiled}) == len(compiled) >= 25


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["spilled"] == 0, (label(kernel), kernel["raw"])
        assert kernel["scratch"] == 0, label(kernel)
        assert kernel["registers"] <= MOST_REGISTERS, (label(kernel), kernel["registers"])


def test_accesses_are_as_wide_as_memory_allows(compiled: list[dict[str, Any]]) -> None:
    """16 bytes where rows are divisible by 16, also for heads that are a transposed view of (N, T, C).

    The activation is all that is stored, so the stores of a thread are its share of a tile; of loads there are more.
    """
    for kernel in of_the_activation(compiled):
        width = 4 if "by 4 bytes" in kernel["case"] else 16
        assert kernel["run"] % width == 0
        expected = kernel["tile_bytes"] // width // kernel["threads"]
        assert kernel["stores"] == {str(width): expected}, (label(kernel), kernel["raw"])
        assert kernel["loads"].get(str(width), 0) >= expected, (label(kernel), kernel["raw"])


def test_words_stay_in_the_threads_that_draw_them(compiled: list[dict[str, Any]]) -> None:
    """Where channels are neighbours nothing goes through shared memory, even if accesses are narrower than a call."""
    for kernel in compiled:
        if kernel["kernel"] == "apply_kernel":
            assert kernel["shared"] == 0, label(kernel)


def test_every_element_is_read_once_and_written_once(compiled: list[dict[str, Any]]) -> None:
    """The program adds one offset to x and one to y; both offsets are of 64 bits, for more than 2^31 elements."""
    for kernel in of_the_activation(compiled):
        assert kernel["offsets"] == {"x_ptr": ["i64"], "y_ptr": ["i64"]}, label(kernel)
        assert kernel["accesses"] == {"load": 1, "store": 1}, label(kernel)


def test_large_activations_are_not_addressed_with_32_bits(compiled: list[dict[str, Any]]) -> None:
    """AMD's buffer instructions take 32-bit offsets: fit for less than 2^31 bytes, and only there."""
    huge = [kernel for kernel in of_the_activation(compiled) if kernel["case"].startswith("huge")]
    assert {kernel["kernel"] for kernel in huge} == set(ELEMENTWISE)
    for kernel in huge:
        # The table of cells is small enough for buffer loads of any width; nothing but the activation is stored.
        assert not any(name.startswith("buffer_store") for name in kernel["raw"]), kernel["raw"]
        assert any(name.startswith("global_load_dwordx4") for name in kernel["raw"]), kernel["raw"]
        assert any(name.startswith("global_store_dwordx4") for name in kernel["raw"]), kernel["raw"]


def test_instructions_leave_memory_the_bound(compiled: list[dict[str, Any]]) -> None:
    checked = 0
    for kernel in of_the_activation(compiled):
        if kernel["target"] == "sm_90" and kernel["dtype"] == "bf16":
            narrow = "by 4 bytes" in kernel["case"]
            most = 33 if narrow else MOST_INSTRUCTIONS[kernel["kernel"], kernel["sharing"]]
            assert per_element(kernel) <= most, label(kernel)
            checked += 1
    assert checked >= 8


def test_bfloat16_is_rounded_to_nearest_even(compiled: list[dict[str, Any]]) -> None:
    for kernel in of_the_activation(compiled):
        if kernel["dtype"] == "bf16" and kernel["target"] == "sm_90":
            assert kernel["bf16_conversions"], label(kernel)
            assert all(name.startswith("cvt.rn.bf16") for name in kernel["bf16_conversions"]), label(kernel)


def test_no_recompilation_when_size_stride_rate_seed_or_rank_change() -> None:
    """Triton looks compiled code up by a key that it computes from the arguments: 50 launches, one key."""
    (found,) = lines_of(SCRIPT, ["keys"])
    assert found.pop("control") == 3
    assert len(found) == 20
    assert found == dict.fromkeys(found, 1)
