"""Several processes that train one model together: what torchrun starts, or one process alone.

Alone, everything here works without a process group: there is one rank, 0, and a broadcast returns what it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this process; inside, the group of all that torchrun has started, if it has.

    Objects and numbers travel through gloo, gradients on GPUs through nccl.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def started() -> bool:
    """Whether there is a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Of this process in the group."""
    return dist.get_rank() if started() else 0


def ranks() -> int:
    """Processes in the group."""
    return dist.get_world_size() if started() else 1


def broadcast(value: T) -> T:
    """The value of rank 0, any that pickles, with tensors on the CPU; those of the other ranks are not read."""
    if not started():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: each has normalised, and so has seen, other images."""
    if started():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def summed(values: Sequence[float]) -> list[float]:
    """The sums over all ranks, in float64: exact for integers below 2^53, and the same on every rank."""
    totals = torch.tensor(values, dtype=torch.float64)
    if started():
        dist.all_reduce(totals)
    return [float(total) for total in totals]


def check_same(what: str, value: object) -> None:
    """Raises a RuntimeError on the ranks where `value` is not that of rank 0."""
    if (first := broadcast(value)) != value:
        raise RuntimeError(f"{what} must be the same on every rank, got {first} on rank 0 and {value} on {rank()}")
