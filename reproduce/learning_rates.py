"""The learning rate of the Transformers, step by step."""

from __future__ import annotations

import math


def warmup_cosine(peak: float, warmup: int, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`: up to `peak` along a line over `warmup` steps, then to 0 along a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
