"""Compiles the Triton kernels of the Bernoulli op for devices that need not be there, as compile_kernels.py does.

A script, to be run without TRITON_INTERPRET:

    python tests/compile_bernoulli.py compile     one JSON object a line, a job each
    python tests/compile_bernoulli.py keys        one JSON object: the specialisation keys of many launches
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import compile_kernels as base
import torch
import triton
from compile_kernels import DTYPES
from compile_kernels import TARGETS
from compile_kernels import Recorder
from machine.recording import launching_for

from autodropout.kernels import bernoulli_triton

MAPS, CHANNELS_LAST = (128, 160, 32, 32), torch.channels_last
# Name: shape, shared dimensions, memory format. The last is 2^32 + 2^22 elements, which are only compiled for.
CASES: dict[str, tuple[tuple[int, ...], list[int], torch.memory_format]] = {
    "dropout": (MAPS, [], torch.contiguous_format),
    "dropout channels_last": (MAPS, [], CHANNELS_LAST),
    "dropout channels_last 7x7": ((32, 2048, 7, 7), [], CHANNELS_LAST),
    "spatial": (MAPS, [2, 3], torch.contiguous_format),
    "spatial 8x8": ((128, 640, 8, 8), [2, 3], torch.contiguous_format),
    "spatial 7x7": ((32, 2048, 7, 7), [2, 3], torch.contiguous_format),
    "spatial channels_last": (MAPS, [2, 3], CHANNELS_LAST),
    "path": (MAPS, [1, 2, 3], torch.contiguous_format),
    "word": ((64, 150, 1024), [2], torch.contiguous_format),
    "variational": ((64, 150, 1024), [1], torch.contiguous_format),
    "huge": ((4100, 1024, 32, 32), [], torch.contiguous_format),
    "huge spatial": ((4100, 1024, 32, 32), [2, 3], torch.contiguous_format),
    "huge channels_last": ((4100, 1024, 32, 32), [], CHANNELS_LAST),
}
KERNELS = ("cells_kernel", "rows_kernel", "odd_rows_kernel", "strided_kernel", "count_kernel")
RECORDERS = {name: Recorder(getattr(bernoulli_triton, name)) for name in KERNELS}
for _name, _recorder in RECORDERS.items():
    setattr(bernoulli_triton, _name, _recorder)
base.RECORDERS.update(RECORDERS)

Launch = tuple[str, tuple[Any, ...], dict[str, Any]]  # kernel, arguments


def jobs() -> list[tuple[str, str, str]]:
    """Case, dtype, target: all in bf16, some in the other dtypes, on one GPU of each maker."""
    chosen = [(case, "bf16", target) for case in CASES for target in ("sm_90", "gfx942")]
    for case in ("dropout", "dropout channels_last", "spatial", "variational"):
        chosen += [(case, "fp32", target) for target in ("sm_90", "gfx942")]
    chosen += [(case, dtype, "sm_90") for case in ("dropout", "spatial") for dtype in ("fp16", "fp64")]
    return [*chosen, ("count", "fp32", "sm_90"), ("count", "fp32", "gfx942")]


def launch(case: str, dtype: str, tensors: str = "meta", threshold: int = 2**30, rank: int = 0) -> Launch:
    """The one launch that the op makes for this case, recorded."""
    seed = torch.zeros((), dtype=torch.int64, device=tensors)
    for recorder in RECORDERS.values():
        recorder.launches.clear()
    if case == "count":
        bernoulli_triton.scale_of_mask(seed, 128, 160 * 1024, 128 * 160 * 1024, threshold, rank)
    else:
        shape, shared, memory_format = CASES[case]
        # Tensors on `meta` have the null address, which is aligned as fresh device memory is.
        x = torch.empty(shape, dtype=DTYPES[dtype], device=tensors).to(memory_format=memory_format)
        bernoulli_triton.apply(x, shared, threshold, seed, seed.double(), rank)
    return recorded()


def recorded() -> Launch:
    (found,) = ((name, *one) for name, recorder in RECORDERS.items() for one in recorder.launches)
    return found


def compile_job(case: str, dtype: str, target: str) -> dict[str, Any]:
    with launching_for(target):
        kernel, args, kwargs = launch(case, dtype)
    source, options, _, bound = base.bind(kernel, args, kwargs, TARGETS[target])
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    tile = {
        "cells_kernel": lambda: bound["ROWS"] * bound["FRAGMENTS"] * 4 * bound["CALLS"],
        "rows_kernel": lambda: bound["ROWS"] * bound["INNER"],
        "odd_rows_kernel": lambda: bound["FRAGMENTS"] * bound["LANES"],
        "strided_kernel": lambda: bound["RUNS"] * 4 * bound["LENGTH"] * bound["CHANNELS"],
        "count_kernel": lambda: 4 * bound["BLOCK"],
    }[kernel]()
    described = (base.describe_hip if target.startswith("gfx") else base.describe_cuda)(compiled)
    threads = options.num_warps * TARGETS[target].warp_size
    return {
        "case": case,
        "kernel": kernel,
        "dtype": dtype,
        "target": target,
        "tile_bytes": tile * DTYPES[dtype].itemsize,
        "threads": threads,
        "per_element": described["instructions"] * threads / tile,
        "offsets": {pointer: of["offsets"] for pointer, of in base.of_activation(compiled.asm["ttir"]).items()}
        if case != "count"
        else {},
        "accesses": base.accesses_of_activation(compiled.asm["ttir"], dtype),
        "shared": compiled.metadata.shared,
        "loops": len(re.findall(r"scf\.(?:for|while)", compiled.asm["ttir"])),
        **described,
    }


def keys() -> dict[str, Any]:
    """By case the number of different keys of 50 launches, with another rate, seed and rank each; and a control."""
    found = {}
    small: dict[str, tuple[tuple[int, ...], list[int]]] = {
        "cells": ((4, 6, 12, 10), []),
        "rows": ((4, 6, 12, 10), [2, 3]),
        "columns": ((4, 60, 10), [1]),
        "odd rows": ((4, 6, 7, 7), [2, 3]),
    }
    seeds = torch.arange(50)
    for name, (shape, shared) in small.items():
        different: dict[str, set[str]] = {"sm_90": set(), "gfx942": set()}
        x = torch.ones(shape)
        for i in range(50):
            for recorder in RECORDERS.values():
                recorder.launches.clear()
            # Seeds are elements of a tensor, of which every other one is aligned to 16 bytes.
            threshold, rank = (2**32 - 1) * i // 49, 2**32 // 50 * i
            bernoulli_triton.apply(x, shared, threshold, seeds[i], torch.ones((), dtype=torch.float64), rank)
            kernel, args, kwargs = recorded()
            for target, seen in different.items():
                seen.add(base.bind(kernel, args, kwargs, TARGETS[target])[2])
        found |= {f"{name} {target}": len(seen) for target, seen in different.items()}
    kernels = [launch("dropout", dtype) for dtype in ("fp32", "bf16")]
    found["control"] = len({base.bind(kernel, *one, TARGETS["sm_90"])[2] for kernel, *one in kernels})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compile", "keys"])
    command = parser.parse_args().command
    missing = base.missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
    elif command == "keys":
        print(json.dumps(keys()))
    else:
        for job in jobs():
            print(json.dumps(compile_job(*job)), flush=True)


if __name__ == "__main__":
    main()
