"""The planted tasks: frozen values, and their optimum against enumeration."""

import itertools
import math
import random
import statistics

import pytest

from autodropout.policy import Policy
from autodropout.reproduce.planted import BASE
from autodropout.reproduce.planted import DEPTH
from autodropout.reproduce.planted import NOISE
from autodropout.reproduce.planted import TASKS
from autodropout.reproduce.planted import PlantedTask
from autodropout.reproduce.planted import kinds
from autodropout.reproduce.planted import neighbours
from autodropout.reproduce.planted import tiles
from autodropout.search.space import Token
from autodropout.search.testing import PlaceholderSpace

# name: fingerprint of the space, optimum, accuracies of the first sequences that Random(7) draws, the sum of 2,000
# more, and the noise of the seeds 0, 1 and 2. Comparisons that were published rest on these.
GOLDEN = {
    "tiles": (
        "965bad73b3c0356a",
        0.9654813394029739,
        [0.809976382395, 0.840641982505, 0.89727822988, 0.886270176345, 0.81798612494, 0.873928300452],
        1719.629541371,
        [-0.001097397582, -0.002206462355, 0.015947799774],
    ),
    "kinds": (
        "eef03edfe184ec9f",
        0.971115592590063,
        [0.908848920536, 0.897229588747, 0.806336348232, 0.818266361286, 0.806492299243, 0.838539058306],
        1681.286231621,
        [-0.014909947877, -0.009270432219, -0.034237367253],
    ),
    "neighbours": (
        "bf7e872a45baced4",
        0.9707583211352738,
        [0.871627357021, 0.877585506022, 0.871501548659, 0.827370300348, 0.875438825456, 0.815023383444],
        1724.984296774,
        [-0.030663542803, 0.014847897828, -0.00320446108],
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_frozen(name):
    fingerprint, optimum, first, total, noise = GOLDEN[name]
    task = TASKS[name]()
    generator = random.Random(7)
    assert task.space.fingerprint() == fingerprint
    assert task.optimum == pytest.approx(optimum, abs=1e-12)
    values = [task.value(task.space.sample(generator)) for _ in range(2008)]
    assert values[:6] == pytest.approx(first, abs=1e-11)
    assert math.fsum(values[8:]) == pytest.approx(total, abs=1e-8)
    assert [task.observe(task.best, seed) - task.optimum for seed in range(3)] == pytest.approx(noise, abs=1e-11)


def sequences(space):
    """Every sequence of a space, from the definition of what is asked."""
    for choices in itertools.product(*(range(len(token.values)) for token in space.tokens)):
        asked = space.asked(choices)
        if all(a or c == 0 for a, c in zip(asked, choices, strict=True)):
            yield choices


def walk(space, choices=()):
    """The same, faster: only canonical beginnings are continued."""
    if len(choices) == len(space.tokens):
        yield choices
        return
    asked = space.asked([*choices, 0])[-1]
    for choice in range(len(space.tokens[len(choices)].values) if asked else 1):
        yield from walk(space, (*choices, choice))


@pytest.mark.parametrize("task", [tiles(1), kinds(2), neighbours(3)], ids=["tiles", "kinds", "neighbours"])
def test_optimum_is_the_best_of_all_sequences(task):
    values = {choices: task.value(choices) for choices in walk(task.space)}
    assert max(values.values()) == pytest.approx(task.optimum, abs=1e-15)
    assert values[task.best] == task.optimum


def test_optimum_with_links_of_both_signs():
    """Three sites of a kind and a strength: effects and links drawn at random, the sum written out once more."""
    for seed in range(20):
        generator = random.Random(seed)
        effects = {(s, k, v): generator.gauss(0, 0.01) for s in range(3) for k in "ab" for v in (0, 1, 2)}
        links = {(s, a, b): generator.gauss(0, 0.02) for s in range(2) for a in "ab" for b in "ab"}
        tokens = [
            token for s in range(3) for token in (Token(s, "kind", ("a", "b")), Token(s, "v", (0, 1, 2), (2 * s, (1,))))
        ]
        task = PlantedTask(
            "toy",
            tokens,
            lambda s, values, effects=effects: effects[s, values["kind"], values.get("v", 0)],
            lambda s, values: values["kind"],
            lambda s, a, b, links=links: links[s, a, b],
        )
        best = -math.inf
        for choices in sequences(task.space):
            sites = [("ab"[choices[2 * s]], choices[2 * s + 1]) for s in range(3)]
            total = sum(effects[s, kind, v] for s, (kind, v) in enumerate(sites))
            total += sum(links[s, sites[s][0], sites[s + 1][0]] for s in range(2))
            value = BASE + (total if total >= 0 else -DEPTH * (1 - math.exp(total / DEPTH)))
            assert task.value(choices) == pytest.approx(value, abs=1e-12)
            best = max(best, value)
        assert task.optimum == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_resemble_what_they_should(name):
    task = TASKS[name]()
    assert task.value([0] * len(task.space.tokens)) == BASE  # everything off
    assert task.optimum > BASE + 0.03
    generator = random.Random(0)
    values = [task.value(task.space.sample(generator)) for _ in range(2000)]
    assert statistics.mean(values) < BASE - 0.04
    assert sum(value > BASE for value in values) < 0.1 * len(values)
    assert min(values) >= BASE - DEPTH


@pytest.mark.parametrize(("name", "lacks"), [("tiles", 0.001), ("kinds", 0.005), ("neighbours", 0.005)])
def test_neighbours_matter(name, lacks):
    """The best of each site by itself, all others off, is not the best sequence."""
    task = TASKS[name]()
    tokens = task.space.tokens
    greedy: list[int] = []
    for site in range(task.space.sites):
        start = len(greedy)
        here = [token for token in tokens if token.site == site]
        moved = [
            Token(t.site, t.kind, t.values, None if t.when is None else (t.when[0] - start, t.when[1])) for t in here
        ]
        rest = len(tokens) - start - len(here)
        candidates = walk(PlaceholderSpace("alone", moved))
        greedy += max(candidates, key=lambda choices: task.value([0] * start + list(choices) + [0] * rest))
    assert task.optimum - task.value(greedy) > lacks


def test_noise():
    """Of the seed alone: paired between sequences. Standard deviation within 5 standard errors, mean within 5."""
    task = neighbours()
    other = task.space.sample(random.Random(1))
    noise = [task.observe(task.best, seed) - task.optimum for seed in range(2000)]
    assert task.observe(other, 5) - task.value(other) == pytest.approx(noise[5], abs=1e-15)
    assert abs(statistics.mean(noise)) < 5 * NOISE / math.sqrt(2000)
    assert abs(statistics.stdev(noise) / NOISE - 1) < 5 / math.sqrt(2 * 2000)


def test_regrets():
    task = neighbours()
    off = (0,) * len(task.space.tokens)
    assert task.simple_regret([off, task.best, off], [0.9, 0.95, 0.95]) == 0
    assert task.simple_regret([off, task.best], [0.9, 0.9]) == task.optimum - BASE  # the earlier of equal ones
    assert task.late_regret([off] * 10 + [task.best] * 50) == pytest.approx(0, abs=1e-15)
    assert task.late_regret([off] * 25 + [task.best] * 25) == pytest.approx((task.optimum - BASE) / 2, abs=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_sequences_and_policies_correspond(name):
    space = TASKS[name]().space
    generator = random.Random(2)
    for _ in range(20):
        choices = space.sample(generator)
        policy = Policy.from_json(space.decode(choices).to_json())
        assert space.encode(policy) == choices
        assert space.decode(space.encode(policy)) == policy


def test_bad_input():
    task = neighbours()
    with pytest.raises(ValueError, match="choices must be 40"):
        task.value(task.best[:-1])
    with pytest.raises(ValueError, match="not asked"):
        task.value((0, 1, *task.best[2:]))
    with pytest.raises(ValueError, match="space neighbours"):
        task.space.encode(kinds().space.decode(kinds().best))
