"""Has Triton read every kernel for shapes with sides of 1, few samples and odd lengths: one JSON object a launch.

A script, to be run without TRITON_INTERPRET. Triton makes a constant of an argument that is 1, which the interpreter
does not: what a number has no method for fails here. Nothing is compiled further than to Triton's own language.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from machine.compiling import TARGETS
from machine.compiling import bind
from machine.recording import Launch
from machine.recording import meta
from machine.recording import missing_internals
from machine.recording import recorded
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from autodropout.kernels import attention_triton
from autodropout.kernels import batch_norm_triton
from autodropout.kernels import bernoulli_triton
from autodropout.kernels import block_triton
from autodropout.kernels import residual_triton
from autodropout.kernels import softmax_triton
from autodropout.kernels import tiled_triton
from autodropout.kernels import token_draw_triton
from autodropout.kernels import token_triton
from autodropout.kernels.atlas import Atlas
from autodropout.kernels.block import geometry
from autodropout.kernels.token import by_token

TARGET = "sm_90"
MAPS = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 3, 7, 7),
    (8, 64, 1, 1),
    (1, 16, 1, 8),
    (4, 64, 7, 7),
    (2, 3, 200, 3),
    (1, 8, 16, 16),
]
SEQUENCES = [(1, 1, 1, 1), (1, 1, 1, 5), (1, 1, 5, 1), (2, 1, 1, 3), (1, 4, 1, 4), (1, 3, 5, 7), (1, 1, 1, 4096)]
DTYPES = [torch.float32, torch.bfloat16]
SEED, SCALE = meta(dtype=torch.int64), meta(dtype=torch.float64)
SHARED = [(), (1,), (2, 3), (1, 2, 3), (0, 1), (0, 2), (0, 1, 2, 3)]

Case = tuple[str, Callable[[], object]]


def of_maps() -> Iterator[Case]:
    for shape, dtype, last in product(MAPS, DTYPES, (False, True)):
        x = meta(*shape, dtype=dtype, channels_last=last)
        if last and x.is_contiguous():
            continue
        n, c, h, w = shape
        atlas, weight = Atlas.of(0.3, 0.3, 3, 0.0, 0.0, 0.0, h, w), meta(c, dtype=torch.float32)
        what = f"{shape} {dtype} {'channels_last' if last else 'contiguous'}"
        for share_c in (False, True):
            starts = meta(n, 1 if share_c else c, dtype=torch.int32)
            mask = (atlas, starts, SCALE)
            yield what, lambda x=x, mask=mask: tiled_triton.apply(x, *mask)
            yield what, lambda n=n, c=c, atlas=atlas, s=share_c: tiled_triton.draw(SEED, n, c, atlas, s, "mask", 1)
            yield what, lambda x=x, mask=mask: residual_triton.add_tiled(x, x, *mask)
            if n * h * w > 1:
                w5 = [weight] * 4
                yield what, lambda x=x, mask=mask, w5=w5: batch_norm_triton.forward(x, *w5[:2], *mask, 1e-5)
                yield what, lambda x=x, mask=mask, w5=w5: batch_norm_triton.backward(x, x, *w5, *mask)
            for rate, size in ((0.1, 1), (0.1, 3), (0.9, 2)):
                blocks = geometry(rate, size, h, w)
                yield what, lambda x=x, b=blocks, s=share_c: block_triton.apply(x, b, SEED, SCALE, s, 1)
                yield what, lambda shape=shape, b=blocks, s=share_c: block_triton.mask_scale(shape, b, SEED, s, 1)
        for shared in SHARED:
            yield what, lambda x=x, s=shared: bernoulli_triton.apply(x, list(s), 1, SEED, SCALE, 1)
        yield what, lambda n=n, c=c, h=h, w=w: bernoulli_triton.scale_of_mask(SEED, n, c * h * w, n * c * h * w, 1, 1)
    for samples, elements in ((64, 16), (64, 8), (32, 1), (1, 1), (3, 7)):
        x, factors = meta(samples, elements, dtype=torch.float32), meta(samples, dtype=torch.float32)
        yield f"{(samples, elements)}", lambda x=x, f=factors: residual_triton.add_scaled_samples(x, x, f)


def of_sequences() -> Iterator[Case]:
    for shape, dtype, share_t, share_c in product(SEQUENCES, DTYPES, (False, True), (False, True)):
        sharing, what = (share_t, share_c, 1), f"{shape} {dtype} share_t={share_t} share_c={share_c}"
        fields = torch.tensor((3, 2, 0.5), dtype=torch.float64)
        n, heads, queries, keys = shape
        x, rows = meta(*shape, dtype=dtype), meta(*shape[:3], dtype=torch.float32)
        for layout in ("NHTD", "NHQK"):
            view = by_token(x, layout)
            yield f"{what} {layout}", lambda v=view, f=fields, s=sharing: token_triton.apply(v, v, f, SEED, SCALE, *s)
        yield (
            what,
            lambda f=fields, s=sharing, shape=shape: token_draw_triton.scale_of_mask(
                f, SEED, shape[0], shape[3], shape[1] * shape[2], *s
            ),
        )
        yield what, lambda x=x, f=fields, s=sharing: softmax_triton.forward(x, f, SEED, SCALE, *s)
        yield what, lambda x=x, r=rows, f=fields, s=sharing: softmax_triton.backward(x, x, r, r, f, SEED, SCALE, *s)
        for causal, side in product((False, True), (1, 33)):
            q, k = meta(n, heads, queries, side, dtype=dtype), meta(n, heads, max(keys, queries), side, dtype=dtype)
            how = (SCALE, fields, SEED, 0.125, causal, *sharing)
            yield f"{what} {side}", lambda q=q, k=k, r=rows, how=how: attention_triton.forward(q, k, k, q, r, *how)
            yield (
                f"{what} {side}",
                lambda q=q, k=k, r=rows, how=how: attention_triton.backward(q, q, k, k, q, r, q, k, k, *how),
            )


def error_of(launch: Launch, seen: set[tuple[str, str]]) -> str | None:
    """What Triton says of the kernel with these arguments; None if nothing, or if that was asked before."""
    try:
        source, options, _, key = bind(launch, TARGET)
        if (launch.name, key) in seen:
            return None
        seen.add((launch.name, key))
        backend = make_backend(TARGETS[TARGET])
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        arguments: Any = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
        source.make_ir(TARGETS[TARGET], *arguments)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    missing = missing_internals()
    if missing is not None:
        print(json.dumps({"missing": missing}))
        return
    seen: set[tuple[str, str]] = set()
    for what, launch_all in (*of_maps(), *of_sequences()):
        with recorded() as launches:
            launch_all()
        for launch in launches:
            kernel = f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.name}"
            print(json.dumps({"what": what, "kernel": kernel, "error": error_of(launch, seen)}))


if __name__ == "__main__":
    main()
