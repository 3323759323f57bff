"""Reads a kernel's program (TTIR): its accesses to memory by argument, and how often its loops turn in a launch.

TTIR still has structured loops and whole tensors, so that both follow from it: an access moves as many lanes as its
tensor has, once a turn of the loops around it, and a `for` turns as its bounds say, which are integer arithmetic on
the arguments, on the number of the program and on constants. Both sides of an `if` are taken to run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from os.path import basename
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
_LOCATION = re.compile(r"^(#loc\w*) = loc\((.*)\)$")
_FOR = re.compile(r"scf\.for (%[\w#]+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_DEFINITION = re.compile(r"^(%[\w#]+)(?::\d+)? = ([\w.]+) ?(.*)$")
_CARRIED = re.compile(r"(%[\w#]+) = (%[\w#]+)")
_THROUGH = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "tt.trans")
_THROUGH += ("ttg.convert_layout", "arith.select")


@dataclass(frozen=True)
class Access:
    """One load, store or atomic: the argument it goes through, lanes, bytes a lane, and the loop around, -1: none."""

    kind: str
    argument: str
    lanes: int
    size: int
    loop: int


@dataclass
class SourceLoop:
    """A loop of the program, the loop around it (-1: none), and the source lines of what is in it."""

    parent: int
    bounds: tuple[str, str, str] | None  # of a `for`: from, to, step
    lines: Counter[int] = field(default_factory=Counter)


class Program:
    """The accesses and loops of one kernel, in the order of the program."""

    def __init__(self, text: str, file: str) -> None:
        """Reads TTIR; `file` is the name of the kernel's source.

        Raises:
            ValueError: it has calls that were not inlined, or an access whose argument cannot be told.
        """
        self.accesses: list[Access] = []
        self.loops: list[SourceLoop] = []
        self._definitions: dict[str, tuple[str, str]] = {}
        self._carried: dict[str, str] = {}
        self._places = _Places(text, file)
        regions: list[int] = []  # of every open brace the innermost loop, -1 for none
        opened: list[int] = []  # of every open brace the loop that it is, -1 where it is another region
        for line in (line.strip() for line in text.splitlines()):
            if line.startswith("#loc") or not line:
                continue
            if "tt.call " in line:
                raise ValueError(f"a call that was not inlined: {line}")
            if line.startswith("}"):
                if not line.endswith("{"):
                    regions.pop()
                    # The location of a loop stands behind its last brace.
                    for around in self._around(opened.pop()):
                        self.loops[around].lines.update(self._places.lines(line))
                continue
            loop = regions[-1] if regions else -1
            for around in self._around(loop):
                self.loops[around].lines.update(self._places.lines(line))
            self._define(line)
            self._access(line, loop)
            if line.endswith("{"):
                is_loop = "scf.for " in line or "scf.while " in line
                if is_loop:
                    bounds = _FOR.search(line)
                    self.loops.append(SourceLoop(loop, bounds.group(2, 3, 4) if bounds else None))  # type: ignore[arg-type]
                regions.append(len(self.loops) - 1 if is_loop else loop)
                opened.append(len(self.loops) - 1 if is_loop else -1)

    def _around(self, loop: int) -> list[int]:
        found = []
        while loop != -1:
            found.append(loop)
            loop = self.loops[loop].parent
        return found

    def _define(self, line: str) -> None:
        definition = _DEFINITION.match(line)
        if definition:
            self._definitions[definition[1]] = (definition[2], definition[3])
        if "scf.for" in line or "scf.while" in line:
            _, found, carried = line.partition("iter_args(" if "scf.for" in line else "scf.while (")
            if found:
                self._carried.update(dict(_CARRIED.findall(carried.partition(") ")[0])))

    def _access(self, line: str, loop: int) -> None:
        match = re.search(r"\btt\.(load|store|atomic_rmw|atomic_cas)\b(.*)", line)
        if match is None:
            return
        pointer = re.search(r"%[\w#]+", match[2])
        kind = re.search(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>", match[2])
        if pointer is None or kind is None:
            raise ValueError(f"an access that cannot be read: {line}")
        lanes = math.prod(int(side) for side in kind[1].split("x")) if kind[1] else 1
        name = "atomic" if match[1].startswith("atomic") else match[1]
        self.accesses.append(Access(name, self._argument(pointer[0]), lanes, _BYTES[kind[2]], loop))

    def _argument(self, name: str) -> str:
        """The argument of the kernel that a pointer was made of."""
        seen = set()
        while name not in seen:
            seen.add(name)
            if name in self._carried:
                name = self._carried[name]
            elif name in self._definitions:
                operation, rest = self._definitions[name]
                operands = re.findall(r"%[\w#]+", rest)
                if operation not in _THROUGH or not operands:
                    raise ValueError(f"a pointer made by {operation}")
                name = operands[1 if operation == "arith.select" else 0]
            else:
                return name.removeprefix("%")
        raise ValueError(f"a pointer made of itself, {name}")

    def turns(self, arguments: dict[str, Any], grid: tuple[int, ...]) -> list[float | None]:
        """How often each loop turns when it is entered, the mean over all programs; None where that is not known."""
        return [self._turns(loop, arguments, grid) for loop in self.loops]

    def _turns(self, loop: SourceLoop, arguments: dict[str, Any], grid: tuple[int, ...]) -> float | None:
        if loop.bounds is None:
            return None
        values = [self._value(name, arguments, grid) for name in loop.bounds]
        start, stop, step = values
        if start is None or stop is None or step is None:
            return None
        return float(np.mean(np.maximum(-((start - stop) // step), 0)))

    def _value(self, name: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> Integers | None:
        """A scalar integer in every program, or None where it depends on more than arguments and program."""
        if name not in self._definitions:
            value = arguments.get(name.removeprefix("%"))
            return np.array(value, dtype=np.int64) if isinstance(value, int) else None
        operation, rest = self._definitions[name]
        if "tensor<" in rest:
            return None
        if operation == "arith.constant":
            constant = re.match(r"(-?\d+) : i\d+|true|false", rest)
            if constant is None:
                return None
            return np.array(int(constant[1]) if constant[1] else constant[0] == "true", dtype=np.int64)
        axis = "xyz".find(rest[:1]) if operation.startswith("tt.get_") else -1
        if operation == "tt.get_num_programs":
            return np.array([*grid, 1, 1][axis], dtype=np.int64)
        if operation == "tt.get_program_id":
            return np.indices(tuple(grid)).reshape(len(grid), -1)[axis] if axis < len(grid) else np.zeros(1, np.int64)
        operands = [self._value(one, arguments, grid) for one in re.findall(r"%[\w#]+", rest)]
        if not operands or any(one is None for one in operands):
            return None
        if operation == "arith.cmpi":
            operation += "." + rest.partition(",")[0]
        return _ARITHMETIC[operation](*operands) if operation in _ARITHMETIC else None


def _towards_zero(a: Integers, b: Integers) -> Integers:
    quotient: Integers = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)
    return quotient


_ARITHMETIC: dict[str, Callable[..., Integers]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": _towards_zero,
    "arith.divui": _towards_zero,
    "arith.remsi": lambda a, b: a - _towards_zero(a, b) * b,
    "arith.remui": lambda a, b: a - _towards_zero(a, b) * b,
    "arith.ceildivsi": lambda a, b: -((-a) // b),
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.extsi": lambda a: a,
    "arith.extui": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.index_cast": lambda a: a,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.andi": np.bitwise_and,
    "arith.select": lambda condition, a, b: np.where(condition != 0, a, b),
    "arith.cmpi.slt": np.less,
    "arith.cmpi.sle": np.less_equal,
    "arith.cmpi.sgt": np.greater,
    "arith.cmpi.sge": np.greater_equal,
    "arith.cmpi.eq": np.equal,
    "arith.cmpi.ne": np.not_equal,
}


class _Places:
    """The source lines behind `loc(...)`: of one file, through names and call sites."""

    def __init__(self, text: str, file: str) -> None:
        self._file = file
        self._named = dict(match.groups() for match in map(_LOCATION.match, text.splitlines()) if match)
        self._known: dict[str, tuple[int, ...]] = {}

    def lines(self, line: str) -> tuple[int, ...]:
        found = re.search(r"loc\((#loc\w*)\)$", line.rstrip(" {"))
        return self._of(found[1]) if found else ()

    def _of(self, name: str) -> tuple[int, ...]:
        if name not in self._known:
            body = self._named.get(name, "")
            places = re.findall(r'"([^"]+)":(\d+)', body)
            here = tuple(int(number) for path, number in places if basename(path) == self._file)
            for other in re.findall(r"#loc\w*", body):
                here += self._of(other)
            self._known[name] = here
        return self._known[name]
