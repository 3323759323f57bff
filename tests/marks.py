"""Marks that several test modules share."""

from __future__ import annotations

import pytest
import torch

# Both tried with 2.6.0, which does not, and 2.14.1, which does.
TORCH_2_6 = torch.__version__.startswith("2.6.")
dynamo_reads_patterns_lazily = pytest.mark.skipif(
    TORCH_2_6,
    reason="Dynamo of torch 2.6 guards every field of a frozen dataclass that a compiled function is given",
)
dynamo_traces_gradients_of_ops = pytest.mark.skipif(
    TORCH_2_6,
    reason="torch 2.6 raises when torch.func.grad of an op with a registered backward is compiled",
)
