"""Reads AMD machine code as LLVM's assembler text, which Triton keeps as `amdgcn`.

An instruction whose name begins with `v_` runs in the vector units, one with `s_` in the scalar unit, once a wave.
"""

from __future__ import annotations

import re
from os.path import basename

from .control_flow import Instruction
from .control_flow import Listing

_INSTRUCTION = re.compile(r"^\s+((?:[sv]|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_LABEL = re.compile(r"^([.$\w]+):")
_LOCATION = re.compile(r"([^\s:@\[\]]+):(\d+):\d+")
_ACCESS = re.compile(r"^(global|buffer|flat|scratch|ds)_(load|store|atomic|read|write)_?(\w*)$")
_WIDTHS = (("x4", 16), ("b128", 16), ("x3", 12), ("b96", 12), ("x2", 8), ("b64", 8), ("short", 2), ("b16", 2))
_WIDTHS += (("u16", 2), ("i16", 2), ("byte", 1), ("b8", 1), ("u8", 1), ("i8", 1))


def read(text: str, file: str) -> Listing:
    """The first function of an assembler file; `file` is the name of its source (`compile_launch`)."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: tuple[int, ...] = ()
    for line in text.splitlines():
        if line.lstrip().startswith((".end_amdgpu", ".section")) and instructions:
            break
        if line.lstrip().startswith(".loc"):
            comment = line.partition(";")[2]
            lines = tuple(int(number) for name, number in _LOCATION.findall(comment) if basename(name) == file)
            continue
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match is None or match[1] == "s_nop":
            continue
        opcode, operands = match[1], match[2].strip()
        flow = _flow(opcode)
        instructions.append(Instruction(opcode, lines, flow, operands if flow in ("branch", "jump") else ""))
    return Listing(instructions, labels)


def _flow(opcode: str) -> str:
    if opcode.startswith("s_cbranch"):
        return "branch"
    if opcode == "s_branch":
        return "jump"
    if opcode.startswith(("s_setpc", "s_swappc")):
        raise ValueError(f"{opcode}: where it goes cannot be read from the code")
    return "end" if opcode == "s_endpgm" else "next"


def access(opcode: str) -> tuple[str, int] | None:
    """Kind of memory access ("load", "store", "atomic": global; "shared", "spill") and bytes per lane, or None."""
    match = _ACCESS.match(opcode)
    if match is None:
        return None
    space, kind, rest = match.groups()
    width = next((width for suffix, width in _WIDTHS if suffix in rest), 4)
    if space == "ds":
        return "shared", width
    return "spill" if space == "scratch" else kind, width


def pipe(opcode: str) -> str:
    """ "vector" for what the vector units run, "scalar", "lsu" for memory."""
    if access(opcode) is not None or opcode.startswith("s_load"):
        return "lsu"
    return "vector" if opcode.startswith("v_") else "scalar"
