"""Machine code as a graph: which instructions run how often, as far as the code alone tells.

A listing becomes segments, the instructions that share a nest of loops. The instructions of a segment run as often as
its loops turn; both sides of every branch are taken to run, and a call runs the whole of what it calls. So what follows
from segments is an upper bound on what one thread executes, exact for code without branches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from dataclasses import field


@dataclass(frozen=True)
class Instruction:
    """One instruction: what it is, where it comes from, and where control goes after it.

    Attributes:
        opcode: with its modifiers, as the disassembler prints it.
        lines: of the kernel's own source file, the lines it was compiled from, its callers' included.
        flow: "next"; "branch" goes to `label` or on; "jump" goes to `label`; "call" runs what is at `label`, then goes
            on; "end" leaves the function; "may end" leaves it or goes on.
        label: where a branch, a jump or a call goes.
    """

    opcode: str
    lines: tuple[int, ...] = ()
    flow: str = "next"
    label: str = ""


@dataclass(frozen=True)
class Listing:
    """The code of one kernel in order; `labels` are the places of instructions by name. It starts at the first."""

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass
class Loop:
    """A loop of the machine code: the loop around it, -1 for none, and the source lines of its instructions."""

    parent: int
    lines: Counter[int] = field(default_factory=Counter)


@dataclass
class Segment:
    """Instructions that turn with the same innermost loop, -1 for none: how many of each opcode."""

    loop: int
    opcodes: Counter[str] = field(default_factory=Counter)


def segments(listing: Listing) -> tuple[list[Segment], list[Loop]]:
    """The segments and loops of a kernel.

    Raises:
        ValueError: a loop has two entries, an indirect jump, or a recursive call; none of them can be counted.
    """
    loops: list[Loop] = []
    found: dict[int, Segment] = {}
    _walk(listing, 0, -1, (), found, loops)
    return [found[loop] for loop in sorted(found)], loops


def _walk(
    listing: Listing, entry: int, around: int, calls: tuple[int, ...], found: dict[int, Segment], loops: list[Loop]
) -> None:
    """Adds the function at `entry`, called from inside loop `around`, and what it calls."""
    if entry in calls:
        raise ValueError(f"the function at instruction {entry} calls itself")
    successors = _blocks(listing, entry)
    nest = _loops(entry, successors)
    first = len(loops)
    places = {header: first + place for place, header in enumerate(nest)}
    for header, blocks in nest.items():
        outer = [other for other, inside in nest.items() if other != header and header in inside]
        innermost = min(outer, key=lambda other: len(nest[other]), default=None)
        loops.append(Loop(around if innermost is None else places[innermost]))
        for block in blocks:
            for instruction in listing.instructions[block : _end(block, successors, listing)]:
                loops[-1].lines.update(instruction.lines)
    for block in successors:
        inside = [header for header, blocks in nest.items() if block in blocks]
        loop = places[min(inside, key=lambda header: len(nest[header]))] if inside else around
        segment = found.setdefault(loop, Segment(loop))
        for instruction in listing.instructions[block : _end(block, successors, listing)]:
            segment.opcodes[instruction.opcode] += 1
            if instruction.flow == "call":
                _walk(listing, _place(listing, instruction), loop, (*calls, entry), found, loops)


def _place(listing: Listing, instruction: Instruction) -> int:
    if instruction.label not in listing.labels:
        raise ValueError(f"{instruction.opcode} goes to {instruction.label!r}, which is no label")
    return listing.labels[instruction.label]


def _blocks(listing: Listing, entry: int) -> dict[int, list[int]]:
    """The basic blocks that can be reached from `entry`, by their first instruction, with those that may follow."""
    leaders = set(listing.labels.values()) | {entry}
    leaders |= {i + 1 for i, one in enumerate(listing.instructions) if one.flow not in ("next", "call")}
    successors: dict[int, list[int]] = {}
    waiting = [entry]
    while waiting:
        block = waiting.pop()
        if block in successors:
            continue
        last = block
        while last + 1 not in leaders and last + 1 < len(listing.instructions):
            last += 1
        instruction = listing.instructions[last]
        after: list[int] = []
        if instruction.flow in ("branch", "jump"):
            after.append(_place(listing, instruction))
        if instruction.flow not in ("jump", "end") and last + 1 < len(listing.instructions):
            after.append(last + 1)
        successors[block] = after
        waiting += after
    return successors


def _end(block: int, successors: dict[int, list[int]], listing: Listing) -> int:
    """The place behind the last instruction of a block."""
    last = block
    while listing.instructions[last].flow in ("next", "call"):
        if last + 1 in successors or last + 1 == len(listing.instructions):
            break
        last += 1
    return last + 1


def _loops(entry: int, successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """The blocks of every natural loop by its header, headers in order of the code."""
    order = _reverse_postorder(entry, successors)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            before[after].append(block)
    dominators = {block: set(order) for block in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(dominators[one] for one in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    rank = {block: place for place, block in enumerate(order)}
    nest: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if rank[header] > rank[block]:
                continue
            if header not in dominators[block]:
                raise ValueError(f"the loop at instruction {header} has a second entry")
            inside = nest.setdefault(header, {header})
            waiting = [block]
            while waiting:
                one = waiting.pop()
                if one not in inside:
                    inside.add(one)
                    waiting += before[one]
    return dict(sorted(nest.items()))


def _reverse_postorder(entry: int, successors: dict[int, list[int]]) -> list[int]:
    done: list[int] = []
    seen = {entry}
    stack = [(entry, iter(successors[entry]))]
    while stack:
        block, rest = stack[-1]
        after = next((one for one in rest if one not in seen), None)
        if after is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(successors[after])))
    return done[::-1]
