"""The shipped recipes: spaces without data, trainings that are those of the tables, validation images only."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout.policy import Site
from autodropout.reproduce import proxy
from autodropout.reproduce.data import open_data
from autodropout.reproduce.recipes import cifar10
from autodropout.reproduce.recipes import cifar10_small
from autodropout.reproduce.recipes import digits
from autodropout.reproduce.recipes import language_model
from autodropout.reproduce.table2_cifar import PRESETS
from autodropout.reproduce.training import train_model
from autodropout.search.conv_space import KINDS
from autodropout.search.conv_space import ConvSpace
from autodropout.search.recipe import find_recipe
from autodropout.search.recipe import load_recipe
from autodropout.search.recipe import shipped_recipes

ALL = {"cifar10": cifar10, "cifar10_small": cifar10_small, "digits": digits, "language_model": language_model}
CPU = torch.device("cpu")


def nothing(step: int, value: float) -> None:
    pass


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits recipe with 5 epochs, and reports every 2."""
    monkeypatch.setattr(digits, "RECIPE", dataclasses.replace(digits.RECIPE, epochs=5))
    monkeypatch.setattr(digits, "REPORT_EVERY", 2)


def test_all_are_found_by_name() -> None:
    assert set(shipped_recipes()) == set(ALL)
    for name, module in ALL.items():
        recipe = load_recipe(find_recipe(name))
        assert (recipe.name, recipe.direction) == (name, "min" if module is language_model else "max")
        assert recipe.path == Path(module.__file__ or "").resolve()


@pytest.mark.parametrize(("module", "sites", "side"), [(cifar10_small, 25, 32), (digits, 7, 8)])
def test_spaces_need_no_data(
    module: ModuleType, sites: int, side: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTODROPOUT_DATA", str(tmp_path))
    before = torch.get_rng_state()
    space = module.space()
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(space, ConvSpace)
    assert len(space.conv_sites) == sites  # two for each block, and the last normalisation
    assert space.conv_sites[0].side == side
    assert space.kinds == (KINDS if module is digits else None)
    # Whatever is proposed fits the network.
    for seed in range(3):
        policy = space.decode(space.sample(random.Random(seed)))
        assert space.encode(policy) == space.sample(random.Random(seed))


def test_digits_is_the_demo_of_table_2() -> None:
    demo = PRESETS["demo"]
    data = open_data("digits", demo.train_images, demo.valid_images or 0)
    assert dataclasses.replace(demo.recipe, augment=data.augment) == digits.RECIPE
    assert (demo.train_images, demo.valid_images) == (digits.TRAIN_IMAGES, digits.VALID_IMAGES)


def test_cifar10_is_the_papers_proxy() -> None:
    assert (cifar10.TRAIN_IMAGES, cifar10.VALID_IMAGES) == (45_000, 5_000)  # a tenth of 50,000 held out
    assert dataclasses.replace(cifar10.RECIPE, epochs=40, batch_size=50) == cifar10_small.RECIPE
    assert (cifar10.RECIPE.depth, cifar10.RECIPE.width) == (28, 2)
    paper = PRESETS["paper"].recipe
    assert dataclasses.replace(cifar10.RECIPE, width=paper.width, augment=paper.augment) == paper


@pytest.mark.usefixtures("short")
def test_digits_measures_validation_images() -> None:
    policy = Policy((Site("group1.0.bn1", 0.0, pattern=BernoulliPattern(0.2)),))
    threads = torch.get_num_threads()
    reports: list[tuple[int, float]] = []
    metric = digits.train(policy, 3, lambda step, value: reports.append((step, value)))
    assert torch.get_num_threads() == threads
    data = open_data("digits", 100, 500)
    with proxy.one_thread():
        expected = train_model(digits.RECIPE, policy, data.train, data.valid, 10, 3, CPU).accuracy
    assert metric == expected
    assert [step for step, _ in reports] == [2, 4]
    assert all(0 <= value <= 1 for _, value in reports)
    assert digits.train(policy, 4, nothing) != metric  # the seed counts


def test_measuring_in_between_changes_no_weight(tmp_path: Path) -> None:
    recipe = dataclasses.replace(digits.RECIPE, epochs=3)
    data = open_data("digits", 50, 100)
    policy = Policy.uniform(BernoulliPattern(0.2))
    weights = []
    for name, on_accuracy in (("a", None), ("b", nothing)):
        path = tmp_path / name
        with proxy.one_thread():
            train_model(recipe, policy, data.train, data.valid, 10, 1, CPU, path, on_accuracy=on_accuracy)
        weights.append(torch.load(path, weights_only=True)["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("short")
def test_a_report_can_end_a_training() -> None:
    class Stop(BaseException):
        pass

    def stop(step: int, value: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        digits.train(Policy.uniform(None), 0, stop)


def test_cifar10_says_where_data_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AUTODROPOUT_DATA", raising=False)
    with pytest.raises(ValueError, match="set AUTODROPOUT_DATA to a folder with train.parquet"):
        cifar10.train(Policy.uniform(None), 0, nothing)
    monkeypatch.setenv("AUTODROPOUT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="has neither train.parquet nor cifar10/train.parquet"):
        cifar10_small.train(Policy.uniform(None), 0, nothing)


def test_the_recipe_of_the_document_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/search.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    recipe = load_recipe(path)
    space = recipe.space()
    assert isinstance(space, ConvSpace)
    assert len(space.conv_sites) == 3
    reported: list[tuple[int, float]] = []
    nothing = Policy(tuple(Site(site.name, site.depth, pattern=None) for site in space.conv_sites))
    metric = recipe.train(nothing, 0, lambda step, value: reported.append((step, value)))
    assert [step for step, _ in reported] == [25, 50, 75, 100]
    assert reported[-1][1] == metric > 0.5
