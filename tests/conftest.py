"""Settings that must hold before any test module is imported, and shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before any kernel is imported: without a GPU the
# same kernels run under the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, named by the environment variable AUTODROPOUT_DATA."""
    value = os.environ.get("AUTODROPOUT_DATA")
    if not value:
        pytest.skip("needs real data: set AUTODROPOUT_DATA to the folder that holds the data sets")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"AUTODROPOUT_DATA must name a folder, got {value!r}")
    return path
