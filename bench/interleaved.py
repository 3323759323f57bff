"""Timing contenders against each other on a machine whose speed drifts: in turn, round after round, medians compared.

pytest-benchmark times one function at a time, minutes apart from the next. Here each of its rounds is set up by one
run of every peer, so that all see the same machine.

And the same heap: whether a contender gets warm pages or faults new ones in depends on what its predecessor freed,
which is worth a factor of four at 20 MB. So an untimed run of the unit, the first peer, goes before everything timed,
and the peers change their order from round to round.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Contender = Callable[[], object]


def interleaved(benchmark: Any, ours: Contender, peers: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Median seconds of every peer and of "ours", by name; the same in `benchmark.extra_info`.

    The first of the peers is the unit. The first round of everything warms up and is thrown away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    unit = next(iter(peers.values()))
    order = deque(peers)

    def run_peers() -> None:
        for name in order:
            unit()
            begin = time.perf_counter()
            peers[name]()
            seconds[name].append(time.perf_counter() - begin)
        order.rotate()
        unit()

    benchmark.pedantic(ours, setup=run_peers, rounds=rounds, warmup_rounds=1)
    medians = {name: statistics.median(runs[1:]) for name, runs in seconds.items()}
    medians["ours"] = benchmark.stats.stats.median
    benchmark.extra_info.update({f"median_s[{name}]": median for name, median in medians.items()})
    return medians
