"""The learning rate of the Transformers, step by step, and what tables say of a warm-up."""

from __future__ import annotations

import math


def warmup_cosine(peak: float, warmup: int, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`: up to `peak` along a line over `warmup` steps, then along the cosine of all steps.

    That cosine falls from `peak` at step 0 to 0, as in the code of Transformer-XL's authors: after a warm-up over a
    large part of the steps the rate falls at once, to where the cosine is by then.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def only_rises(warmup: int, training: int, unit: str) -> str:
    """What a table adds to the length of a training that ends before its warm-up, as with a small `--epochs`."""
    if warmup < training:
        return ""
    return f" (the learning rate only rises: warm-up over {warmup:,} {unit}, training over {training:,})"
