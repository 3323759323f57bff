"""Compiles the Triton kernels of the tiled op for devices that need not be there, and prints what the code consists of.

A script, to be run without TRITON_INTERPRET (the test session sets it, and it decides when a kernel is decorated):

    python tests/compile_kernels.py compile PART PARTS     one JSON object a line, every PARTS-th job from PART on
    python tests/compile_kernels.py keys                   one JSON object: the specialisation keys of many launches

What is compiled is what would be launched: the launchers run on tensors without storage, a recorder stands in for each
kernel, and Triton's own binder turns the recorded arguments into signature, constants and attributes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import make_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from machine.recording import launching_for

from autodropout.kernels import tiled_triton
from autodropout.kernels.atlas import Atlas

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
SHAPES = {
    "128x160x32x32": (128, 160, 32, 32),
    "128x640x8x8": (128, 640, 8, 8),
    "32x256x56x56": (32, 256, 56, 56),
    "32x1024x14x14": (32, 1024, 14, 14),
    "32x2048x7x7": (32, 2048, 7, 7),
    # The other maps for which the instructions are limited.
    "128x320x16x16": (128, 320, 16, 16),
    "32x512x28x28": (32, 512, 28, 28),
    "4x16x224x224": (4, 16, 224, 224),
    # Channels by 8 but not by 16, where Triton knows nothing of an argument by itself.
    "32x24x56x56": (32, 24, 56, 56),
    # 2^32 + 2^22 elements, which are only compiled for.
    "4100x1024x32x32": (4100, 1024, 32, 32),
}
HUGE = "4100x1024x32x32"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KERNELS = ("draw_kernel", "apply_kernel", "apply_channels_last_kernel")

Job = tuple[str, str, str, str]  # kernel, shape, dtype, target


def jobs() -> list[Job]:
    """Every shape in fp32 and bf16 on every target; the other dtypes and the huge shape where they can differ."""
    limited = ("128x320x16x16", "32x512x28x28")
    first, *others = [name for name in SHAPES if name not in (HUGE, "32x24x56x56", *limited)]
    two, both = ("fp32", "bf16"), ("sm_90", "gfx942")
    chosen = [
        ("apply_kernel", shape, dtype, target) for shape in (first, *others) for dtype in two for target in TARGETS
    ]
    kernel = "apply_channels_last_kernel"
    chosen += [(kernel, first, dtype, target) for dtype in two for target in TARGETS]
    chosen += [(kernel, shape, dtype, "sm_90") for shape in (*others, *limited, "32x24x56x56") for dtype in two]
    chosen += [("apply_kernel", shape, dtype, "sm_90") for shape in limited for dtype in two]
    chosen += [(kernel, shape, "bf16", "gfx942") for shape in others]
    for kernel in KERNELS[1:]:
        chosen += [(kernel, first, dtype, target) for dtype in ("fp16", "fp64") for target in both]
        chosen += [(kernel, HUGE, "bf16", target) for target in both]
    chosen += [("draw_kernel", first, "fp32", target) for target in TARGETS]
    return chosen


# ---- recording launches ---------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` notes the arguments and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.grids.append(grid)
            self.launches.append((args, kwargs))

        return launch


RECORDERS = {name: Recorder(getattr(tiled_triton, name)) for name in KERNELS}
for _name, _recorder in RECORDERS.items():
    setattr(tiled_triton, _name, _recorder)


def pattern(height: int, width: int) -> Atlas:
    return Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, height, width)


def launch(kernel: str, shape: str, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which the launchers would start this kernel on an activation of this shape and dtype."""
    n, c, height, width = SHAPES[shape]
    atlas = pattern(height, width)
    recorder = RECORDERS[kernel]
    recorder.launches.clear()
    if kernel == "draw_kernel":
        tiled_triton.draw(torch.empty((), dtype=torch.int64, device="meta"), n, c, atlas, False, "mask", 0)
    else:
        memory_format = FORMATS["contiguous" if kernel == "apply_kernel" else "channels_last"]
        # Tensors on `meta` have the null address, which is aligned as fresh device memory is.
        x = torch.empty(SHAPES[shape], dtype=DTYPES[dtype], device="meta", memory_format=memory_format)
        starts = torch.empty((n, c), dtype=torch.int32, device="meta")
        scale = torch.empty((), dtype=torch.float64, device="meta")
        tiled_triton.apply(x, atlas, starts, scale)
    (recorded,) = recorder.launches
    return recorded


def bind(kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Any, Any, Any, Any]:
    """What Triton's runtime would compile for these arguments and look up: source, options, and the key."""
    from triton.runtime.jit import create_function_from_signature

    function = RECORDERS[kernel].kernel
    backend = make_backend(target)
    binder = create_function_from_signature(function.signature, function.params, backend)
    # As JITFunction.run does before it binds.
    bound, specialization, options = binder(*args, **{**kwargs, "debug": False})
    key = f"{specialization} {options}"
    options, signature, constants, attributes = function._pack_args(
        backend, {**kwargs, "debug": False}, bound, specialization, options
    )
    return ASTSource(function, signature, constants, attributes), options, key, bound


def missing_internals() -> str | None:
    """Why this Triton cannot be asked what it would compile; None if it can."""
    import inspect

    from triton.runtime import jit

    binder = getattr(jit, "create_function_from_signature", None)
    if binder is None or list(inspect.signature(binder).parameters) != ["sig", "kparams", "backend"]:
        return f"Triton {triton.__version__} has no jit.create_function_from_signature(sig, kparams, backend)"
    if not hasattr(jit.JITFunction, "_pack_args"):
        return f"Triton {triton.__version__} has no JITFunction._pack_args"
    return None


# ---- reading machine code -------------------------------------------------------------------------------------------

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def describe_cuda(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    resources = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, flags=re.MULTILINE)
    instructions = [instruction for instruction in instructions if instruction != "NOP"]
    accesses = Counter(i for i in instructions if re.match(r"(LDG|STG|LDL|STL|ATOM|RED)\b", i))
    return {
        "loads": widths(accesses, "LDG", {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}, 4),
        "stores": widths(accesses, "STG", {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}, 4),
        "registers": resources["reg"],
        "spilled": sum(count for i, count in accesses.items() if i.startswith(("LDL", "STL"))),
        "scratch": resources["stack"] + resources["local"],
        "instructions": len(instructions),
        "bf16_conversions": sorted(set(re.findall(r"cvt\.[\w.]*bf16\w*\.f32", compiled.asm["ptx"]))),
        "raw": dict(accesses),
    }


def describe_hip(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    instructions = re.findall(
        r"^\s+([svb]\w*_\w+|global_\w+|buffer_\w+|ds_\w+|flat_\w+|scratch_\w+)", code, re.MULTILINE
    )
    accesses = Counter(i for i in instructions if re.match(r"(global|buffer|flat|scratch)_(load|store|atomic)", i))
    bytes_of = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "ubyte": 1, "byte": 1}

    def of(kind: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for instruction, count in accesses.items():
            if f"_{kind}_" in instruction and not instruction.startswith("scratch"):
                word = instruction.split(f"_{kind}_")[1].removesuffix("_d16_hi").removesuffix("_d16")
                found[str(bytes_of[word])] += count
        return dict(found)

    metadata = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", code, re.MULTILINE)}
    return {
        "loads": of("load"),
        "stores": of("store"),
        "registers": metadata["vgpr_count"],
        "spilled": metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        "scratch": metadata["private_segment_fixed_size"]
        + sum(n for i, n in accesses.items() if i.startswith("scratch")),
        "instructions": len(instructions),
        "bf16_conversions": [],
        "raw": dict(accesses),
    }


def widths(accesses: Counter[str], kind: str, suffixes: dict[str, int], default: int) -> dict[str, int]:
    """Bytes of an access (as text, for JSON) -> how many instructions of that width."""
    found: Counter[str] = Counter()
    for instruction, count in accesses.items():
        if instruction.startswith(kind):
            width = next((size for suffix, size in suffixes.items() if suffix in instruction), default)
            found[str(width)] += count
    return dict(found)


def offsets_by_pointer(ttir: str, pointers: tuple[str, ...]) -> dict[str, list[str]]:
    """The integer types of the offsets that are added to these pointers, by pointer.

    Looks for `%p = tt.addptr %base, %offset : tensor<...x!tt.ptr<...>>, tensor<...xi64>`, `%base` made of an argument.
    """
    sources = dict(re.findall(r"(%[\w#]+) = tt\.(?:splat|broadcast|expand_dims) (%[\w#]+)", ttir))
    types: dict[str, list[str]] = {pointer: [] for pointer in pointers}
    for base, offset in re.findall(r"tt\.addptr (%[\w#]+), .*x(i\d+)(?:, #\w+)?>", ttir):
        while base in sources:
            base = sources[base]
        if base.removeprefix("%") in types:
            types[base.removeprefix("%")].append(offset)
    return types


def accesses_of_activation(ttir: str, dtype: str) -> dict[str, int]:
    """How many loads and stores of elements of this type there are, but for single numbers (the scale)."""
    element = {"fp64": "f64", "fp32": "f32", "fp16": "f16", "bf16": "bf16"}[dtype]
    return {
        kind: len(re.findall(rf"tt\.{kind} .*: tensor<[\dx]+x!tt\.ptr<{element}>", ttir)) for kind in ("load", "store")
    }


def of_activation(ttir: str) -> dict[str, dict[str, Any]]:
    """By pointer to the activation: the integer types that are added to it, in this order, and what is accessed by it.

    `elements` are those of all loads and stores of a program together, counted in the pointer's own type: two by two
    as int32 they count twice.
    """
    element = re.search(r"%x_ptr: !tt\.ptr<(\w+)>", ttir)
    assert element is not None
    bits = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i32": 32}
    roots = {"x_ptr": "x_ptr", "y_ptr": "y_ptr"}
    found: dict[str, dict[str, Any]] = {name: {"offsets": [], "elements": {"load": 0, "store": 0}} for name in roots}
    names = "splat|broadcast|expand_dims|addptr|bitcast|load|store"
    steps = re.compile(rf"^\s*(?:%([\w#]+) = )?(tt\.(?:{names})) %([\w#]+)(.*)$", re.MULTILINE)
    for result, step, base, rest in steps.findall(ttir):
        if base not in roots:
            continue
        root = roots[base]
        if step in ("tt.load", "tt.store"):
            shape, accessed = re.findall(r"tensor<([\dx]+)x!tt\.ptr<(\w+)>", rest)[0]
            size = math.prod(int(side) for side in shape.split("x"))
            found[root]["elements"][step[3:]] += size * bits[accessed] // bits[element[1]]
            continue
        roots[result] = root
        if step == "tt.addptr":
            found[root]["offsets"].append(re.findall(r", (?:tensor<[\dx]+x)?(i\d+)>?(?: loc.*)?$", rest)[0])
    return found


def compile_job(job: Job) -> dict[str, Any]:
    kernel, shape, dtype, target = job
    with launching_for(target):
        args, kwargs = launch(kernel, shape, dtype)
    source, options, _, bound = bind(kernel, args, kwargs, TARGETS[target])
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    c = SHAPES[shape][1]
    size = DTYPES[dtype].itemsize
    if kernel == "draw_kernel":
        tile = 0
    elif kernel == "apply_kernel":
        tile = bound["TILE"]
    else:
        tile = bound["VECTORS"] * 8 * bound["LANES"]
    threads = options.num_warps * TARGETS[target].warp_size
    return {
        "kernel": kernel,
        "shape": shape,
        "dtype": dtype,
        "target": target,
        # Bytes that follow each other in memory: all of them, or the channels of one cell.
        "run": (c if kernel == "apply_channels_last_kernel" else math.prod(SHAPES[shape])) * size,
        "tile": tile,
        "tile_bytes": tile * size,
        "threads": threads,
        "planes": 0 if tile else bound["BLOCK"],
        "programs": math.prod(RECORDERS[kernel].grids[-1]),
        "activation": of_activation(compiled.asm["ttir"]) if tile else {},
        "starts": [] if tile else re.findall(r"tt\.addptr %starts_ptr, .*, (i\d+)", compiled.asm["ttir"]),
        **(describe_hip if target.startswith("gfx") else describe_cuda)(compiled),
    }


# ---- keys -----------------------------------------------------------------------------------------------------------


def keys() -> dict[str, Any]:
    """By kernel and map the number of different keys of 50 launches, with another pattern, seed and rank each.

    Here the tensors are real: their addresses are part of the keys. Two more rows per kernel show what keys depend on:
    "maps", two that hold a multiple of 8 cells, and "control", other dtypes and a map that does not.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for (n, c, height, width), dtype in (((4, 6, 12, 10), torch.float32), ((1, 3, 130, 90), torch.bfloat16)):
        name = f"{n}x{c}x{height}x{width}"
        launches: dict[str, list[Any]] = {kernel: [] for kernel in KERNELS}
        seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
        for i in range(50):
            size, stride, shear = torch.rand(3, generator=generator).mul(0.5).tolist()
            atlas = Atlas.of(size, stride + 0.01, i % 5, 7.0 * i, shear, -shear, height, width)
            for recorder in RECORDERS.values():
                recorder.launches.clear()
            # Seeds are elements of a tensor, of which every other one is aligned to 16 bytes.
            starts, scale = tiled_triton.draw(seeds[i], n, c, atlas, False, "mask", 2**32 // 50 * i)
            starts.zero_()
            scale.fill_(i / 10)
            x = torch.randn(n, c, height, width, generator=generator).to(dtype)
            tiled_triton.apply(x, atlas, starts, scale)
            tiled_triton.apply(x.to(memory_format=torch.channels_last), atlas, starts, scale)
            for kernel, recorder in RECORDERS.items():
                launches[kernel] += recorder.launches
        for target in ("sm_90", "gfx942"):
            for kernel, recorded in launches.items():
                different = {bind(kernel, *one, TARGETS[target])[2] for one in recorded}
                found[f"{kernel} {name} {target}"] = {"launches": len(recorded), "keys": len(different)}
    others = {
        "maps": [("128x160x32x32", "fp32"), ("32x256x56x56", "fp32")],
        "control": [("128x160x32x32", "fp32"), ("128x160x32x32", "bf16"), ("32x2048x7x7", "fp32")],
    }
    for kernel in KERNELS[1:]:
        for name, chosen in others.items():
            different = {bind(kernel, *launch(kernel, *one), TARGETS["sm_90"])[2] for one in chosen}
            found[f"{kernel} {name}"] = {"launches": len(chosen), "keys": len(different)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("part", type=int)
    compiling.add_argument("parts", type=int)
    commands.add_parser("keys")
    arguments = parser.parse_args()
    missing = missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
    elif arguments.command == "keys":
        print(json.dumps(keys()))
    else:
        for job in jobs()[arguments.part :: arguments.parts]:
            print(json.dumps(compile_job(job)), flush=True)


if __name__ == "__main__":
    main()
