"""What a regulariser adds to a training step: `pytest bench/bench_step.py`.

The unit is a step (forward, loss, backward, SGD) of a WRN-16-2 on 32x32 images without one. Ours are policies, put on
by `apply_policy`: hand-v0, and Dropout and DropBlock (block 7 where it fits) with rate 0.1 behind every batch
normalisation. Peers do the same to the outputs of the same layers: `torch.nn.functional.dropout`, DropBlock of
torchvision and of timm, whose default drops the same in all channels of a sample. On the CPU also hand-v0 as it is
where Numba is not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clock import DEVICE
from clock import DTYPES
from clock import ON_GPU
from conftest import Report
from interleaved import interleaved
from plain_torch import plain
from timm.layers import drop_block_2d as timm_drop_block
from torch import nn
from torchvision.ops import drop_block2d

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Policy
from autodropout import apply_policy
from autodropout import load_policy
from autodropout.reproduce.models.wide_resnet import WideResNet

TESTS = ("test_tiled.py", "test_tiled_sequences.py", "test_block.py", "test_bernoulli.py")
BATCH = 64
ROUNDS = 5

POLICIES = {
    "hand-v0": load_policy("hand-v0"),
    "Dropout": Policy.uniform(BernoulliPattern(rate=0.1)),
    "DropBlock": Policy.uniform(BlockPattern(rate=0.1, block_size=7)),
}
PEERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F.dropout": lambda x: F.dropout(x, 0.1),
    "torchvision": lambda x: drop_block2d(x, 0.1, 7),
    "timm": lambda x: timm_drop_block(x, 0.1, 7),
}


def step_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def bench_step(benchmark: Any, report: Report, dtype: torch.dtype) -> None:
    images = torch.randn(BATCH, 3, 32, 32, dtype=dtype, device=DEVICE)
    labels = torch.randint(10, (BATCH,), device=DEVICE)
    without = WideResNet(16, 2, 10).to(DEVICE, dtype)
    models = {"none": without} | {name: copy.deepcopy(without) for name in [*POLICIES, *PEERS]}
    for name, policy in POLICIES.items():
        apply_policy(models[name], policy, images[:2])
    for name, peer in PEERS.items():
        for module in models[name].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda module, inputs, output, peer=peer: peer(output))
    steps = {name: step_of(model, images, labels) for name, model in models.items()}
    ours = steps.pop("hand-v0")
    if not ON_GPU:
        steps["no Numba"] = plain(ours)
    report.add("training step", images.shape, "", interleaved(benchmark, ours, steps, ROUNDS), dtype)
