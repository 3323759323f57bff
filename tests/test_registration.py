"""What all ops are registered with."""

from __future__ import annotations

import importlib

import pytest
import torch

MODULES = ("attention", "batch_norm", "bernoulli", "block", "residual", "softmax", "tiled", "token")


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch goes by the CPU tensor alone")
def test_ops_that_read_a_pattern_on_the_host_stay_out_of_inductors_cuda_graphs() -> None:
    """Else replays would go on with the pattern of the capture."""
    for module in MODULES:
        importlib.import_module(f"autodropout.kernels.{module}")
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("autodropout::")]
    ops = [getattr(torch.ops.autodropout, name.partition("::")[2]).default for name in names]
    reading = {op for op in ops if any(argument.name == "fields" for argument in op._schema.arguments)}
    assert len(reading) >= 14
    assert {op for op in ops if torch.Tag.cudagraph_unsafe in op.tags} == reading
