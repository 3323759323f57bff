"""What compilers make of the kernels, but attention's, without a GPU: `python bench/machine_code.py` in a checkout.

Compiles all kernels of every case of launches.py for CUDA 80, 90, 100, 120 and HIP gfx90a, gfx942, gfx950, and prints
one table. `--json FILE` writes the rows, `--page` writes docs/machine-code.md. What was compiled before is kept in
`.benchmarks/`, so that only kernels that changed take time. About 10 minutes for everything on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import launches
import torch
from machine.compiling import TARGETS
from machine.compiling import compile_launch
from machine.copying import copy
from machine.devices import ARCHITECTURES
from machine.devices import DEVICES
from machine.devices import predict
from machine.devices import resident_warps
from machine.recording import OtherPasses
from machine.recording import launching_for
from machine.recording import meta
from machine.recording import missing_internals
from machine.recording import recorded
from machine.work import Work
from machine.work import work_of
from page import write_page

Row = dict[str, Any]


@cache
def _cases(target: str) -> list[launches.Case]:
    with launching_for(target):
        return launches.cases()


def why_skipped(target: str) -> str | None:
    """Why this Triton cannot compile for a target; None if it can."""
    with recorded() as found:
        copy(meta(4096, dtype=torch.float32))
    try:
        compile_launch(found[0], target)
    except Exception as error:  # whatever Triton, LLVM or ptxas raise for what they do not know
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def row(place: int, target: str) -> Row | str:
    """One row of the table: a case, by its place in `launches.cases()`, on a target; or why there is none."""
    case = _cases(target)[place]
    try:
        with launching_for(target):
            return _row(case, target)
    except Exception as error:  # of compilers, and code that cannot be counted
        return f"{case.name} on {target}: " + " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _row(case: launches.Case, target: str) -> Row:
    with recorded():
        case.run()  # once for the tables that are made and copied to the device in the first call
    with OtherPasses() as passes, recorded() as found:
        case.run()
    works = [work_of(launch, compile_launch(launch, target), case.turns.get(launch.name)) for launch in found]
    main = max(works, key=lambda work: sum(work.moved.values()))
    elements = case.elements
    return {
        "op": case.op,
        "shape": "x".join(map(str, case.shape)),
        "layout": case.layout,
        "dtype": case.dtype,
        "target": target,
        "minimum_loaded": case.minimum[0],
        "minimum_stored": case.minimum[1],
        "loaded": (_moved(works, "load") + passes.loaded) / elements,
        "stored": (_moved(works, "store") + passes.stored) / elements,
        "by_torch": (passes.loaded + passes.stored) / elements,
        "load_width": _width(main, "load"),
        "store_width": _width(main, "store"),
        "instructions": sum(work.executed for work in works) / elements,
        "registers": max(work.code.registers for work in works),
        "spills": sum(work.code.spills for work in works),
        "scratch": max(work.code.scratch for work in works),
        "shared": max(work.code.shared for work in works),
        "resident_warps": resident_warps(main),
        "most_warps": ARCHITECTURES[target].warps,
        "kernels": [_kernel(work, elements) for work in works],
        "devices": {name: _device(works, passes, name) for name, device in DEVICES.items() if device.target == target},
    }


def _kernel(work: Work, elements: int) -> Row:
    return {
        "name": work.launch.name,
        "programs": work.launch.programs,
        "threads": work.code.threads,
        "in_code": work.code.instructions,
        "per_thread": work.per_thread,
        "instructions": work.executed / elements,
        "asked": {kind: count / elements for kind, count in work.asked.items()},
        "moved": {f"{kind} {argument}": count / elements for (argument, kind), count in work.moved.items()},
        "loads": dict(work.code.by_width("load")),
        "stores": dict(work.code.by_width("store")),
        "atomics": dict(work.code.by_width("atomic")),
        "registers": work.code.registers,
        "spills": work.code.spills,
        "scratch": work.code.scratch,
        "shared": work.code.shared,
        "resident_warps": resident_warps(work),
        "loops": len(work.code.loops),
        "lane_loops": work.lane_loops,
    }


def _device(works: list[Work], passes: OtherPasses, name: str) -> Row:
    found = [predict(work, DEVICES[name]) for work in works]
    memory = sum(one.memory for one in found) + (passes.loaded + passes.stored) / DEVICES[name].bandwidth
    issue = sum(one.issue for one in found)
    pipe = max(found, key=lambda one: one.issue).pipe
    bound = "memory" if memory >= issue else "issue"
    return {"memory_us": memory * 1e6, "issue_us": issue * 1e6, "pipe": pipe, "bound": bound, "share": issue / memory}


def _moved(works: list[Work], kind: str) -> float:
    return sum(count for work in works for (_, of_kind), count in work.moved.items() if of_kind == kind)


def _width(work: Work, kind: str) -> int:
    """The widest access through which as many bytes go as the tensor has that the kernel loads or stores most of."""
    asked: Counter[int] = Counter()
    for opcode, count in work.opcodes.items():
        access = work.code.access(opcode)
        if access is not None and access[0] == kind:
            asked[access[1]] += count * access[1] * work.code.threads * work.launch.programs  # type: ignore[assignment]
    left = max((count for (_, of_kind), count in work.moved.items() if of_kind == kind), default=0.0)
    for width in sorted(asked, reverse=True):
        left -= asked[width]
        if left <= 0:
            return width
    return min(asked, default=0)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of at most 80 columns: a heading a case, a line a target."""
    lines = [
        "Per element: bytes loaded and stored, instructions executed. Width: bytes of",
        "accesses that load/store an activation. Warps: resident, of how many. Bound:",
        "Memory or Issue, and the time of issue in percent of the time of memory.",
    ]
    heading = ""
    for one in rows:
        new = (
            f"{one['op']}, {one['shape']} {one['layout']} {one['dtype']}, "
            f"minimum {one['minimum_loaded']:g} + {one['minimum_stored']:g} bytes"
        )
        if new != heading:
            heading = new
            lines += ["", heading, " target  load store  width instr. regs spill shared  warps  bound"]
        bounds = " ".join(
            f"{name} {device['bound'][0].upper()}{100 * device['share']:.0f}" for name, device in one["devices"].items()
        )
        width = f"{one['load_width']:2}/{one['store_width']:<2}"
        lines.append(
            f" {one['target']:6} {one['loaded']:5.2f} {one['stored']:5.2f}  {width} "
            f"{one['instructions']:6.2f} {one['registers']:4} {one['spills']:5} {one['shared']:6} "
            f" {one['resident_warps']:2}/{one['most_warps']:<2}  {bounds or '–'}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this, e.g. 'tiled 128x160x32x32'")
    parser.add_argument("--target", action="append", choices=TARGETS, help="one target instead of all; can be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--page", action="store_true", help="write docs/machine-code.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default %(default)s")
    arguments = parser.parse_args()
    missing = missing_internals()
    if missing is not None:
        print(f"nothing compiled: {missing}", file=sys.stderr)
        return 1
    if arguments.page and (arguments.only or arguments.target):
        parser.error("--page needs all cases and targets")

    targets = arguments.target or list(TARGETS)
    skipped = {target: reason for target in targets if (reason := why_skipped(target)) is not None}
    places = [place for place, case in enumerate(launches.cases()) if arguments.only in case.name]
    jobs = [(place, target) for place in places for target in targets if target not in skipped]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(row, *zip(*jobs, strict=True), chunksize=1)) if jobs else []
    rows = [one for one in done if not isinstance(one, str)]
    failed = [one for one in done if isinstance(one, str)]
    print("\n".join(table(rows)))
    for target, reason in skipped.items():
        print(f"\n{target} was skipped: {reason}")
    for reason in failed:
        print(f"\nno row for {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.page:
        write_page(rows, skipped, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
