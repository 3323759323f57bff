"""Seconds that one call takes: wall time on the CPU, the device's own time on a GPU.

On a GPU (ROCm's included) events around a call would time the host if the device waited for it. So the device is kept
busy meanwhile, first by overwriting the second-level cache, so that every contender begins with a cold one, then by a
spin; what the call launches is queued by the time both are over.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Contender = Callable[[], object]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]

# Cycles to spin: about a millisecond, several times what Python needs to launch forward and backward.
SPIN = 2_000_000


def seconds(call: Contender) -> float:
    return _on_device(call) if ON_GPU else _on_host(call)


def _on_host(call: Contender) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _on_device(call: Contender) -> float:
    size = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    torch.empty(max(size, 1 << 26), dtype=torch.uint8, device=DEVICE).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    torch.cuda._sleep(SPIN)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
