"""Compiles the Triton kernels of the fused neighbours for devices that need not be there: one JSON object a line.

A script, to be run without TRITON_INTERPRET:

    python tests/compile_fused.py compile     what the kernels of each job consist of
    python tests/compile_fused.py keys        how many specialisation keys 50 launches of each kernel have
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from machine.compiling import bind
from machine.compiling import compile_launch
from machine.recording import Launch
from machine.recording import meta
from machine.recording import missing_internals
from machine.recording import recorded

from autodropout.kernels import batch_norm_triton
from autodropout.kernels import residual_triton
from autodropout.kernels import softmax_triton
from autodropout.kernels.atlas import Atlas

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The last two have more than 2^32 elements; they are only compiled for.
SHAPES = [(128, 160, 32, 32), (32, 256, 56, 56), (4, 16, 224, 224), (4100, 1024, 32, 32), (42900, 2048, 7, 7)]

# Samples, heads, queries, keys; the last has 2^31 + 2^23 weights.
ATTENTION = [(16, 16, 384, 768), (257, 16, 512, 1024)]

Job = tuple[tuple[int, int, int, int], bool, str, str]  # shape, channels_last, dtype, target
# shape, share_t, share_c, dtype, target
AttentionJob = tuple[tuple[int, int, int, int], bool, bool, str, str]


def jobs() -> list[Job]:
    first, large, rows, huge, odd = SHAPES
    return [
        (first, False, "bf16", "sm_90"),
        (first, True, "bf16", "sm_90"),
        (first, False, "fp64", "sm_90"),
        (large, False, "fp32", "sm_90"),
        (rows, False, "bf16", "sm_90"),
        (huge, False, "bf16", "sm_90"),
        (odd, False, "bf16", "sm_90"),
        (odd, False, "fp64", "sm_90"),
        (odd, False, "fp32", "gfx942"),
        (first, False, "fp32", "gfx942"),
        (first, True, "bf16", "gfx942"),
    ]


def attention_jobs() -> list[AttentionJob]:
    first, huge = ATTENTION
    return [
        (first, False, False, "bf16", "sm_90"),
        (first, False, False, "fp32", "gfx942"),
        (first, True, False, "bf16", "sm_90"),
        (first, False, True, "bf16", "sm_90"),
        (first, False, False, "fp64", "sm_90"),
        (huge, False, False, "bf16", "sm_90"),
        (huge, False, False, "bf16", "gfx942"),
    ]


def attention_launches(shape: tuple[int, ...], share_t: bool, share_c: bool, dtype: str, seed: int = 0) -> list[Launch]:
    """What softmax with a token pattern launches forward and backward, but for the small kernels of the pattern."""
    scores = meta(*shape, dtype=DTYPES[dtype])
    fields = torch.tensor([1 + seed % 7, seed % 5, (1 + seed) / 52], dtype=torch.float64)
    # A seed may be a view into a larger tensor; the scale is always one that the op has just made.
    key, scale = meta(2, dtype=torch.int64)[seed % 2], meta(dtype=torch.float64)
    rows = [meta(*shape[:3], dtype=torch.float64 if dtype == "fp64" else torch.float32) for _ in range(2)]
    with recorded() as found:
        softmax_triton.forward(scores, fields, key, scale, share_t, share_c, seed)
        softmax_triton.backward(scores, scores, *rows, fields, key, scale, share_t, share_c, seed)
    return [launch for launch in found if launch.name.startswith("softmax")]


def launches(shape: tuple[int, ...], last: bool, dtype: str, atlas: Atlas, seed: int = 0) -> list[Launch]:
    """All that forward and backward of all ops launch."""
    n, c = shape[:2]
    x = meta(*shape, dtype=DTYPES[dtype], channels_last=last)
    compute = torch.float64 if dtype == "fp64" else torch.float32
    weight, factor = meta(c, dtype=compute), meta(n, dtype=compute)
    # Views into a larger tensor are aligned like numbers of their type only.
    starts, scale = meta(n, c, dtype=torch.int32), meta(2, dtype=torch.float64)[seed % 2]
    with recorded() as found:
        _, mean, rstd, _ = batch_norm_triton.forward(x, weight, weight, atlas, starts, scale, 1e-5 * (1 + seed))
        batch_norm_triton.backward(x, x, weight, weight, mean, rstd, atlas, starts, scale)
        residual_triton.add_tiled(x, x, atlas, starts, scale)
        residual_triton.add_scaled_samples(x, x, factor)
    return found


def wide_offsets(ttir: str, pointers: tuple[str, ...]) -> bool:
    """Whether every tensor of offsets from these pointers is one of int64, or from where an int64 has moved them."""
    sources = dict(re.findall(r"(%[\w#]+) = tt\.(?:splat|broadcast|expand_dims) (%[\w#]+)", ttir))
    sources |= dict(re.findall(r"(%[\w#]+) = tt\.addptr (%[\w#]+), [^:]*: !tt\.ptr<\w+>, i32\b", ttir))
    types = []
    for base, offset in re.findall(r"tt\.addptr (%[\w#]+), [^:]*: (?:tensor<.*x|!tt\.ptr<\w+>, )(i\d+)\b", ttir):
        while base in sources:
            base = sources[base]
        if base.removeprefix("%") in pointers:
            types.append(offset)
    return set(types) == {"i64"}


POINTERS = ("x_ptr", "grad_ptr", "residual_ptr", "y_ptr", "dx_ptr", "scores_ptr", "dscores_ptr")


def compile_job(job: Job) -> list[dict[str, Any]]:
    shape, last, dtype, target = job
    found = launches(shape, last, dtype, Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, *shape[2:]))
    run = (shape[1] if last else shape[2] * shape[3]) * DTYPES[dtype].itemsize
    if run % 16:
        # Only runs of many planes are divisible.
        found = [launch for launch in found if launch.name.startswith("run")]
        run *= found[0].kwargs["RUN"]
    return compile_launches(found, shape, "channels_last" if last else "contiguous", dtype, target, run)


def compile_attention_job(job: AttentionJob) -> list[dict[str, Any]]:
    shape, share_t, share_c, dtype, target = job
    found = attention_launches(shape, share_t, share_c, dtype)
    name = "share_t" if share_t else "share_c" if share_c else "own decisions"
    return compile_launches(found, shape, name, dtype, target, shape[3] * DTYPES[dtype].itemsize)


def compile_launches(
    found: list[Launch], shape: tuple[int, ...], layout: str, dtype: str, target: str, run: int
) -> list[dict[str, Any]]:
    rows = []
    for launch in found:
        code = compile_launch(launch, target)
        rows.append(
            {
                "kernel": launch.name,
                "shape": "x".join(map(str, shape)),
                "layout": layout,
                "dtype": dtype,
                "target": target,
                "run": run,
                "registers": code.registers,
                "spills": code.spills,
                "scratch": code.scratch,
                "loads": dict(code.by_width("load")),
                "stores": dict(code.by_width("store")),
                "wide": wide_offsets(code.ttir, POINTERS),
            }
        )
    return rows


def keys() -> dict[str, Any]:
    found: dict[str, set[str]] = {}
    for i in range(50):
        for height, width in ((12, 10), (7, 7)):
            atlas = Atlas.of(0.01 * i, 0.2, i % 5, 7.0 * i, 0.1, 0.0, height, width)
            for launch in launches((4, 6, height, width), False, "fp32", atlas, i):
                if height == 12 or launch.name.startswith("run"):
                    found.setdefault(launch.name, set()).add(bind(launch, "sm_90")[3])
        for launch in attention_launches((4, 2, 12, 40), False, False, "fp32", i):
            found.setdefault(launch.name, set()).add(bind(launch, "sm_90")[3])
    return {name: len(different) for name, different in found.items()}


def main() -> None:
    missing = missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
    elif sys.argv[1] == "keys":
        print(json.dumps(keys()))
    else:
        for job in jobs():
            for row in compile_job(job):
                print(json.dumps(row), flush=True)
        for attention_job in attention_jobs():
            for row in compile_attention_job(attention_job):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
