"""What the compiler makes of the Triton kernels: widths of memory accesses, registers, rounding, keys. Needs no GPU.

The kernels are compiled by `compile_kernels.py` in processes of their own, because this one runs them interpreted.
`pytest -s` shows a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_kernels.py"
PARTS = 2
# With 128 registers a thread, a processor of any of these GPUs (65536 registers) runs four blocks of 128 threads. Only
# float64 in channels_last comes close; the other dtypes take half of it.
MOST_REGISTERS = 128

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    kernels = lines_of(SCRIPT, *(["compile", str(part), str(PARTS)] for part in range(PARTS)))
    order = ("kernel", "shape", "dtype", "target")
    kernels.sort(key=lambda kernel: tuple(kernel[name] for name in order))
    print()
    for kernel in kernels:
        per_element = kernel["instructions"] * kernel["threads"] / kernel["tile"] if kernel["tile"] else 0.0
        print(
            f"{kernel['kernel']:26} {kernel['shape']:15} {kernel['dtype']:4} {kernel['target']:6} "
            f"{kernel['registers']:3} registers, {per_element:4.1f} instructions per element, "
            f"loads {by_width(kernel['loads'])}, stores {by_width(kernel['stores'])}"
        )
    return kernels


def by_width(accesses: dict[str, int]) -> str:
    return " ".join(f"{count}x{width}B" for width, count in sorted(accesses.items(), key=lambda item: -int(item[0])))


def of_the_activation(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kernel for kernel in compiled if kernel["kernel"] != "draw_kernel"]


def label(kernel: dict[str, Any]) -> str:
    return " ".join(kernel[name] for name in ("kernel", "shape", "dtype", "target"))


def test_what_is_compiled(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["target"] for kernel in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {kernel["dtype"] for kernel in compiled} == {"fp64", "fp32", "fp16", "bf16"}
    assert {kernel["kernel"] for kernel in compiled} == {"draw_kernel", "apply_kernel", "apply_channels_last_kernel"}
    assert len({label(kernel) for kernel in compiled}) == len(compiled) >= 60


def test_accesses_are_as_wide_as_memory_allows(compiled: list[dict[str, Any]]) -> None:
    """16 bytes, whatever the size of a map, because maps follow each other; in channels_last, where channels allow it.

    The activation is all that these kernels store, so no store may be narrower, and the stores of a thread are exactly
    its share of a tile. Loads of that width are at least as many; they may include placements.
    """
    wide = 0
    for kernel in of_the_activation(compiled):
        width = next(width for width in (16, 8, 4, 2) if kernel["run"] % width == 0)
        expected = kernel["tile_bytes"] // width // kernel["threads"]
        assert kernel["stores"] == {str(width): expected}, (label(kernel), kernel["raw"])
        assert kernel["loads"].get(str(width), 0) >= expected, (label(kernel), kernel["raw"])
        wide += width == 16
    assert wide == len(of_the_activation(compiled))


def test_every_element_is_read_once_and_written_once(compiled: list[dict[str, Any]]) -> None:
    """All loads and stores of a program together are one tile, whose place has 64 bits, for more than 2^31 elements."""
    for kernel in of_the_activation(compiled):
        tile = kernel["tile"]
        x, y = kernel["activation"]["x_ptr"], kernel["activation"]["y_ptr"]
        assert x["elements"] == {"load": tile, "store": 0}, label(kernel)
        assert y["elements"] == {"load": 0, "store": tile}, label(kernel)
        assert x["offsets"] == y["offsets"] == ["i64", "i32"], label(kernel)


# Limits of instructions an element, in bfloat16 and float32, for maps that hold a multiple of 8 cells (and 4 of them),
# and the others: 2 above what it takes to be bound by memory on the fastest GPUs known.
LIMITS = {"bf16": (10, 16), "fp32": (12, 18)}
LIMITED = {
    "128x160x32x32",
    "128x320x16x16",
    "128x640x8x8",
    "32x256x56x56",
    "32x512x28x28",
    "32x1024x14x14",
    "32x2048x7x7",
}


def test_few_instructions_an_element(compiled: list[dict[str, Any]]) -> None:
    """SASS of both kernels of the op. They have no loops: a thread executes no more than the program has."""
    (draw,) = (kernel for kernel in compiled if kernel["kernel"] == "draw_kernel" and kernel["target"] == "sm_90")
    checked = set()
    for kernel in of_the_activation(compiled):
        n, c, height, width = map(int, kernel["shape"].split("x"))
        if kernel["shape"] not in LIMITED or kernel["target"] != "sm_90" or kernel["dtype"] not in LIMITS:
            continue
        drawing = draw["instructions"] * draw["threads"] * -(-n * c // draw["planes"])
        applying = kernel["instructions"] * kernel["threads"] * kernel["programs"]
        per_element = (drawing + applying) / (n * c * height * width)
        assert per_element <= LIMITS[kernel["dtype"]][height * width % 8 != 0], (label(kernel), per_element)
        checked.add((kernel["kernel"], kernel["shape"], kernel["dtype"]))
    assert len(checked) == 2 * len(LIMITED) * len(LIMITS)


def test_more_than_2_31_planes_can_be_placed(compiled: list[dict[str, Any]]) -> None:
    drawing = [kernel for kernel in compiled if kernel["kernel"] == "draw_kernel"]
    assert len(drawing) == 4
    for kernel in drawing:
        assert kernel["starts"] == ["i64"], label(kernel)


def test_large_activations_are_not_addressed_with_32_bits(compiled: list[dict[str, Any]]) -> None:
    """AMD's buffer instructions take 32-bit offsets: fit for those within a tile, which the contiguous kernel adds to a
    place of 64 bits that is the same for all threads; in channels_last the place of each thread has 64 bits.
    """
    amd = [kernel for kernel in of_the_activation(compiled) if kernel["target"] == "gfx942"]
    huge = [kernel for kernel in amd if kernel["shape"] == "4100x1024x32x32"]
    assert len(huge) == 2
    (kernel,) = (kernel for kernel in huge if kernel["kernel"] == "apply_channels_last_kernel")
    assert not any(name.startswith("buffer_store") for name in kernel["raw"]), kernel["raw"]
    # Placements are few: they may be loaded by buffer instructions.
    share = kernel["tile_bytes"] // 16 // kernel["threads"]
    assert kernel["raw"].get("global_load_dwordx4", 0) >= share, kernel["raw"]
    assert kernel["raw"].get("global_store_dwordx4", 0) == share, kernel["raw"]


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["spilled"] == 0, (label(kernel), kernel["raw"])
        assert kernel["scratch"] == 0, label(kernel)
        assert kernel["registers"] <= MOST_REGISTERS, (label(kernel), kernel["registers"])


def test_bfloat16_is_rounded_to_nearest_even(compiled: list[dict[str, Any]]) -> None:
    """One rounding conversion on NVIDIA, none that cuts off. gfx942 has no such instruction to look for."""
    checked = 0
    for kernel in of_the_activation(compiled):
        if kernel["dtype"] == "bf16" and kernel["target"].startswith("sm_"):
            assert kernel["bf16_conversions"], label(kernel)
            assert all(name.startswith("cvt.rn.bf16") for name in kernel["bf16_conversions"]), label(kernel)
            checked += 1
    assert checked >= 20


def test_no_recompilation_when_pattern_seed_or_rank_change() -> None:
    """Triton looks compiled code up by a key that it computes from the arguments: 50 launches, one key.

    Neither do the sides of the map recompile where it holds a multiple of 8 cells; the dtype does, and a map of 7x7.
    """
    (found,) = lines_of(SCRIPT, ["keys"])
    expected = {"maps": {"launches": 2, "keys": 1}, "control": {"launches": 3, "keys": 3}}
    fifty = {"launches": 50, "keys": 1}
    assert {name: value for name, value in found.items() if value != expected.get(name.split()[1], fifty)} == {}
    assert len(found) == 12 + 2 * len(expected)
