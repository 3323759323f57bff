"""Timing contenders against each other on a machine whose speed drifts: in turn, round after round, medians compared.

pytest-benchmark times one function at a time, minutes apart from the next. Here each of its rounds is set up by one
run of every contender, so that all see the same machine. Its own figure is the wall time of ours.

And the same heap: whether a contender gets warm pages or faults new ones in depends on what its predecessor freed,
which is worth a factor of four at 20 MB. So what is freed is kept (heap.py), an untimed run of the unit, the first
peer, goes before everything timed, and the contenders change their order from round to round.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any
from typing import NamedTuple

import torch
from clock import ON_GPU
from clock import Contender
from clock import seconds
from heap import keep_freed_memory

# On a GPU a round takes milliseconds: 10 warm up, 150 are timed.
GPU_ROUNDS, GPU_WARMUP = 150, 10
SLOW = 10


class Timing(NamedTuple):
    """Seconds: the median, and what a fifth of the rounds stayed below and above."""

    median: float
    low: float
    high: float


def interleaved(benchmark: Any, ours: Contender, peers: dict[str, Contender], rounds: int) -> dict[str, Timing]:
    """The timing of every peer and of "ours", by name; the medians also in `benchmark.extra_info`.

    The first of the peers is the unit. The first rounds of everything warm up and are thrown away.
    """
    keep_freed_memory()
    contenders = peers | {"ours": ours}
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    unit = next(iter(peers.values()))
    order = deque(contenders)
    rounds, warmup = (GPU_ROUNDS, GPU_WARMUP) if ON_GPU else (rounds, 1)

    def run_all() -> None:
        first = next(iter(peers))
        for name in order:
            taken = runs[name]
            # What takes ten units needs no third digit: it sits out every other round.
            if len(taken) > warmup and taken[-1] > SLOW * runs[first][-1] and len(taken) * 2 > len(runs[first]):
                continue
            unit()
            taken.append(seconds(contenders[name]))
        order.rotate()
        unit()

    benchmark.pedantic(ours, setup=run_all, rounds=rounds, warmup_rounds=warmup)
    timings = {name: _timing(taken[warmup:]) for name, taken in runs.items()}
    benchmark.extra_info.update({f"median_s[{name}]": timing.median for name, timing in timings.items()})
    return timings


def rounds_for(x: torch.Tensor) -> int:
    """Rounds on the CPU for contenders of this activation: more for small ones, which noise moves more."""
    return 61 if x.numel() < 1 << 23 else max(5, 125_000_000 // x.numel())


def _timing(taken: list[float]) -> Timing:
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(statistics.median(taken), fifths[0], fifths[-1])
