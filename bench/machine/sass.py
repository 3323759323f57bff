"""Reads NVIDIA machine code (SASS) as `nvdisasm -c -gi` prints it.

Which pipe runs an instruction, and how many lanes a pipe has, follows the description of pipelines in NVIDIA's Nsight
Compute documentation (ALU: bit manipulation, logic, integers but for multiplication; FMA: FP32 arithmetic and integer
multiplication; XU: conversions and transcendentals; LSU: memory; uniform: one result a warp).
"""

from __future__ import annotations

import re
from dataclasses import replace
from os.path import basename

from .control_flow import Instruction
from .control_flow import Listing

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_LOCATION = re.compile(r'"([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\(([^)]+)\)")
_WIDTHS = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_KINDS = {"LDG": "load", "LDGSTS": "load", "STG": "store", "RED": "atomic", "REDG": "atomic"}
_KINDS |= {"ATOM": "atomic", "ATOMG": "atomic", "LDL": "spill", "STL": "spill", "LDS": "shared", "STS": "shared"}

_FMA = ("FFMA", "FMUL", "FADD", "HADD", "HMUL", "HFMA")
_MULTIPLY = ("IMAD", "IMUL", "IDP", "XMAD")
_XU = ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV")
_FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_NO_PIPE = ("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "BAR", "MEMBAR", "DEPBAR", "ERRBAR", "CCTL")
_NO_PIPE += ("S2R", "S2UR", "CS2R", "LDC", "ULDC", "LDCU", "R2UR", "NANOSLEEP", "YIELD", "ACQBULK", "PREEXIT", "BREAK")
_MEMORY = ("LD", "ST", "ATOM", "RED", "SHFL")


def read(text: str, file: str) -> Listing:
    """The kernel of a cubin; `file` is the name of its source, whose folder may be another (`compile_launch`)."""
    instructions: list[Instruction] = []
    guards: list[bool] = []
    labels: dict[str, int] = {}
    lines: tuple[int, ...] = ()
    fresh = True  # whether the next location starts a new chain of inlined calls, or continues one
    for line in text.splitlines():
        if line.lstrip().startswith("//## File"):
            here = tuple(int(number) for name, number in _LOCATION.findall(line) if basename(name) == file)
            lines = here if fresh else lines + here
            fresh = False
            continue
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        fresh = True
        guard, opcode, operands = match[1], match[2], match[3]
        if opcode == "NOP":
            continue
        target = _TARGET.search(operands)
        flow = _flow(opcode, guard is not None, operands)
        label_of = target[1] if target and flow in ("branch", "jump", "call") else ""
        instructions.append(Instruction(opcode, lines, flow, label_of))
        guards.append(guard is not None)
    for place, one in enumerate(instructions):
        # ptxas writes some jumps as calls: of code that leaves the kernel and never returns.
        if one.flow == "call" and one.label in labels and not _returns(instructions, labels, labels[one.label]):
            instructions[place] = replace(one, flow="branch" if guards[place] else "jump")
    return Listing(instructions, labels)


def _returns(instructions: list[Instruction], labels: dict[str, int], entry: int) -> bool:
    """Whether what is called here can come to a return."""
    waiting, seen = [entry], {len(instructions)}
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        one = instructions[place]
        if one.opcode.startswith("RET"):
            return True
        if one.flow in ("branch", "jump"):
            waiting.append(labels.get(one.label, len(instructions)))
        if one.flow not in ("jump", "end"):
            waiting.append(place + 1)
    return False


def _flow(opcode: str, guarded: bool, operands: str) -> str:
    name = opcode.partition(".")[0]
    if name in ("BRA", "UBRA", "JMP"):
        # A branch can be conditional by a guard, or by a predicate among its operands.
        return "branch" if guarded or not operands.lstrip().startswith("`") else "jump"
    if name in ("EXIT", "RET", "KILL"):
        return "may end" if guarded else "end"
    if name in ("BRX", "JMX", "BRXU"):
        return "jump"
    return "call" if name in ("CALL", "UCALL") else "next"


def access(opcode: str) -> tuple[str, int] | None:
    """Kind of memory access ("load", "store", "atomic": global; "shared", "spill") and bytes per lane, or None."""
    kind = _KINDS.get(opcode.partition(".")[0])
    if kind is None:
        return None
    return kind, next((width for suffix, width in _WIDTHS.items() if suffix in opcode), 4)


def pipe(opcode: str) -> str:
    """The pipe whose lanes an instruction takes: "alu", "multiply", "fma", "xu", "fp64", "lsu", "uniform", "none"."""
    name = opcode.partition(".")[0]
    if name in _NO_PIPE:
        return "none"
    if name.startswith(_MEMORY):
        return "lsu"
    if name.startswith("U") and not name.startswith("UNPACK"):
        return "uniform"
    if name.startswith(_MULTIPLY):
        return "multiply"
    if name.startswith(_FP64):
        return "fp64"
    if name.startswith(_FMA):
        return "fma"
    # F2FP packs two bf16 or fp16 in the ALU, unlike F2F.
    return "xu" if name.startswith(_XU) and not name.startswith("F2FP") else "alu"
