"""What one launch does: instructions executed, bytes asked for, bytes that must move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from os.path import basename
from typing import Any

import torch

from .compiling import MachineCode
from .compiling import bind
from .recording import Launch
from .ttir import Program

# Of the instructions of a loop, the share that must come from the lines of a loop of the program to be that loop: code
# moves in and out of loops, but not most of it.
_COVERED = 0.5


@dataclass(frozen=True)
class Work:
    """One launch on one target; all sums are over all its programs.

    Attributes:
        opcodes: how many instructions of each opcode one thread executes, at most.
        warps: of a program.
        asked: bytes that the executed load, store and atomic instructions ask for, by kind, lanes that are masked off
            included.
        moved: bytes between the kernel and memory by argument and kind, if every access of the program reads or writes
            its argument once: what is asked for, but at most the size of the argument.
        lane_loops: loops of the machine code that are not in the program. Compilers make them to go through the lanes
            of a warp, so they are counted with one turn a lane; or to try an atomic until nothing came between, which
            is counted as succeeding at once.
    """

    launch: Launch
    code: MachineCode
    opcodes: Counter[str]
    asked: dict[str, float]
    moved: dict[tuple[str, str], float]
    lane_loops: int

    @property
    def warps(self) -> int:
        return self.code.threads // self.code.warp_size

    @property
    def per_thread(self) -> float:
        """Instructions that one thread executes."""
        return float(sum(self.opcodes.values()))

    @property
    def executed(self) -> float:
        """Instructions times threads, over all programs."""
        return self.per_thread * self.code.threads * self.launch.programs


@lru_cache(maxsize=256)
def _program(ttir: str, file: str) -> Program:
    return Program(ttir, file)


def work_of(launch: Launch, code: MachineCode, turns: dict[int, float] | None = None) -> Work:
    """What a launch does on the target of its code.

    Args:
        turns: of loops of the program, by their place in it, how often each turns when it is entered, the mean over
            programs. Needed for those that do not follow from the arguments; others are derived.

    Raises:
        ValueError: how often a loop turns is neither given nor to be derived.
    """
    _, _, bound, _ = bind(launch, code.target)
    program = _program(code.ttir, basename(launch.kernel.fn.__code__.co_filename))
    known = program.turns(bound, launch.grid)
    for place, given in (turns or {}).items():
        known[place] = given
    missing = [place for place, one in enumerate(known) if one is None]
    if missing:
        raise ValueError(f"{launch.name}: how often loops {missing} of {len(known)} turn must be given")
    of_program = [one for one in known if one is not None]
    trips, lane_loops = turns_of(code, program, of_program)

    opcodes: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for segment in code.segments:
        times = _product(segment.loop, trips, [loop.parent for loop in code.loops])
        for opcode, count in segment.opcodes.items():
            opcodes[opcode] += count * times  # type: ignore[assignment]
            access = code.access(opcode)
            if access is not None and access[0] in ("load", "store", "atomic"):
                asked[access[0]] += count * times * access[1] * code.threads * launch.programs  # type: ignore[assignment]
    return Work(launch, code, opcodes, dict(asked), _moved(launch, program, of_program, bound), lane_loops)


def _product(loop: int, trips: list[float], parents: list[int]) -> float:
    times = 1.0
    while loop != -1:
        times *= trips[loop]
        loop = parents[loop]
    return times


def _moved(launch: Launch, program: Program, turns: list[float], bound: dict[str, Any]) -> dict[tuple[str, str], float]:
    moved: Counter[tuple[str, str]] = Counter()
    parents = [loop.parent for loop in program.loops]
    for access in program.accesses:
        asked = access.lanes * access.size * launch.programs * _product(access.loop, turns, parents)
        tensor = bound.get(access.argument)
        most = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else asked
        for kind in ("load", "store") if access.kind == "atomic" else (access.kind,):
            moved[access.argument, kind] += min(asked, most)  # type: ignore[assignment]
    return dict(moved)


def turns_of(code: MachineCode, program: Program, turns: list[float]) -> tuple[list[float], int]:
    """How often each loop of the machine code turns, and how many of them are not in the program.

    A loop of the program can appear as several loops of the machine code: one that does many turns at once, and one for
    the rest. How many turns one does is told by the bytes it asks for.
    """
    source = [-1] * len(code.loops)
    for place in sorted(range(len(code.loops)), key=lambda place: len(_around(code, place))):
        around = next((source[outer] for outer in _around(code, place) if source[outer] != -1), -1)
        source[place] = _matching(code.loops[place].lines, program, around)
    trips = [1.0 if _retries(code, place) else float(code.warp_size) for place in range(len(code.loops))]
    groups: dict[tuple[int, int], list[int]] = {}
    for place, found in enumerate(source):
        if found != -1:
            groups.setdefault((found, code.loops[place].parent), []).append(place)
    for (found, _), places in groups.items():
        asked = sum(
            access.size * max(1.0, access.lanes / code.threads) for access in program.accesses if access.loop == found
        )
        # Only innermost loops are unrolled; in others there is what an inner one left over.
        outer = {loop.parent for loop in code.loops}
        at_once = {
            place: max(1, round(_asked(code, place) / asked)) if asked and place not in outer else 1 for place in places
        }
        left = turns[found]
        twins = sum(loop.lines == program.loops[found].lines for loop in program.loops)
        for place in sorted(places, key=lambda place: -at_once[place]):
            if twins > 1:
                # Copies of one loop cannot be told apart: each may be the rolled one.
                trips[place] = turns[found] / at_once[place]
                continue
            last = place == min(places, key=lambda place: at_once[place])
            trips[place] = left / at_once[place] if last else float(left // at_once[place])
            left -= trips[place] * at_once[place]
    return trips, source.count(-1)


def _around(code: MachineCode, loop: int) -> list[int]:
    """The loops around a loop, from the inside."""
    found = []
    while code.loops[loop].parent != -1:
        loop = code.loops[loop].parent
        found.append(loop)
    return found


def _retries(code: MachineCode, loop: int) -> bool:
    """Whether a loop tries a compare-and-swap until it succeeds."""
    opcodes = (opcode for segment in code.segments if segment.loop == loop for opcode in segment.opcodes)
    return any("cmpswap" in opcode or ".CAS" in opcode for opcode in opcodes)


def _asked(code: MachineCode, loop: int) -> float:
    """Bytes of global memory that one turn of a loop asks for, a thread; inner loops not included."""
    bytes_asked = 0
    for segment in code.segments:
        if segment.loop == loop:
            for opcode, count in segment.opcodes.items():
                access = code.access(opcode)
                if access is not None and access[0] in ("load", "store", "atomic"):
                    bytes_asked += count * access[1]
    return bytes_asked


def _matching(lines: Counter[int], program: Program, around: int) -> int:
    """The loop of the program, inside loop `around`, that covers most of these source lines; -1 if none covers half.

    An outer loop covers what an inner one does: of equals it is the innermost.
    """
    total = sum(count for line, count in lines.items() if line > 0)
    best, most, size = -1, _COVERED * total, 0
    for place, loop in enumerate(program.loops):
        outer = loop.parent
        while outer not in (around, -1):
            outer = program.loops[outer].parent
        covered = sum(count for line, count in lines.items() if line in loop.lines)
        better = covered > most or (covered == most and (best == -1 or len(loop.lines) < size))
        if outer == around and total and better:
            best, most, size = place, covered, len(loop.lines)
    return best
