"""Means with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_and_half_width(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """The mean, and half the width of Student's t-interval; None for one value, which has no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy import stats

    quantile = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5
