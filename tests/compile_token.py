"""Compiles the Triton kernels of the token op for devices that need not be there, as compile_kernels.py does.

A script, to be run without TRITON_INTERPRET:

    python tests/compile_token.py compile     one JSON object a line, a job each
    python tests/compile_token.py keys        one JSON object: the specialisation keys of many launches
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import compile_kernels as base
import torch
import triton
from compile_kernels import DTYPES
from compile_kernels import TARGETS
from compile_kernels import Recorder

from autodropout.kernels import token_draw_triton
from autodropout.kernels import token_triton
from autodropout.kernels.token import by_token
from autodropout.kernels.token import sides_of

# Name: layout, shape, and whether memory is that of the transposed NTC tensor.
CASES: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "NTC": ("NTC", (32, 512, 1024), False),
    "TNC by 4 bytes": ("TNC", (150, 60, 410), False),
    "NHTD": ("NHTD", (32, 16, 512, 64), False),
    "NHTD transposed": ("NHTD", (32, 16, 512, 64), True),
    "NHQK": ("NHQK", (16, 16, 384, 768), False),
    # More than 2^32 elements, which are only compiled for.
    "huge NTC": ("NTC", (4100, 1024, 1024), False),
    "huge NHQK": ("NHQK", (260, 16, 1024, 1024), False),
}
SHARING = {"none": (False, False), "share_t": (True, False), "share_c": (False, True)}
ELEMENTWISE = ("apply_kernel", "apply_keys_kernel")
KERNELS = ("cells_kernel", "spans_kernel", *ELEMENTWISE, "count_kernel")
MODULES = {name: token_triton if name in ELEMENTWISE else token_draw_triton for name in KERNELS}
RECORDERS = {name: Recorder(getattr(module, name)) for name, module in MODULES.items()}
for _name, _module in MODULES.items():
    setattr(_module, _name, RECORDERS[_name])
base.RECORDERS.update(RECORDERS)
FIELDS = (4.0, 12.0, 0.5)

Job = tuple[str, str, str, str, str]  # kernel, case, sharing, dtype, target


def jobs() -> list[Job]:
    """Both kernels over elements in bf16 and fp32, with every sharing, for a GPU of each maker; and the rest."""
    both = ("sm_90", "gfx942")
    kernels = (("apply_kernel", "NTC"), ("apply_keys_kernel", "NHQK"))
    chosen = [(*one, sharing, "bf16", target) for one in kernels for sharing in SHARING for target in both]
    chosen += [(*one, sharing, "fp32", "sm_90") for one in kernels for sharing in ("none", "share_c")]
    chosen += [(*one, "none", "fp64", "sm_90") for one in kernels]
    chosen += [
        ("apply_kernel", case, "none", "bf16", "sm_90") for case in ("TNC by 4 bytes", "NHTD", "NHTD transposed")
    ]
    chosen += [("apply_kernel", "huge NTC", "share_c", "bf16", "gfx942")]
    chosen += [("apply_keys_kernel", "huge NHQK", "share_c", "bf16", "gfx942")]
    chosen += [("cells_kernel", "NTC", "share_c", "fp32", target) for target in both]
    chosen += [("spans_kernel", "NTC", "share_t", "fp32", target) for target in both]
    chosen += [("count_kernel", "NTC", "none", "fp32", target) for target in both]
    return chosen


def activation(case: str, dtype: str, device: str = "meta") -> torch.Tensor:
    """A tensor of this case; on `meta` it has the null address, which is aligned as fresh device memory is."""
    _, shape, transposed = CASES[case]
    if not transposed:
        return torch.empty(shape, dtype=DTYPES[dtype], device=device)
    n, heads, t, d = shape
    return torch.empty((n, t, heads, d), dtype=DTYPES[dtype], device=device).transpose(1, 2)


def launch(
    layout: str, x: torch.Tensor, sharing: str, values: tuple[float, ...], seed: torch.Tensor, rank: int
) -> None:
    """Everything that forward launches, with the scale of the mask, recorded."""
    for recorder in RECORDERS.values():
        recorder.launches.clear()
    share_t, share_c = SHARING[sharing]
    fields = torch.tensor(values, dtype=torch.float64)
    scale = token_draw_triton.scale_of_mask(fields, seed, *sides_of(x.shape, layout), share_t, share_c, rank)
    y = torch.empty_like(x)
    token_triton.apply(by_token(x, layout), by_token(y, layout), fields, seed, scale, share_t, share_c, rank)


def compile_job(job: Job) -> dict[str, Any]:
    kernel, case, sharing, dtype, target = job
    x = activation(case, dtype)
    launch(CASES[case][0], x, sharing, FIELDS, torch.empty((), dtype=torch.int64, device="meta"), 0)
    args, kwargs = RECORDERS[kernel].launches[-1]
    source, options, _, bound = base.bind(kernel, args, kwargs, TARGETS[target])
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    tile = 0
    if kernel == "apply_kernel":
        tile = bound["TOKENS"] * bound["FRAGMENTS"] * bound["VEC"]
    elif kernel == "apply_keys_kernel":
        tile = 4 * bound["CALLS"] * bound["KEYS"]
    threads = options.num_warps * TARGETS[target].warp_size
    return {
        "kernel": kernel,
        "case": case,
        "sharing": sharing,
        "dtype": dtype,
        "target": target,
        # Bytes that follow each other in memory: the channels of a token, or the keys of a query.
        "run": x.shape[-1] * x.element_size(),
        "tile": tile,
        "tile_bytes": tile * x.element_size(),
        "threads": threads,
        "offsets": base.offsets_by_pointer(compiled.asm["ttir"], ("x_ptr", "y_ptr")),
        "accesses": base.accesses_of_activation(compiled.asm["ttir"], dtype) if tile else {},
        "shared": compiled.metadata.shared,
        **(base.describe_hip if target.startswith("gfx") else base.describe_cuda)(compiled),
    }


def keys() -> dict[str, Any]:
    """By kernel and sharing the number of different keys of 50 launches, with other fields, seed and rank each.

    And, to show that keys do differ, their number over three shapes. Here the tensors are real: their addresses are
    part of the keys.
    """
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    found = {}
    for layout, shape in (("NTC", (3, 40, 24)), ("NHQK", (2, 3, 10, 40))):
        x = torch.randn(shape, generator=generator)
        for sharing in SHARING:
            different: dict[str, set[Any]] = {kernel: set() for kernel in KERNELS}
            for i in range(50):
                # Seeds are elements of a tensor, of which every other one is aligned to 16 bytes.
                values = (1 + i**5 % 1009, i**4 % 512 if i % 7 else 0, i / 49)
                launch(layout, x, sharing, values, seeds[i], 2**32 // 50 * i)
                for kernel, recorder in RECORDERS.items():
                    for args, kwargs in recorder.launches:
                        different[kernel].add(base.bind(kernel, args, kwargs, TARGETS["sm_90"])[2])
            found |= {f"{kernel} {layout} {sharing}": len(one) for kernel, one in different.items() if one}
    control = set()
    for shape in ((3, 40, 24), (3, 40, 25), (1, 40, 24)):
        launch("NTC", torch.zeros(shape), "none", FIELDS, seeds[0], 0)
        control.add(base.bind("apply_kernel", *RECORDERS["apply_kernel"].launches[-1], TARGETS["sm_90"])[2])
    return {**found, "control": len(control)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compile", "keys"))
    arguments = parser.parse_args()
    missing = base.missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
    elif arguments.command == "keys":
        print(json.dumps(keys()))
    else:
        for job in jobs():
            print(json.dumps(compile_job(job)), flush=True)


if __name__ == "__main__":
    main()
