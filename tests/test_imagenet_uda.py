"""UDA on several processes: against a twin on one, repeated, continued from every checkpoint; and what it reads.

One run of two processes (gloo, on the CPU) makes all observations; the tests read them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchvision.transforms import v2
from watched_labels import Watched

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout import apply_policy
from autodropout.apply import SiteDropout
from autodropout.reproduce import group
from autodropout.reproduce.augment import derive
from autodropout.reproduce.imagenet_data import TensorImages
from autodropout.reproduce.imagenet_training import Normalise
from autodropout.reproduce.imagenet_training import TrainedModel
from autodropout.reproduce.imagenet_training import build_imagenet_model
from autodropout.reproduce.imagenet_training import example_input
from autodropout.reproduce.imagenet_training import weights_digest
from autodropout.reproduce.imagenet_uda import FewLabels
from autodropout.reproduce.imagenet_uda import ImageNetUdaRecipe
from autodropout.reproduce.imagenet_uda import epoch_steps
from autodropout.reproduce.imagenet_uda import hide_labels
from autodropout.reproduce.imagenet_uda import steps_per_epoch
from autodropout.reproduce.imagenet_uda import train_uda_imagenet
from autodropout.reproduce.imagenet_uda_task import imagenet_method_recipe
from autodropout.reproduce.models.imagenet import DEMO
from autodropout.reproduce.uda import consistency_loss
from autodropout.reproduce.uda import supervised_loss
from autodropout.reproduce.uda_training import Step
from autodropout.reproduce.uda_training import step_loss

RANKS, CLASSES, SEED, LABELS = 2, 3, 5, 11
CPU = torch.device("cpu")
# 2 steps an epoch, of 2 micro-batches of 2 labelled and 4 unlabelled images on each of 2 ranks; left over are 3
# labelled and 3 unlabelled images.
RECIPE = ImageNetUdaRecipe(
    DEMO,
    3,
    8,
    2,
    RANKS,
    0.05,
    1,
    1e-4,
    None,
    "none",
    unlabelled=2,
    strong_augment="randaugment",
    weight=2.0,
    temperature=0.5,
    confidence=0.34,
    annealing="linear",
)
AVERAGED = dataclasses.replace(RECIPE, average=0.7)
ALONE = dataclasses.replace(RECIPE, ranks=1)
OFF = Policy.uniform(None)
MASKED = Policy.uniform(BernoulliPattern(0.3, "none"))

Seen = dict[str, Any]


def images(count: int) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


TRAIN = images(LABELS + 35)
DATA = hide_labels(TRAIN, LABELS, SEED)


def train(recipe: ImageNetUdaRecipe, policy: Policy, checkpoint: Path | None = None, **hooks: Any) -> TrainedModel:
    return train_uda_imagenet(recipe, policy, DATA, CLASSES, SEED, CPU, checkpoint, **hooks)


def masks_of_first_site(seen: list[torch.Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Which cells the first site keeps, call by call, whether masked or not."""

    def look(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if isinstance(module, SiteDropout) and output.shape[1:] == (64, 16, 16):
            seen.append(output.detach() != 0)

    return nn.modules.module.register_module_forward_hook(look)


def observe(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    seen: Seen = {"plain": train(RECIPE, OFF).model.state_dict()}
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
    seen["files"] = sorted(file.name for file in own.iterdir())
    seen["continued"] = []
    for done in (0, 1, 2):
        continued = train(AVERAGED, MASKED, own / f"{done}.pt" if done else None)
        seen["continued"].append((continued.loss, weights_digest(continued.model)))
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


def shuffled(count: int, *words: object) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(*words)))


def distorted(image: torch.Tensor, seed: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result: torch.Tensor = v2.RandAugment()(image)
    return result


def twin() -> nn.Module:
    """The same training by one process, from the text of the recipe: the gradients of all micro-batches are computed
    one after the other, and the statistics of batch normalisation are those of rank 0's."""
    model, normalise = build_imagenet_model(RECIPE, CLASSES, SEED), Normalise(CPU)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=RECIPE.weight_decay, nesterov=True)
    rows = shuffled(len(TRAIN), SEED, "labels")
    kept, hidden = rows[:LABELS].sort().values, rows[LABELS:].sort().values
    for number in range(6):
        epoch, step = divmod(number, 2)
        # 8 of the 11 labelled images fill a step, so a pass over them is one step and the second has another order.
        own = kept[shuffled(LABELS, derive(SEED, epoch, "labelled"), step, "order")[:8]].view(2, RANKS, 2)
        place = torch.arange(16 * step, 16 * step + 16).view(2, RANKS, 4)
        other = hidden[shuffled(35, derive(SEED, "unlabelled"), epoch, "order")][place]
        rate = 0.05 * (number + 1) / 2 if number < 2 else 0.05 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 4))
        threshold = number / 6 * (1 - 1 / CLASSES) + 1 / CLASSES
        sums: list[list[torch.Tensor]] = []
        for rank in reversed(range(RANKS)):
            network = copy.deepcopy(model) if rank > 0 else model
            network.train()
            network.zero_grad()
            for part in range(2):
                weak, chosen = TRAIN.images[other[part, rank]], own[part, rank]
                seeds = [derive(derive(SEED, epoch, "strong"), int(position)) for position in place[part, rank]]
                strong = torch.stack([distorted(image, seed) for image, seed in zip(weak, seeds, strict=True)])
                with torch.no_grad():
                    teacher = network(normalise(weak))
                scores = network(normalise(torch.cat((TRAIN.images[chosen], strong))))
                loss = supervised_loss(scores[:2], TRAIN.labels[chosen], threshold)
                loss = loss + 2.0 * consistency_loss(scores[2:], teacher, 0.5, 0.34)
                (loss / 2).backward()
            sums.append([parameter.grad / RANKS for parameter in network.parameters()])
        for parameter, *gradients in zip(model.parameters(), *sums, strict=True):
            parameter.grad = gradients[0] + gradients[1]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return model


@pytest.mark.slow
def test_two_ranks_end_in_the_weights_of_a_twin_on_one(seen: list[Seen]) -> None:
    # Halves of gradients are exact, and a sum of two is the same in any order: not even the last bit may differ.
    expected = twin().state_dict()
    for rank in range(RANKS):
        assert seen[rank]["plain"].keys() == expected.keys()
        assert all(torch.equal(seen[rank]["plain"][name], value) for name, value in expected.items())


@pytest.mark.slow
def test_the_teacher_has_no_masks_and_those_of_the_student_differ_between_ranks_and_steps(seen: list[Seen]) -> None:
    calls = RECIPE.epochs * 2 * RECIPE.accumulated
    masks: list[torch.Tensor] = []
    for rank in range(RANKS):
        of_rank = seen[rank]["masks"]
        # The teacher looks at 4 images, then the student at 2 + 4 others.
        assert [len(mask) for mask in of_rank] == [4, 6] * calls
        assert all(bool(mask.all()) for mask in of_rank[::2])
        masks += of_rank[1::2]
    assert len({mask.numpy().tobytes() for mask in masks}) == 2 * calls
    # Independent masks of rate 0.3 agree in 0.58 of their cells; agreement by one seed would be 1. 12 * 98,304 cells: a
    # standard deviation of 0.0005.
    agreement = torch.stack(
        [(a == b).double().mean() for a, b in zip(masks[:calls], masks[calls:], strict=True)]
    ).mean()
    assert abs(float(agreement) - (0.3**2 + 0.7**2)) < 0.003


@pytest.mark.slow
def test_it_repeats_and_every_checkpoint_goes_on_to_the_same_weights(seen: list[Seen]) -> None:
    assert seen[0]["files"] == ["1.pt", "2.pt", "3.pt", "model.pt"]
    assert seen[1]["files"] == []
    assert math.isfinite(seen[0]["loss"])
    for rank in range(RANKS):
        assert (seen[rank]["loss"], seen[rank]["digest"]) == (seen[0]["loss"], seen[0]["digest"])
        assert seen[rank]["continued"] == [(seen[0]["loss"], seen[0]["digest"])] * 3


def test_hidden_labels_are_never_read() -> None:
    labels = Watched(TRAIN.labels)
    data = hide_labels(TensorImages(TRAIN.images, labels), LABELS, SEED)  # type: ignore[arg-type]
    recipe = dataclasses.replace(ALONE, epochs=1, micro_batch=8)
    trained = train_uda_imagenet(recipe, MASKED, data, CLASSES, SEED, CPU)
    assert labels.read == set(shuffled(len(TRAIN), SEED, "labels")[:LABELS].tolist())
    assert torch.equal(data.unlabelled.labels, torch.arange(35))
    # And whatever the hidden labels are, the training is the same.
    wrong = TRAIN.labels.clone()
    wrong[data.unlabelled.indices] = CLASSES - 1 - wrong[data.unlabelled.indices]
    other = hide_labels(TensorImages(TRAIN.images, wrong), LABELS, SEED)
    again = train_uda_imagenet(recipe, MASKED, other, CLASSES, SEED, CPU)
    assert weights_digest(again.model) == weights_digest(trained.model)


def steps_of(recipe: ImageNetUdaRecipe, seed: int, epoch: int, data: FewLabels = DATA) -> list[Step]:
    return list(epoch_steps(recipe, data, seed, epoch, workers=0))


def test_steps_are_a_function_of_seed_and_epoch() -> None:
    def flat(seed: int, epoch: int) -> list[torch.Tensor]:
        return [tensor for step in steps_of(ALONE, seed, epoch) for tensor in vars(step).values()]

    first = flat(0, 1)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = flat(0, 1)
    assert torch.equal(torch.get_rng_state(), before), "the default generator belongs to the masks"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (flat(1, 1), flat(0, 2)):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert not torch.equal(first[3], other[3])


def test_ranks_and_micro_batches_share_out_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(recipe: ImageNetUdaRecipe) -> dict[str, Counter[bytes]]:
        found = {"images": Counter[bytes](), "weak": Counter[bytes](), "strong": Counter[bytes]()}
        for rank in range(recipe.ranks):
            monkeypatch.setattr(group, "rank", lambda rank=rank: rank)
            for step in steps_of(recipe, 0, 0):
                for name, seen in found.items():
                    seen.update(image.numpy().tobytes() for image in getattr(step, name))
        return found

    whole = together(dataclasses.replace(ALONE, micro_batch=8))
    assert together(RECIPE) == whole
    assert whole["images"].total() == 16
    assert len(whole["weak"]) == whole["weak"].total() == 32
    hidden = {image.numpy().tobytes() for image in TRAIN.images[DATA.unlabelled.indices]}
    assert set(whole["weak"]) < hidden
    assert not set(whole["strong"]) <= hidden


def test_supervised_training_sees_the_same_labelled_images_in_as_many_steps() -> None:
    recipe = dataclasses.replace(ALONE, micro_batch=8)
    for with_, without in zip(
        steps_of(recipe, 0, 1), steps_of(dataclasses.replace(recipe, weight=0.0), 0, 1), strict=True
    ):
        assert without.weak is without.strong is None
        assert torch.equal(without.images, with_.images)
        assert torch.equal(without.labels, with_.labels)


def test_labelled_images_alone_come_in_as_large_micro_batches_as_fit() -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=48, micro_batch=2, unlabelled=4)  # 24 a rank; 10 at once
    supervised, augmented, uda = (imagenet_method_recipe(m, 0.5, recipe) for m in ("supervised", "augmented", "uda"))
    assert supervised == dataclasses.replace(recipe, weight=0.0, learning_rate=0.025, micro_batch=8)
    assert augmented == dataclasses.replace(supervised, augment="randaugment")
    assert uda == dataclasses.replace(recipe, weight=0.5)
    few = dataclasses.replace(recipe, batch_size=4, micro_batch=1, unlabelled=30)
    assert imagenet_method_recipe("supervised", 1.0, few).micro_batch == 2


def test_every_parameter_has_its_gradient_under_autocast() -> None:
    """The teacher's pass must not leave weights without a gradient in autocast's cache."""
    model = build_imagenet_model(RECIPE, CLASSES, SEED)
    apply_policy(model, MASKED, example=example_input(RECIPE, CPU))
    (step, *_) = steps_of(RECIPE, SEED, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step_loss(model.train(), step, dataclasses.replace(RECIPE, confidence=0.0), 1.0, Normalise(CPU))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "message"),
    [
        (7, 100, "the 7 labelled images must be at least those of a step, 8"),
        (8, 15, "the 15 unlabelled images must be at least those of a step, 16"),
    ],
)
def test_too_few_images_for_a_step(labelled: int, unlabelled: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        steps_per_epoch(RECIPE, labelled, unlabelled)


def test_the_number_of_ranks_is_checked() -> None:
    with pytest.raises(ValueError, match="^ranks must be 1, the processes of this group, got 2$"):
        train(RECIPE, OFF)
