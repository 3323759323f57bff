"""What the compiler makes of the Triton kernels of DropBlock: accesses, registers, instructions, keys. Needs no GPU.

The kernels are compiled by `compile_block.py` in processes of their own, because this one runs them interpreted.
`pytest -s` shows a table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from compiling import lines_of

SCRIPT = Path(__file__).parent / "compile_block.py"
PARTS = 2
# Per element, all kernels of an application together, the draw by an upper bound. An H100 takes longer to read and
# write an element than to execute 40; what was reached (19.9 on 7x7 in fp32, 30.4 in bf16) must not be lost.
MOST_INSTRUCTIONS = {"contiguous": 21, "channels_last": 31}
# With 128 registers a thread, a processor of any of these GPUs (65536 registers) runs four blocks of 128 threads.
MOST_REGISTERS = 128

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    lines = lines_of(SCRIPT, *(["compile", str(part), str(PARTS)] for part in range(PARTS)))
    print()
    for line in lines:
        print(
            f"{label(line):85} {line['registers']:3} registers, {line['per_element']:5.2f} instructions per element, "
            f"loads {line['loads']}, stores {line['stores']}, atomics {line['atomics']}"
        )
    return lines


def label(line: dict[str, Any]) -> str:
    shared = "shared" if line["share_c"] else "per channel"
    parts = ("kernel", "map", "block_size", "dtype", "format", "target")
    return " ".join(str(line[name]) for name in parts) + f" {shared}"


def of_the_activation(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in compiled if line["kernel"].startswith("apply")]


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    assert {line["target"] for line in compiled} == {"sm_90", "gfx942"}
    assert len(of_the_activation(compiled)) >= 40
    for line in compiled:
        assert line["spills"] == 0, label(line)
        assert line["scratch"] == 0, label(line)
        assert line["registers"] <= MOST_REGISTERS, label(line)


def test_the_activation_moves_once_in_accesses_of_16_bytes(compiled: list[dict[str, Any]]) -> None:
    """On every map, those whose rows and planes are no multiple of 16 bytes included. Nothing else is stored."""
    for line in of_the_activation(compiled):
        expected = line["tile_bytes"] // 16 // line["threads"]
        assert line["stores"] == {"16": expected}, label(line)
        assert line["loads"]["16"] == expected, label(line)
        assert line["accesses"] == {"load": 1, "store": 1}, label(line)


def test_offsets_have_64_bits(compiled: list[dict[str, Any]]) -> None:
    """Of a tensor of more than 2^31 elements, and of a bitmap of more than 2^31 bits."""
    huge = [line for line in compiled if line["map"] == "huge"]
    assert len(huge) == 12
    for line in huge:
        # First comes where a tile begins; what is added to that, inside the tile, may be shorter.
        of_activation = ["i64"] if line["kernel"].startswith("apply") else []
        assert line["offsets"]["x_ptr"] == line["offsets"]["y_ptr"] == of_activation, (label(line), line["offsets"])
        assert set(line["offsets"]["bits_ptr"]) == {"i64"}, (label(line), line["offsets"])


def test_instructions_per_element(compiled: list[dict[str, Any]]) -> None:
    total: Counter[str] = Counter()
    for line in compiled:
        if line["target"] == "sm_90" and line["map"] != "huge" and not line["kernel"].endswith("scale"):
            total[label({**line, "kernel": line["format"]})] += line["per_element"]
    assert len(total) >= 36
    for name, count in total.items():
        assert count <= MOST_INSTRUCTIONS[name.split()[0]], (name, count)


def test_no_recompilation_when_rate_size_seed_or_rank_change() -> None:
    """Triton looks compiled code up by a key that it computes from the arguments: 50 launches, one key."""
    (found,) = lines_of(SCRIPT, ["keys"])
    launches = {name: value for name, value in found.items() if "control" not in name}
    assert len(launches) == 40
    for name, value in launches.items():
        assert value == {"launches": 50, "keys": 1}, name
    for name, value in found.items():
        if "control" in name:
            assert value == {"keys": 3}, name
