"""Data parallel training on two processes: masks per rank, equal ones on request, synchronised gradients.

One run of two processes (gloo, on the CPU) makes all observations; the tests read them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from applied import MIXED
from applied import TILED
from applied import site_dropouts
from applied import small
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trained import CASES
from trained import Case
from trained import activation

from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout import remove_policy
from autodropout.nn import DropPath
from autodropout.nn import PatternDropout
from autodropout.schedule import LinearSchedule

RANKS = 2
SEED = 2**40 + 8
IMAGES = activation((4, 3, 16, 16))  # two for each rank
STEPS = 3

Seen = dict[str, Any]


def drop(case: Case, rank: int | None = None) -> torch.Tensor:
    return pattern_dropout(activation(case.shape), case.pattern, seed=SEED, rank=rank)


def drop_with_drawn_seed(case: Case, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return pattern_dropout(activation(case.shape), case.pattern)


def plain_model() -> nn.Module:
    """Every normalisation is in evaluation, so that no rank has statistics of its own; its dropout is not."""
    model = small()
    apply_policy(model, MIXED)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for dropout in site_dropouts(model).values():
        dropout.train()
    return model


def loss_of(model: nn.Module, images: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    loss: torch.Tensor = model(images).square().mean()
    return loss


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, rank: int) -> Seen:
    """Three steps on this rank's images, every rank under the same manual_seed, with a schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = LinearSchedule(model, 0.5, 1.0, STEPS, field="strength")
    losses, gradients = [], []
    for step in range(STEPS):
        loss = loss_of(model, IMAGES[2 * rank : 2 * rank + 2], seed=step)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([full(parameter.grad) for parameter in model.parameters()])
        optimizer.step()
        schedule.step()
    return {"losses": losses, "gradients": gradients, "weights": [full(p) for p in model.parameters()]}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen: Seen = {
        "own": {name: drop(case) for name, case in CASES.items()},
        "equal": {name: drop(case, rank=0) for name, case in CASES.items()},
        "drawn": {name: drop_with_drawn_seed(case, 7) for name, case in CASES.items()},
        "ddp": train(nn.parallel.DistributedDataParallel(plain_model()), rank),
    }
    # What is dropped whole has gradients of 0, none that is missing: DDP need not look for unused parameters.
    torch.manual_seed(0)
    branch = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), DropPath(1.0)))
    branch(torch.ones(2, 4)).sum().backward()
    seen["all dropped"] = [full(parameter.grad) for parameter in branch.parameters()]

    model = plain_model()
    keys = list(model.state_dict())
    for module in [*model.modules()][::-1]:
        if type(module).__name__ == "WideBlock":
            fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert list(model.state_dict()) == keys
    seen["fsdp"] = train(model, rank)
    remove_policy(model)
    seen["fsdp, removed"] = loss_of(model, IMAGES, seed=0).detach()
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_draw_their_own_masks(ranks: list[Seen], name: str) -> None:
    """With the same seed, given or drawn, and each the mask that `rank=` names."""
    for key in ("own", "drawn"):
        assert not torch.equal(ranks[0][key][name], ranks[1][key][name])
    for rank in range(RANKS):
        assert torch.equal(ranks[rank]["own"][name], drop(CASES[name], rank=rank))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_draw_equal_masks_on_request(ranks: list[Seen], name: str) -> None:
    for seen in ranks:
        assert torch.equal(seen["equal"][name], drop(CASES[name]))


def expected_training(model: nn.Module) -> list[list[torch.Tensor]]:
    """The weights after each step of one process that plays all ranks in turn and averages their gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = LinearSchedule(model, 0.5, 1.0, STEPS, field="strength")
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "is_initialized", lambda: True)
                patch.setattr(dist, "get_rank", lambda rank=rank: rank)
                (loss_of(model, IMAGES[2 * rank : 2 * rank + 2], seed=step) / RANKS).backward()
        gradients.append([full(parameter.grad) for parameter in model.parameters()])
        optimizer.step()
        schedule.step()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_the_mean_over_ranks(ranks: list[Seen], wrapper: str) -> None:
    """Equal on both, and those of one process; a mean of two is one rounding, and each wrapper sums in its order."""
    one, other = (seen[wrapper] for seen in ranks)
    for a, b in zip(one["gradients"] + [one["weights"]], other["gradients"] + [other["weights"]], strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert not torch.equal(one["losses"][0], other["losses"][0])
    for got, expected in zip(one["gradients"], expected_training(plain_model()), strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ddp_and_fsdp_draw_the_same_masks(ranks: list[Seen]) -> None:
    """The losses of the first step are those of equal weights: bitwise equal if all masks are."""
    for seen in ranks:
        assert torch.equal(seen["ddp"]["losses"][0], seen["fsdp"]["losses"][0])


@pytest.mark.slow
def test_a_policy_comes_off_a_sharded_model(ranks: list[Seen]) -> None:
    """What is left is the plain model: alike on all ranks though they draw different masks."""
    assert torch.equal(ranks[0]["fsdp, removed"], ranks[1]["fsdp, removed"])


@pytest.mark.slow
def test_ddp_finds_every_gradient_where_everything_is_dropped(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert all(not gradient.any() for gradient in seen["all dropped"])


def test_functional_call_takes_other_weights_and_the_same_masks() -> None:
    """With weights of its own, gradients by `torch.func.grad`, patterns of every op."""
    for case in CASES.values():
        torch.manual_seed(0)
        width = case.shape[-1]
        model = nn.Sequential(nn.Linear(width, width), PatternDropout(case.pattern), nn.Linear(width, width))
        weights = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
        x = activation(case.shape)

        def loss(weights: dict[str, torch.Tensor], model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            torch.manual_seed(3)
            y: torch.Tensor = torch.func.functional_call(model, weights, (x,))
            return y.square().sum()

        other = copy.deepcopy(model)
        other.load_state_dict(weights)
        torch.manual_seed(3)
        other(x).square().sum().backward()
        got = torch.func.grad(loss)(weights)
        for name, parameter in other.named_parameters():
            assert torch.equal(got[name], parameter.grad), name


def test_a_pattern_alone_is_sharded_by_nothing() -> None:
    """What FSDP and DDP distribute are parameters and buffers: a pattern has neither."""
    layer = PatternDropout(TILED)
    assert not list(layer.parameters())
    assert not list(layer.buffers())
