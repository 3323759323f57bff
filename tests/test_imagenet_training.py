"""Training on several processes: against a twin on one, repeated, and continued from every epoch's checkpoint.

One run of two processes (gloo, on the CPU) makes all observations; the tests read them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout.apply import SiteDropout
from autodropout.reproduce import group
from autodropout.reproduce import imagenet_training
from autodropout.reproduce.augment import derive
from autodropout.reproduce.imagenet_data import TensorImages
from autodropout.reproduce.imagenet_training import ImageNetRecipe
from autodropout.reproduce.imagenet_training import Normalise
from autodropout.reproduce.imagenet_training import TrainedModel
from autodropout.reproduce.imagenet_training import accuracy
from autodropout.reproduce.imagenet_training import build_imagenet_model
from autodropout.reproduce.imagenet_training import train_imagenet_model
from autodropout.reproduce.imagenet_training import weights_digest
from autodropout.reproduce.models.imagenet import DEMO

RANKS, CLASSES, SEED = 2, 3, 5
CPU = torch.device("cpu")
# 2 steps an epoch, of 2 micro-batches of 2 images on each of 2 ranks; 3 images are left over.
RECIPE = ImageNetRecipe(DEMO, 3, 8, 2, RANKS, 0.05, 1, 1e-4, None, "none")
AVERAGED = dataclasses.replace(RECIPE, average=0.7)
OFF = Policy.uniform(None)
MASKED = Policy.uniform(BernoulliPattern(0.3, "none"))

Seen = dict[str, Any]


def images(count: int, seed: int) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


TRAIN, TEST = images(19, 0), images(203, 1)


def train(recipe: ImageNetRecipe, policy: Policy, checkpoint: Path | None = None, **hooks: Any) -> TrainedModel:
    return train_imagenet_model(recipe, policy, TRAIN, CLASSES, SEED, CPU, checkpoint, **hooks)


def masks_of_first_site(seen: list[torch.Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Which cells the first site keeps, call by call."""

    def look(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if isinstance(module, SiteDropout) and output.shape[1:] == (64, 16, 16) and module.training:
            seen.append(output.detach() != 0)

    return nn.modules.module.register_module_forward_hook(look)


def observe(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    seen: Seen = {"plain": train(RECIPE, OFF).model.state_dict()}

    # A checkpoint of every epoch, where only rank 0 can see them.
    own = folder / str(rank)
    own.mkdir()
    path = own / "model.pt"
    masks: list[torch.Tensor] = []
    epochs: list[int] = []

    def keep() -> None:
        epochs.append(len(epochs))
        if path.exists():
            shutil.copy(path, own / f"{len(epochs)}.pt")

    handle = masks_of_first_site(masks)
    trained = train(AVERAGED, MASKED, path, on_epoch=keep)
    handle.remove()
    seen |= {"masks": masks, "loss": trained.loss, "digest": weights_digest(trained.model)}
    seen |= {"files": sorted(file.name for file in own.iterdir()), "epochs": len(epochs)}
    again = train(AVERAGED, MASKED)
    seen["again"] = (again.loss, weights_digest(again.model))
    seen["continued"] = []
    for done in (1, 2):
        calls: list[int] = []
        continued = train(AVERAGED, MASKED, own / f"{done}.pt", on_epoch=lambda calls=calls: calls.append(0))  # type: ignore[misc]
        seen["continued"].append((continued.loss, weights_digest(continued.model), len(calls)))
    seen["accuracy"] = accuracy(trained.model, AVERAGED, TEST, CPU)
    with torch.inference_mode():
        guesses = trained.model(Normalise(CPU)(TEST.images)).argmax(1)
    seen["correct"] = int((guesses == TEST.labels).sum())
    seen["broadcast"] = group.broadcast({"from": rank})
    seen["summed"] = group.summed([rank + 0.5, 2**52])
    try:
        group.check_same("the rank", rank)
    except RuntimeError as error:
        seen["different"] = str(error)
    torch.save(seen, folder / f"seen{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(observe, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"seen{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def twin(recipe: ImageNetRecipe) -> nn.Module:
    """The same training by one process, from the text of the recipe: the gradients of all micro-batches are computed
    one after the other, and the statistics of batch normalisation are those of rank 0's."""
    model = build_imagenet_model(recipe, CLASSES, SEED)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True)
    steps = 2
    for epoch in range(recipe.epochs):
        generator = torch.Generator().manual_seed(derive(SEED, epoch, "order"))
        order = torch.randperm(19, generator=generator)[:16]
        for step in range(steps):
            number = epoch * steps + step
            rate = 0.05 * (number + 1) / 2 if number < 2 else 0.05 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 4))
            sums: list[list[torch.Tensor]] = []
            parts = order[8 * step : 8 * step + 8].view(2, RANKS, 2)
            for rank in reversed(range(RANKS)):
                other = copy.deepcopy(model) if rank > 0 else model
                other.train()
                other.zero_grad()
                for part in parts[:, rank]:
                    scores = other(Normalise(CPU)(TRAIN.images[part]))
                    (F.cross_entropy(scores, TRAIN.labels[part], label_smoothing=0.1) / 2).backward()
                sums.append([parameter.grad / RANKS for parameter in other.parameters()])
            for parameter, *gradients in zip(model.parameters(), *sums, strict=True):
                parameter.grad = gradients[0] + gradients[1]
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    return model


@pytest.mark.slow
def test_two_ranks_end_in_the_weights_of_a_twin_on_one(seen: list[Seen]) -> None:
    # Halves of gradients are exact, and a sum of two is the same in any order: not even the last bit may differ.
    expected = twin(RECIPE).state_dict()
    for rank in range(RANKS):
        assert seen[rank]["plain"].keys() == expected.keys()
        assert all(torch.equal(seen[rank]["plain"][name], value) for name, value in expected.items())


@pytest.mark.slow
def test_masks_differ_between_ranks_and_between_steps(seen: list[Seen]) -> None:
    first, second = (seen[rank]["masks"] for rank in range(RANKS))
    calls = RECIPE.epochs * 2 * RECIPE.accumulated
    assert len(first) == len(second) == calls
    different = {mask.numpy().tobytes() for mask in (*first, *second)}
    assert len(different) == 2 * calls
    # Independent masks of rate 0.3 agree in 0.58 of their cells; agreement by one seed would be 1. The images differ
    # between the ranks, but batch normalisation makes no zeros. 12 * 32,768 cells: a standard deviation of 0.0008.
    agreement = torch.stack([(a == b).double().mean() for a, b in zip(first, second, strict=True)]).mean()
    assert abs(float(agreement) - (0.3**2 + 0.7**2)) < 0.004


@pytest.mark.slow
def test_ranks_agree_and_a_second_run_repeats_the_first(seen: list[Seen]) -> None:
    for rank in range(RANKS):
        assert (seen[rank]["loss"], seen[rank]["digest"]) == (seen[0]["loss"], seen[0]["digest"])
        assert seen[rank]["again"] == (seen[0]["loss"], seen[0]["digest"])
    assert math.isfinite(seen[0]["loss"])


@pytest.mark.slow
def test_only_rank_0_writes_and_every_checkpoint_goes_on_to_the_same_weights(seen: list[Seen]) -> None:
    assert seen[0]["files"] == ["1.pt", "2.pt", "3.pt", "model.pt"]
    assert seen[1]["files"] == []
    assert seen[0]["epochs"] == RECIPE.epochs
    for rank in range(RANKS):
        assert seen[rank]["continued"] == [(seen[0]["loss"], seen[0]["digest"], RECIPE.epochs)] * 2


@pytest.mark.slow
def test_accuracy_counts_every_image_once(seen: list[Seen]) -> None:
    assert len(TEST) % RANKS == 1
    for rank in range(RANKS):
        assert seen[rank]["accuracy"] == seen[0]["correct"] / len(TEST)


@pytest.mark.slow
def test_the_group(seen: list[Seen]) -> None:
    for rank in range(RANKS):
        assert seen[rank]["broadcast"] == {"from": 0}
        assert seen[rank]["summed"] == [2.0, 2.0**53]
    assert "different" not in seen[0]
    assert seen[1]["different"] == "the rank must be the same on every rank, got 0 on rank 0 and 1 on 1"


def test_alone_there_is_one_rank() -> None:
    assert (group.rank(), group.ranks()) == (0, 1)
    assert group.broadcast("x") == "x"
    assert group.summed([1.5]) == [1.5]
    with group.process_group() as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert not group.started()


def test_accumulated_micro_batches_without_batch_statistics_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode the size of a micro-batch does not change the gradients: float64, so to its rounding."""
    models = []
    monkeypatch.setattr(imagenet_training, "build_imagenet_model", lambda *_: frozen())
    for micro_batch in (8, 2):
        recipe = dataclasses.replace(RECIPE, ranks=1, micro_batch=micro_batch, epochs=1, average=0.5)
        models.append(train(recipe, OFF).model)
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12), name


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, CLASSES, dtype=torch.float64)
        self.bn = nn.BatchNorm2d(3, affine=False)  # a site, as every policy needs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn.eval()
        return self.linear(self.bn(x).double().flatten(1))


def frozen() -> nn.Module:
    torch.manual_seed(0)
    return Frozen()


def test_learning_rate() -> None:
    recipe = dataclasses.replace(RECIPE, epochs=6, warmup=2, learning_rate=1.0)
    rates = [recipe.rate(step, 2) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    only_warm = dataclasses.replace(recipe, epochs=1)
    assert [only_warm.rate(step, 2) for step in range(2)] == [0.25, 0.5]


@pytest.mark.parametrize("average", [0.1, 0.75])
def test_averages_follow_the_weights_and_the_statistics(average: float) -> None:
    recipe = dataclasses.replace(RECIPE, ranks=1, micro_batch=8, epochs=1, learning_rate=1.0, warmup=1)
    weights: list[dict[str, torch.Tensor]] = []
    step = torch.optim.SGD.step

    def observed(self: torch.optim.SGD, closure: Any = None) -> None:
        step(self)
        weights.append({"fc": self.param_groups[0]["params"][-1].detach().clone()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", observed)
        averaged = train(dataclasses.replace(recipe, average=average), OFF).model
    assert len(weights) == 2
    decay = min(average, 2 / 11)  # the first weights are taken as they are, and after one update 0.75 would be too slow
    expected = decay * weights[0]["fc"] + (1 - decay) * weights[1]["fc"]
    assert torch.allclose(dict(averaged.named_parameters())["fc.bias"], expected, rtol=1e-6, atol=1e-8)
    plain = train(recipe, OFF).model
    assert torch.equal(dict(plain.named_parameters())["fc.bias"], weights[1]["fc"])
    assert not torch.equal(averaged.bn1.running_mean, plain.bn1.running_mean)


def test_the_digest_knows_every_bit_and_name() -> None:
    model = frozen()
    before = weights_digest(model)
    assert before == weights_digest(copy.deepcopy(model))
    with torch.no_grad():
        model.get_buffer("bn.running_mean")[0] += 1e-30
    assert weights_digest(model) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 3}, "batch_size must be a multiple of micro_batch * ranks = 3 * 2, got 8"),
        (
            {"ranks": 1, "micro_batch": 20, "batch_size": 20},
            "batch_size must be at most 19, the training images, got 20",
        ),
        ({}, "ranks must be 1, the processes of this group, got 2"),
        ({"ranks": 1, "model": "vgg"}, "model must be one of resnet11, resnet50, "),
        ({"ranks": 1, "augment": "flip"}, "augment must be one of none, resized_crop_flip, "),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train(dataclasses.replace(RECIPE, **change), OFF)
