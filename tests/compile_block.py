"""Compiles the Triton kernels of DropBlock for devices that need not be there, and prints what the code consists of.

A script, to be run without TRITON_INTERPRET (the test session sets it, and it decides when a kernel is decorated):

    python tests/compile_block.py compile PART PARTS     one JSON object a line, every PARTS-th case from PART on
    python tests/compile_block.py keys                   one JSON object: the specialisation keys of many launches

Launches are recorded on tensors without storage and compiled by `bench/machine`, which also finds the loops.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from compile_kernels import accesses_of_activation
from machine import compiling
from machine import recording

from autodropout.kernels import block_triton
from autodropout.kernels.block import Geometry
from autodropout.kernels.block import geometry

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAPS = {
    32: (128, 160, 32, 32),
    16: (128, 320, 16, 16),
    8: (128, 640, 8, 8),
    56: (32, 256, 56, 56),
    28: (32, 512, 28, 28),
    14: (32, 1024, 14, 14),
    7: (32, 2048, 7, 7),
    # 2^32 + 2^22 elements, which are only compiled for.
    "huge": (4100, 1024, 32, 32),
}
RATE, BLOCK_SIZE = 0.1, 7

Case = tuple[Any, str, str, bool, str, int]  # map, dtype, format, share_c, target, block size


def cases() -> list[Case]:
    """Every map in fp32 and bf16 in both formats on sm_90; the rest where it can differ."""
    formats = ("contiguous", "channels_last")
    both = ("sm_90", "gfx942")
    chosen: list[Case] = [
        (side, dtype, form, False, "sm_90", BLOCK_SIZE)
        for side in MAPS
        for dtype in ("fp32", "bf16")
        for form in formats
        if side != "huge"
    ]
    chosen += [(32, dtype, form, False, "sm_90", BLOCK_SIZE) for dtype in ("fp16", "fp64") for form in formats]
    chosen += [(side, "bf16", form, True, target, BLOCK_SIZE) for side in (8, 7) for form in formats for target in both]
    chosen += [(side, "bf16", form, False, "gfx942", BLOCK_SIZE) for side in (32, 7) for form in formats]
    chosen += [("huge", "bf16", form, False, target, BLOCK_SIZE) for form in formats for target in both]
    chosen += [(side, "bf16", "contiguous", False, "sm_90", size) for side in (32, 8) for size in (3, 5)]
    return chosen


def record(shape: tuple[int, ...], dtype: str, form: str, share_c: bool, blocks: Geometry) -> list[recording.Launch]:
    """What one application launches; and, in the end, what the scale of normalize="mask" does."""
    x = recording.meta(*shape, dtype=DTYPES[dtype], channels_last=form == "channels_last")
    seed, scale = recording.meta(dtype=torch.int64), recording.meta(dtype=torch.float64)
    n, c, height, width = shape
    with recording.recorded() as launches:
        block_triton.apply(x, blocks, seed, scale, share_c, 0)
        block_triton.mask_scale((n, c, height, width), blocks, seed, share_c, 0)
    return launches


def first_offsets(ttir: str) -> dict[str, list[str]]:
    """The integer types of what is added first to the pointers of the activation and of the bitmap."""
    types: dict[str, list[str]] = {"x_ptr": [], "y_ptr": [], "bits_ptr": []}
    splats = dict(re.findall(r"(%[\w#]+) = tt\.splat (%[\w#]+)", ttir))
    for base, tensor, scalar in re.findall(r"tt\.addptr (%[\w#]+), .*?, (?:tensor<[\dx]*x(i\d+)>|(i\d+))", ttir):
        name = splats.get(base, base).removeprefix("%")
        if name in types:
            types[name].append(tensor or scalar)
    return types


def expected_calls(blocks: Geometry, planes: int) -> float:
    """Calls of Philox that a program makes for the fullest of its planes, in expectation: sum of P(most > 2 call)."""
    at_most = [(int(t) / 2**32) ** planes for t in blocks.thresholds.tolist()]
    return sum(1 - at_most[k] for k in range(0, len(at_most), 2))


def executed(code: compiling.MachineCode, launch: recording.Launch, blocks: Geometry, run: block_triton.Run) -> float:
    """An upper bound of the instructions that the threads of a program execute on average, times the programs.

    Of the draw, loops are those of the search, the calls, and inside the calls the words of a block. The compiler makes
    several of one: one that does four turns at once, known by its loads, and others for the rest. All are taken to do
    as many turns as fit, and the second block of a call always to be there. The calls are spread over the programs of
    axis 1.
    """
    if not code.loops:
        return code.instructions * code.threads * launch.programs
    outer = {loop.parent for loop in code.loops} - {-1}
    assert len(outer) == 1, outer
    (calls,) = outer
    words = len(run.bytes if launch.kwargs["INTERLEAVED"] else run.words)
    turns = {-1: 1.0, calls: expected_calls(blocks, launch.kwargs["BLOCK"]) / launch.grid[1]}
    loads = {
        segment.loop: sum(n for opcode, n in segment.opcodes.items() if (code.access(opcode) or ("",))[0] == "load")
        for segment in code.segments
    }
    for place, loop in enumerate(code.loops):
        if place != calls:
            inside = loop.parent == calls
            turns[place] = (words if inside else run.steps) // max(1, loads[place]) * (turns[calls] if inside else 1)
    total = sum(turns[segment.loop] * sum(segment.opcodes.values()) for segment in code.segments)
    return total * code.threads * launch.programs


def compile_case(case: Case) -> list[dict[str, Any]]:
    side, dtype, form, share_c, target, block_size = case
    shape = MAPS[side]
    size = DTYPES[dtype].itemsize
    elements = math.prod(shape)
    blocks = geometry(RATE, block_size, *shape[2:])
    run = block_triton.run_of(blocks, shape[3], torch.device("meta"))
    with recording.launching_for(target):
        launches = record(shape, dtype, form, share_c, blocks)
    lines = []
    for place, launch in enumerate(launches):
        code = compiling.compile_launch(launch, target)
        tile = launch.kwargs.get("TILE", 0) or launch.kwargs.get("FRAGMENTS", 0) * 8 * launch.kwargs.get("CHANNELS", 0)
        lines.append(
            {
                "kernel": launch.name + (" for the scale" if place == 2 else ""),
                "map": side,
                "dtype": dtype,
                "format": form,
                "share_c": share_c,
                "target": target,
                "block_size": block_size,
                "tile_bytes": tile * size,
                "threads": code.threads,
                "registers": code.registers,
                "spills": code.spills,
                "scratch": code.scratch,
                "loads": dict(code.by_width("load")),
                "stores": dict(code.by_width("store")),
                "atomics": dict(code.by_width("atomic")),
                "per_element": executed(code, launch, blocks, run) / elements,
                "offsets": first_offsets(code.ttir),
                "accesses": accesses_of_activation(code.ttir, dtype),
            }
        )
    return lines


def keys() -> dict[str, Any]:
    """By launch and map the number of different keys of 50 calls, with another rate, block size, seed and rank each.

    Here the tensors are real: their addresses are part of the keys. And, to show that keys do differ, their number
    when the dtype or the map changes.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    for shape, dtype in (((4, 6, 12, 10), torch.float32), ((1, 3, 130, 90), torch.bfloat16)):
        calls: list[list[recording.Launch]] = []
        for i in range(50):
            blocks = geometry(0.01 + i / 60, 1 + i % 17, *shape[2:])
            scale = torch.full((), i / 10, dtype=torch.float64)
            x = torch.randn(shape, generator=generator).to(dtype)
            with recording.recorded() as recorded:
                for share_c in (False, True):
                    # Seeds are elements of a tensor, of which every other one is aligned to 16 bytes.
                    for one in (x, x.to(memory_format=torch.channels_last)):
                        block_triton.apply(one, blocks, seeds[i], scale, share_c, 2**32 // 50 * i)
                    block_triton.mask_scale(shape, blocks, seeds[i], share_c, 2**32 // 50 * i)
            calls.append(recorded)
        for target in ("sm_90", "gfx942"):
            for place, same in enumerate(zip(*calls, strict=True)):
                different = {compiling.bind(launch, target)[3] for launch in same}
                name = f"{place} {same[0].name} {'x'.join(map(str, shape))} {target}"
                found[name] = {"launches": len(same), "keys": len(different)}
    for form in ("contiguous", "channels_last"):
        blocks = geometry(RATE, BLOCK_SIZE, 32, 32)
        control = [record(MAPS[32], "fp32", form, share_c, blocks)[1] for share_c in (False, True)]
        control.append(record(MAPS[32], "bf16", form, False, blocks)[1])
        found[f"control {form}"] = {"keys": len({compiling.bind(launch, "sm_90")[3] for launch in control})}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiler = commands.add_parser("compile")
    compiler.add_argument("part", type=int)
    compiler.add_argument("parts", type=int)
    commands.add_parser("keys")
    arguments = parser.parse_args()
    missing = recording.missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
    elif arguments.command == "keys":
        print(json.dumps(keys()))
    else:
        for case in cases()[arguments.part :: arguments.parts]:
            for line in compile_case(case):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
