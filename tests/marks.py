"""Marks that several test modules share."""

from __future__ import annotations

import pytest
import torch

# Tried with 2.6.0, which does not, and 2.14.1, which does.
dynamo_reads_patterns_lazily = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="Dynamo of torch 2.6 guards every field of a frozen dataclass that a compiled function is given",
)
