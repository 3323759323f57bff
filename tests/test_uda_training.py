"""UDA's training: what a step computes, that hidden labels stay hidden, and that continuing is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watched_labels import Watched

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout import apply_policy
from autodropout.nn import PatternDropout
from autodropout.reproduce import uda_training
from autodropout.reproduce.data import Split
from autodropout.reproduce.data import open_data
from autodropout.reproduce.training import Normalise
from autodropout.reproduce.training import build_model
from autodropout.reproduce.training import example_input
from autodropout.reproduce.uda_training import FewLabels
from autodropout.reproduce.uda_training import Step
from autodropout.reproduce.uda_training import UdaRecipe
from autodropout.reproduce.uda_training import epoch_steps
from autodropout.reproduce.uda_training import hide_labels
from autodropout.reproduce.uda_training import patterns_off
from autodropout.reproduce.uda_training import steps_per_epoch
from autodropout.reproduce.uda_training import train_uda

CPU = torch.device("cpu")
RECIPE = UdaRecipe(
    depth=10,
    width=1,
    epochs=3,
    batch_size=10,
    learning_rate=0.1,
    weight_decay=5e-4,
    augment="none",
    unlabelled_batch=20,
    strong_augment="affine+cutout",
    weight=2.0,
    temperature=0.5,
    confidence=0.2,
    annealing="linear",
)
OFF = Policy.uniform(None)
DROPOUT = Policy.uniform(BernoulliPattern(0.2))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Such small networks only lose by more, and what a script sets must not reach other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    opened = open_data("digits", 75, 100)
    return opened.train, opened.valid


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def numbers(images: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(image.flatten().tolist()) for image in images]


def test_loop_is_the_stated_recipe(splits: tuple[Split, Split], tmp_path: Path) -> None:
    """The same steps written out, without anything of uda.py: the loss from its definition, the optimiser by hand."""
    train, valid = splits
    data = hide_labels(train, 25, seed=3)
    train_uda(RECIPE, OFF, data, valid, 10, seed=3, device=CPU, checkpoint=tmp_path / "c.pt")

    images = torch.cat((data.labelled.images, data.unlabelled))
    normalise = Normalise(images, CPU)
    model = build_model(RECIPE, images, 10, seed=3).train()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    number, total = 0, 3 * (50 // 20)
    for epoch in range(3):
        for step in epoch_steps(RECIPE, data, 3, epoch, CPU):
            teacher = model(normalise(step.weak)).detach()
            both = model(normalise(torch.cat((step.images, step.strong))))
            logs = both.log_softmax(1)
            threshold = 0.1 + 0.9 * number / total
            used = [-logs[i, y] for i, y in enumerate(step.labels.tolist()) if logs[i, y].exp().item() <= threshold]
            loss = sum(used) / max(1, len(used))
            for i, row in enumerate(teacher):
                if row.softmax(0).max() > 0.2:
                    target = (row / 0.5).softmax(0)
                    loss = loss + 2.0 / 20 * (target * (target.log() - logs[10 + i])).sum()
            rate = 0.1 * (1 + math.cos(math.pi * number / total)) / 2
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    g = g + 5e-4 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * (g + 0.9 * v))
            number += 1
    assert number == total
    found = weights(tmp_path / "c.pt")
    for name, value in model.state_dict().items():
        # Two orders of the same float32 operations, six steps apart.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_without_weight_it_is_supervised_training_in_as_many_steps(
    splits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=0)
    plain = dataclasses.replace(RECIPE, weight=0.0)
    steps = [list(epoch_steps(recipe, data, 0, 1, CPU)) for recipe in (plain, RECIPE)]
    assert len(steps[0]) == len(steps[1]) == steps_per_epoch(RECIPE, len(data.unlabelled)) == 2
    for without, with_ in zip(*steps, strict=True):
        assert without.weak is without.strong is None
        assert torch.equal(without.images, with_.images)
        assert torch.equal(without.labels, with_.labels)

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("a supervised training has no consistency term")

    monkeypatch.setattr(uda_training, "consistency_loss", never)
    train_uda(plain, OFF, data, valid, 10, seed=0, device=CPU)


def test_hidden_labels_are_never_read(splits: tuple[Split, Split], tmp_path: Path) -> None:
    train, valid = splits
    labels = Watched(train.labels)
    data = hide_labels(Split(train.images, labels), 25, seed=1)  # type: ignore[arg-type]
    assert len(labels.read) == 25
    assert [field.name for field in dataclasses.fields(FewLabels)] == ["labelled", "unlabelled"]
    assert type(data.unlabelled) is torch.Tensor
    assert data.unlabelled.dtype == torch.uint8, "images alone: there is nothing left to read"
    # And whatever the hidden labels are, the training is the same.
    kept = torch.zeros(len(train), dtype=torch.bool)
    kept[list(labels.read)] = True
    wrong = Split(train.images, torch.where(kept, train.labels, 9 - train.labels))
    for name, split in (("right", train), ("wrong", wrong)):
        train_uda(RECIPE, DROPOUT, hide_labels(split, 25, seed=1), valid, 10, 1, CPU, tmp_path / name)
    right, same = weights(tmp_path / "right"), weights(tmp_path / "wrong")
    assert all(torch.equal(right[name], same[name]) for name in right)


def test_labelled_and_unlabelled_images_are_all_images_once(splits: tuple[Split, Split]) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=1, more=valid.images)
    assert (len(data.labelled), len(data.unlabelled)) == (25, 50 + 100)
    assert sorted(numbers(data.labelled.images) + numbers(data.unlabelled)) == sorted(
        numbers(train.images) + numbers(valid.images)
    )
    of_image = dict(zip(numbers(train.images), train.labels.tolist(), strict=True))
    assert [of_image[image] for image in numbers(data.labelled.images)] == data.labelled.labels.tolist()
    others = [set(numbers(hide_labels(train, 25, seed).labelled.images)) for seed in range(4)]
    assert len(set(map(frozenset, others))) == 4


@pytest.mark.parametrize("labels", [0, 75, 80])
def test_number_of_labels(splits: tuple[Split, Split], labels: int) -> None:
    with pytest.raises(ValueError, match=f"labels must be at least 1 and below the 75 training images, got {labels}"):
        hide_labels(splits[0], labels, seed=0)


def test_both_views_are_of_the_same_images_and_one_pass_shows_all() -> None:
    unlabelled = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    unlabelled[:, 0, 3:5, 3:5] = torch.arange(1, 61).view(-1, 1, 1) * 4  # a blob whose brightness is its name
    data = FewLabels(Split(unlabelled[:5], torch.arange(5)), unlabelled)
    recipe = dataclasses.replace(RECIPE, batch_size=2)
    seen: list[int] = []
    steps = list(epoch_steps(recipe, data, 0, 0, CPU))
    for step in steps:
        weak, strong = step.weak.flatten(1).amax(1).long(), step.strong.flatten(1).amax(1).long()
        seen += weak.tolist()
        # Interpolation and cutout only darken: never brighter, and (with this seed) most keep three quarters of it.
        assert (strong <= weak).all()
        assert int((strong > 0.6 * weak).sum()) > len(weak) // 2
        assert not torch.equal(step.weak, step.strong)
    assert sorted(seen) == [4 * name for name in range(1, 61)]
    # Five labelled images in batches of two: every pass shows four of them, each once.
    labels = [step.labels.tolist() for step in steps]
    assert len(labels) == 3
    assert len(set(labels[0] + labels[1])) == 4


def test_steps_are_a_function_of_seed_and_epoch(splits: tuple[Split, Split]) -> None:
    data = hide_labels(splits[0], 25, seed=0)

    def flat(seed: int, epoch: int) -> list[torch.Tensor]:
        return [tensor for step in epoch_steps(RECIPE, data, seed, epoch, CPU) for tensor in vars(step).values()]

    first = flat(0, 1)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = flat(0, 1)
    assert torch.equal(torch.get_rng_state(), before), "the default generator belongs to the masks"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (flat(1, 1), flat(0, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_patterns_off_switches_patterns_alone(splits: tuple[Split, Split]) -> None:
    images = splits[0].images
    model = build_model(RECIPE, images, 10, seed=0)
    apply_policy(model, DROPOUT, example=example_input(images))
    model.train()
    model.group1[0].bn1.pattern_dropout.eval()  # one that was off before stays off after
    before = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with patterns_off(model):
        for module in model.modules():
            assert module.training == (not isinstance(module, PatternDropout))
        model(Normalise(images, CPU)(images))
        assert torch.equal(torch.get_rng_state(), state), "masks that are off draw nothing"
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_teacher_has_no_patterns_and_the_student_sees_all_at_once(
    splits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=0)
    calls: list[tuple[int, bool, bool, bool]] = []
    build = uda_training.build_model

    def watched(*arguments: object) -> nn.Module:
        model = build(*arguments)  # type: ignore[arg-type]

        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
            (dropout,) = {m.training for m in module.modules() if isinstance(m, PatternDropout)}
            (norm,) = {m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d)}
            calls.append((len(inputs[0]), norm, dropout, torch.is_grad_enabled()))

        model.register_forward_hook(note)
        return model

    monkeypatch.setattr(uda_training, "build_model", watched)
    monkeypatch.setattr(uda_training, "example_input", lambda images: None)  # the trace would be noted, too
    train_uda(dataclasses.replace(RECIPE, epochs=1), DROPOUT, data, valid, 10, seed=0, device=CPU)
    training = [call for call in calls if call[1]]
    assert training == [(20, True, False, False), (10 + 20, True, True, True)] * 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("epoch", [1, 2])
def test_killed_training_continues_bit_for_bit(
    splits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=5)
    through = train_uda(RECIPE, DROPOUT, data, valid, 10, 5, CPU, tmp_path / "through.pt")
    steps = uda_training.epoch_steps

    def die(recipe: UdaRecipe, data: FewLabels, seed: int, number: int, *rest: object) -> Iterator[Step]:
        for i, step in enumerate(steps(recipe, data, seed, number, *rest)):  # type: ignore[arg-type]
            if number == epoch and i == 1:
                raise Killed
            yield step

    monkeypatch.setattr(uda_training, "epoch_steps", die)
    with pytest.raises(Killed):
        train_uda(RECIPE, DROPOUT, data, valid, 10, 5, CPU, tmp_path / "killed.pt")
    assert torch.load(tmp_path / "killed.pt", weights_only=True)["epoch"] == epoch
    trained: list[int] = []

    def count(recipe: UdaRecipe, data: FewLabels, seed: int, number: int, *rest: object) -> Iterator[Step]:
        trained.append(number)
        return steps(recipe, data, seed, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(uda_training, "epoch_steps", count)
    torch.manual_seed(99)
    told: list[None] = []
    outcome = train_uda(
        RECIPE, DROPOUT, data, valid, 10, 5, CPU, tmp_path / "killed.pt", on_epoch=lambda: told.append(None)
    )
    assert trained == list(range(epoch, 3)), "at most the epoch in training is lost"
    assert len(told) == 3
    assert outcome.accuracy == through.accuracy
    expected, found = weights(tmp_path / "through.pt"), weights(tmp_path / "killed.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_unlabelled_images_change_what_is_learnt(splits: tuple[Split, Split], tmp_path: Path) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=5)
    other = FewLabels(data.labelled, data.unlabelled.flip(3))
    for name, given in (("one", data), ("other", other)):
        train_uda(RECIPE, OFF, given, valid, 10, 5, CPU, tmp_path / name)
    assert not torch.equal(weights(tmp_path / "one")["fc.weight"], weights(tmp_path / "other")["fc.weight"])


def test_cross_entropy_of_the_labelled_images_falls(splits: tuple[Split, Split], tmp_path: Path) -> None:
    train, valid = splits
    data = hide_labels(train, 25, seed=5)
    recipe = dataclasses.replace(RECIPE, epochs=20)
    train_uda(recipe, OFF, data, valid, 10, 5, CPU, tmp_path / "c.pt")
    model = build_model(recipe, train.images, 10, seed=5)
    model.load_state_dict(weights(tmp_path / "c.pt"))
    images = torch.cat((data.labelled.images, data.unlabelled))
    scores = model.eval()(Normalise(images, CPU)(data.labelled.images))
    assert F.cross_entropy(scores, data.labelled.labels).item() < 0.5 < math.log(10)
