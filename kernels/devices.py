"""Which tensors the Triton kernels take."""

from __future__ import annotations

from importlib.util import find_spec

import torch

# Looked up, not imported: Triton is only needed on a GPU, and does not exist on every system.
HAS_TRITON = find_spec("triton") is not None


def triton_runs_on(x: torch.Tensor) -> bool:
    return x.is_cuda and HAS_TRITON
