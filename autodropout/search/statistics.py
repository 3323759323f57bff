"""Means with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def mean_and_half_width(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """The mean, and half the width of Student's t-interval; None for one value, which has no interval.

    Raises:
        ImportError: SciPy is needed and not installed.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = float(student_t().ppf((1 + confidence) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5


def student_t() -> Any:
    """SciPy's distribution.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        if error.name != "scipy":
            raise
        raise ImportError("intervals need SciPy: pip install 'autodropout[search]'", name="scipy") from error
    return stats.t
