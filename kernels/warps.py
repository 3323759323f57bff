"""How many threads of a program run in step."""

from __future__ import annotations

import torch


def warp_size() -> int:
    """32, or 64 on AMD's accelerators. Asked at every launch, so that launches of either can be recorded anywhere."""
    return 64 if torch.version.hip else 32
