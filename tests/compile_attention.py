"""Compiles the Triton kernels of attention for devices that need not be there: one JSON object a line.

A script, to be run without TRITON_INTERPRET:

    python tests/compile_attention.py compile     what the kernels of each job consist of
    python tests/compile_attention.py keys        how many specialisation keys 50 launches of each kernel have
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from machine.compiling import bind
from machine.compiling import compile_launch
from machine.recording import Launch
from machine.recording import launching_for
from machine.recording import meta
from machine.recording import missing_internals
from machine.recording import recorded

from autodropout.kernels import attention_triton

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADS = (32, 64, 96, 128)

Job = tuple[int, str, bool, bool, str]  # head size, dtype, causal, share_c, target


def jobs() -> list[Job]:
    found: list[Job] = [(head, "bf16", True, False, target) for head in HEADS for target in TARGETS]
    found += [(head, "fp32", True, False, target) for head in HEADS for target in TARGETS]
    found += [(64, "fp16", True, False, "sm_90"), (64, "bf16", False, False, "sm_90")]
    found += [(64, "bf16", True, True, "sm_90")]
    # Heads whose rows no access of 16 bytes fits: Transformer-XL's on WikiText-103.
    return [*found, *((41, "bf16", True, False, target) for target in TARGETS)]


def launches(head: int, dtype: str, causal: bool, share_c: bool, target: str, seed: int = 0) -> list[Launch]:
    """What forward and backward launch, but for the small kernel of the pattern. 512 keys are a memory."""
    q, k = (meta(16, 8, length, head, dtype=DTYPES[dtype]) for length in (512, 1024))
    lse = meta(16, 8, 512, dtype=torch.float32)
    fields = torch.tensor([1 + seed % 7, seed % 5, (1 + seed) / 52], dtype=torch.float64)
    # A seed may be a view into a larger tensor; the scale is always one that the op has just made.
    key, scale = meta(2, dtype=torch.int64)[seed % 2], meta(dtype=torch.float64)
    pattern = (scale, fields, key, 0.1 + seed / 100, causal, False, share_c, seed)
    with launching_for(target), recorded() as found:
        attention_triton.forward(q, k, k, q, lse, *pattern)
        attention_triton.backward(q, q, k, k, q, lse, q, k, k, *pattern)
    return [launch for launch in found if launch.name != "cells_kernel"]


def compile_job(job: Job) -> list[dict[str, Any]]:
    head, dtype, causal, share_c, target = job
    rows = []
    for launch in launches(*job):
        code = compile_launch(launch, target)
        rows.append(
            {
                "kernel": launch.name,
                "head": head,
                "dtype": dtype,
                "causal": causal,
                "share_c": share_c,
                "target": target,
                "registers": code.registers,
                "spills": code.spills,
                "scratch": code.scratch,
                "shared": code.shared,
                "loads": dict(code.by_width("load")),
                "stores": dict(code.by_width("store")),
            }
        )
    return rows


def keys() -> dict[str, int]:
    found: dict[str, set[str]] = {}
    for i in range(50):
        for launch in launches(64, "bf16", True, False, "sm_90", i):
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


if __name__ == "__main__":
    main()
