"""The training loop: what it computes, and that continuing from a checkpoint is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout.files import write_atomically
from autodropout.reproduce import training
from autodropout.reproduce.augment import derive
from autodropout.reproduce.augment import epoch_batches
from autodropout.reproduce.data import Split
from autodropout.reproduce.data import open_data
from autodropout.reproduce.epochs import run_epochs
from autodropout.reproduce.training import Normalise
from autodropout.reproduce.training import Recipe
from autodropout.reproduce.training import build_model
from autodropout.reproduce.training import train_model

CPU = torch.device("cpu")
RECIPE = Recipe(10, 1, epochs=3, batch_size=20, learning_rate=0.1, weight_decay=5e-4, augment="none")
OFF = Policy.uniform(None)
DROPOUT = Policy.uniform(BernoulliPattern(0.1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Such small networks only lose by more, and what a script sets must not reach other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> tuple[Split, Split]:
    opened = open_data("digits", 70, 100)
    return opened.train, opened.valid


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_loop_is_the_stated_recipe(data: tuple[Split, Split], tmp_path: Path) -> None:
    """The same steps, written out: Nesterov momentum and weight decay by hand, cosine per step."""
    train, valid = data
    train_model(RECIPE, OFF, train, valid, 10, seed=3, device=CPU, checkpoint=tmp_path / "c.pt")

    model = build_model(RECIPE, train.images, 10, seed=3).train()
    normalise = Normalise(train.images, CPU)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    step, steps = 0, 3 * (70 // 20)
    for epoch in range(3):
        for images, labels in epoch_batches(train, "none", 3, epoch, 20, CPU):
            rate = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(model(normalise(images)), labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    g = g + 5e-4 * p
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * (g + 0.9 * v))
            step += 1
    assert step == steps
    found = weights(tmp_path / "c.pt")
    for name, value in model.state_dict().items():
        # Two orders of the same float32 operations, nine steps apart.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_learns(data: tuple[Split, Split]) -> None:
    train, valid = data
    recipe = dataclasses.replace(RECIPE, epochs=25)
    # Ten classes by chance: 10% with a standard error of 3% on 100 images.
    assert train_model(recipe, OFF, train, valid, 10, seed=0, device=CPU).accuracy > 0.6


class Killed(BaseException):
    pass


@pytest.mark.parametrize("augment", ["none", "flip_crop", "randaugment"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_killed_training_continues_bit_for_bit(
    data: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str, epoch: int
) -> None:
    train, valid = data
    recipe = dataclasses.replace(RECIPE, augment=augment)
    through = train_model(recipe, DROPOUT, train, valid, 10, 5, CPU, tmp_path / "through.pt")

    batches = training.epoch_batches

    def die(split: Split, augment: str, seed: int, number: int, *rest: object) -> object:
        for i, batch in enumerate(batches(split, augment, seed, number, *rest)):
            if number == epoch and i == 1:
                raise Killed
            yield batch

    monkeypatch.setattr(training, "epoch_batches", die)
    with pytest.raises(Killed):
        train_model(recipe, DROPOUT, train, valid, 10, 5, CPU, tmp_path / "killed.pt")
    assert torch.load(tmp_path / "killed.pt", weights_only=True)["epoch"] == epoch
    trained: list[int] = []

    def count(split: Split, augment: str, seed: int, number: int, *rest: object) -> object:
        trained.append(number)
        return batches(split, augment, seed, number, *rest)

    monkeypatch.setattr(training, "epoch_batches", count)
    torch.manual_seed(99)
    torch.rand(3)
    told: list[None] = []
    outcome = train_model(
        recipe, DROPOUT, train, valid, 10, 5, CPU, tmp_path / "killed.pt", on_epoch=lambda: told.append(None)
    )
    assert trained == list(range(epoch, 3)), "at most the epoch in training is lost"
    assert len(told) == 3
    assert outcome.accuracy == through.accuracy
    expected, found = weights(tmp_path / "through.pt"), weights(tmp_path / "killed.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_finished_checkpoint_is_only_evaluated(data: tuple[Split, Split], tmp_path: Path) -> None:
    train, valid = data
    first = train_model(RECIPE, DROPOUT, train, valid, 10, 5, CPU, tmp_path / "c.pt")
    contents = (tmp_path / "c.pt").read_bytes()
    assert train_model(RECIPE, DROPOUT, train, valid, 10, 5, CPU, tmp_path / "c.pt") == first
    assert (tmp_path / "c.pt").read_bytes() == contents


def test_seed_gives_the_weights_and_the_images_whatever_the_policy(
    data: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = data
    seen: dict[tuple[int, Policy], list[int]] = {}
    batches = training.epoch_batches
    for seed, policy in ((1, OFF), (1, DROPOUT), (2, OFF)):
        rows = seen[seed, policy] = []

        def watch(split: Split, *rest: object, rows: list[int] = rows) -> object:
            for images, labels in batches(split, *rest):
                rows.extend(images.flatten(1).long().sum(1).tolist())
                yield images, labels

        monkeypatch.setattr(training, "epoch_batches", watch)
        train_model(RECIPE, policy, train, valid, 10, seed, CPU)
    assert seen[1, OFF] == seen[1, DROPOUT] != seen[2, OFF]
    one, same, other = (build_model(RECIPE, train.images, 10, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["stem.weight"], other["stem.weight"])


def test_policy_takes_part_in_training(data: tuple[Split, Split], tmp_path: Path) -> None:
    train, valid = data
    for name, policy in (("off", OFF), ("on", DROPOUT)):
        train_model(RECIPE, policy, train, valid, 10, 5, CPU, tmp_path / name)
    off, on = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert off.keys() == on.keys()
    assert not torch.equal(off["fc.weight"], on["fc.weight"])


def test_normalised_training_images_have_mean_0_and_variance_1() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 5, 5), dtype=torch.uint8)
    images[:, 1] = images[:, 1] // 4 + 100
    images[:, 2] = 7  # constant: mean 0, and no division by zero
    out = Normalise(images, CPU)(images).double()
    assert out.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert out.var((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-5)


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, lambda file: file.write(b"old"))

    def torn(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, torn)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_masks_of_different_epochs_and_seeds_differ() -> None:
    assert len({derive(seed, epoch, "masks") for seed in range(9) for epoch in range(9)}) == 81


def test_epochs_are_told_when_they_are_done(tmp_path: Path) -> None:
    """A progress bar that counted them as they began would stand at its end for the whole of the last."""
    told: list[object] = []
    part = torch.nn.Linear(1, 1)
    run_epochs(2, told.append, {"model": part}, 0, CPU, tmp_path / "a.pt", lambda: told.append("done"))
    run_epochs(3, told.append, {"model": part}, 0, CPU, tmp_path / "a.pt", lambda: told.append("done"))
    assert told == [0, "done", 1, "done", "done", "done", 2, "done"]
