"""What Numba makes of the loops for CPUs with AVX2 but no AVX-512, as most are: vectors, without masked reads.

A masked read of AVX2, of which the loops have no need, doubles the time of a loop (docs/cpu-speed.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

CPUINFO = Path("/proc/cpuinfo")
HAS_AVX2 = CPUINFO.exists() and "avx2" in CPUINFO.read_text()
pytestmark = pytest.mark.skipif(not HAS_AVX2, reason="needs a CPU with AVX2, on which the loops run once")

CODE = """
import torch
from autodropout.kernels import (
    Atlas, batch_norm_pattern_relu, bernoulli_dropout, block_dropout, tiled_dropout, tiled_dropout_add, token_dropout
)
from autodropout.kernels import batch_norm_numba, bernoulli_numba, block_numba, residual_numba, tiled_numba, token_numba

maps, tokens, weights = torch.ones(2, 16, 16, 16), torch.ones(2, 16, 16), torch.ones(2, 4, 16, 16)
atlas = Atlas.of(0.25, 0.25, 3, 30.0, 0.0, 0.0, 16, 16)
tiled_dropout_add(maps, maps, atlas)
for x in (maps, maps.to(memory_format=torch.channels_last)):
    batch_norm_pattern_relu(x.clone().requires_grad_(), None, None, None, None, atlas).backward(x)
    tiled_dropout(x.requires_grad_(), atlas).backward(x)
    x = x.detach()
    block_dropout(x, (0.1, 3))
    bernoulli_dropout(x, 0.1)
for share_c in (False, True):
    token_dropout(tokens, (2, 1, 0.5), share_c=share_c)
    token_dropout(weights, (2, 1, 0.5), layout="NHQK", share_c=share_c)
loops = {
    tiled_numba: ("_planes", "_drop", "_fragments"),
    block_numba: ("_planes", "_rows"),
    batch_norm_numba: ("_relu", "_gradient", "_relu_cl", "_gradient_cl"),
    bernoulli_numba: ("_runs", "_places"),
    residual_numba: ("_planes",),
    token_numba: ("_rows", "_keys", "_columns"),
}
for module, names in loops.items():
    for name in names:
        (code,) = getattr(module, name).inspect_asm().values()
        products = [line for line in code.splitlines() if "vmulps" in line and "ymm" in line]
        print(module.__name__, name, len(products), "vmaskmov" in code)
"""


@pytest.mark.slow
def test_products_are_vectors_and_reads_are_not_masked(tmp_path: Path) -> None:
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2,+bmi,+bmi2",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loops = [line.split() for line in run.stdout.splitlines()]
    assert len(loops) == 15
    for module, name, products, masked in loops:
        assert int(products) > 0, (module, name)
        assert masked == "False", (module, name)
