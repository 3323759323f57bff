"""Compiles a recorded launch for a target that need not be there, and reads what came out.

What is compiled is what Triton would compile for these arguments: its own binder makes signature, constants and
attributes of them. Readings are kept as JSON in `.benchmarks/machine_code/`, by everything that determines them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from os.path import basename
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import make_backend

from . import amd_isa
from . import sass
from .control_flow import Loop
from .control_flow import Segment
from .control_flow import segments
from .recording import Launch

# Triton 3.9 says in every process that a later one will fuse products and sums only on request.
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
CACHE = Path(__file__).parent.parent.parent / ".benchmarks" / "machine_code"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        target: a name of `TARGETS`.
        warp_size: lanes of a warp (NVIDIA) or wave (AMD).
        threads: of a program.
        registers: 32-bit vector registers of a thread, AMD's accumulation registers included.
        spills: instructions that store or load registers, on AMD registers that were spilled.
        scratch: bytes of private memory of a thread, stack included.
        shared: bytes of shared memory (LDS) of a program.
        segments, loops: the instructions by loop; `control_flow` defines both.
        ttir: the program before layouts were chosen, with the source line of everything.
    """

    target: str
    warp_size: int
    threads: int
    registers: int
    spills: int
    scratch: int
    shared: int
    segments: list[Segment]
    loops: list[Loop]
    ttir: str

    @property
    def instructions(self) -> int:
        """Instructions in the code, each counted once."""
        return sum(sum(segment.opcodes.values()) for segment in self.segments)

    def access(self, opcode: str) -> tuple[str, int] | None:
        return _reader(self.target).access(opcode)

    def pipe(self, opcode: str) -> str:
        return _reader(self.target).pipe(opcode)

    def by_width(self, kind: str) -> Counter[int]:
        """Bytes of a global access ("load", "store" or "atomic") -> instructions of that width in the code."""
        found: Counter[int] = Counter()
        for segment in self.segments:
            for opcode, count in segment.opcodes.items():
                access = self.access(opcode)
                if access is not None and access[0] == kind:
                    found[access[1]] += count
        return found


def _reader(target: str) -> Any:
    return amd_isa if target.startswith("gfx") else sass


def bind(launch: Launch, target: str) -> tuple[ASTSource, Any, dict[str, Any], str]:
    """What Triton's runtime would compile for a launch: source, options, arguments by name, and the look-up key."""
    from triton.runtime.jit import create_function_from_signature

    function = launch.kernel
    backend = make_backend(TARGETS[target])
    binder = create_function_from_signature(function.signature, function.params, backend)
    # As JITFunction.run does before it binds.
    kwargs = {**launch.kwargs, "debug": False}
    bound, specialization, options = binder(*launch.args, **kwargs)
    key = f"{specialization} {options}"
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(function, signature, constants, attributes), options, dict(bound), key


def compile_launch(launch: Launch, target: str) -> MachineCode:
    """The machine code of a launch; from the cache where the same was read before.

    Raises:
        ValueError: the code has loops or jumps that cannot be counted.
        Exception: whatever Triton raises for a target that it does not know.
    """
    source, options, _, _ = bind(launch, target)
    path = CACHE / f"{_key(source, options, target)}.json"
    if path.exists():
        return _load(path)
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    # Without its folder: Triton's own cache may give what it compiled from a copy of the source that lay elsewhere.
    file = basename(launch.kernel.fn.__code__.co_filename)
    code = (_read_hip if target.startswith("gfx") else _read_cuda)(compiled, target, file)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(code, default=vars))
    partial.replace(path)
    return code


def _key(source: ASTSource, options: Any, target: str) -> str:
    readers = "".join(
        (Path(__file__).parent / name).read_text()
        for name in ("amd_isa.py", "compiling.py", "control_flow.py", "sass.py")
    )
    text = "\n".join([source.hash(), str(options), target, triton.__version__, readers])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _load(path: Path) -> MachineCode:
    fields = json.loads(path.read_text())
    fields["segments"] = [Segment(one["loop"], Counter(one["opcodes"])) for one in fields["segments"]]
    fields["loops"] = [
        Loop(one["parent"], Counter({int(line): count for line, count in one["lines"].items()}))
        for one in fields["loops"]
    ]
    return MachineCode(**fields)


def _read_cuda(compiled: Any, target: str, file: str) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        # Without its data flow analysis nvdisasm prints the same in two thirds of the time.
        listing = sass.read(_run("nvdisasm", "-c", "-gi", "-ndf", cubin.name), file)
    found, loops = segments(listing)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = sum(1 for one in listing.instructions if (sass.access(one.opcode) or ("",))[0] == "spill")
    return MachineCode(
        target=target,
        warp_size=32,
        threads=compiled.metadata.num_warps * 32,
        registers=resources["REG"],
        spills=spills,
        scratch=resources["STACK"] + resources["LOCAL"],
        shared=compiled.metadata.shared,
        segments=found,
        loops=loops,
        ttir=compiled.asm["ttir"],
    )


def _read_hip(compiled: Any, target: str, file: str) -> MachineCode:
    text = compiled.asm["amdgcn"]
    found, loops = segments(amd_isa.read(text, file))
    metadata = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    return MachineCode(
        target=target,
        warp_size=64,
        threads=compiled.metadata.num_warps * 64,
        registers=metadata["vgpr_count"],
        spills=metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        scratch=metadata["private_segment_fixed_size"],
        shared=compiled.metadata.shared,
        segments=found,
        loops=loops,
        ttir=compiled.asm["ttir"],
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
