"""The asynchronous core and the base class of spaces: queues, ages, updates, errors, state."""

from __future__ import annotations

import ast
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from search_toys import ToySearcher
from search_toys import ToySpace

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout.search import core
from autodropout.search import searcher
from autodropout.search import space
from autodropout.search.core import Search
from autodropout.search.core import Update
from autodropout.search.space import Token


def search(batch_size: int = 2, direction: str = "max", seed: int = 0) -> Search:
    return Search(ToySearcher(ToySpace(), seed, batch_size), direction)


def test_updates_take_the_oldest_results_in_the_order_of_telling() -> None:
    """A slow trial holds up nothing, and its age counts the updates since it was proposed."""
    it = search(batch_size=2)
    trials = [it.ask() for _ in range(5)]
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert it.tell(3, 0.5) is None
    assert it.tell(1, 0.25) == Update(0, (3, 1), (0, 0), {"reward": [0.5, 0.25]})
    late = it.ask()
    assert (late.number, late.update) == (5, 1)
    assert it.tell(5, 1.0) is None
    assert it.tell(0, 2.0) == Update(1, (5, 0), (0, 1), {"reward": [1.0, 2.0]})
    assert list(it.unfinished) == [2, 4]
    assert (it.asked, it.updates, it.finished) == (6, 2, [])


def test_rewards_of_a_minimised_metric_are_its_negative() -> None:
    it = search(batch_size=1, direction="min")
    it.ask()
    update = it.tell(0, 3.0)
    assert update is not None
    assert update.figures == {"reward": [-3.0]}


def test_failed_trials_take_part_in_no_update_and_the_searcher_is_told() -> None:
    it = search(batch_size=2)
    for _ in range(3):
        it.ask()
    it.fail(1)
    assert isinstance(it.searcher, ToySearcher)
    assert it.searcher.lost == 1
    assert it.tell(0, 1.0) is None
    update = it.tell(2, 1.0)
    assert update is not None
    assert update.trials == (0, 2)


@pytest.mark.parametrize("call", ["tell", "fail"])
@pytest.mark.parametrize(("number", "state"), [(0, "told or failed already"), (1, "told or failed already")])
def test_a_trial_ends_once(call: str, number: int, state: str) -> None:
    it = search()
    it.ask()
    it.ask()
    it.tell(0, 1.0)
    it.fail(1)
    before = it.state_dict()
    with pytest.raises(KeyError, match=state):
        it.tell(number, 1.0) if call == "tell" else it.fail(number)
    assert it.state_dict() == before


@pytest.mark.parametrize("number", [-1, 1, 7])
def test_trials_that_were_never_asked_are_refused(number: int) -> None:
    it = search()
    it.ask()
    with pytest.raises(KeyError, match="never asked"):
        it.tell(number, 1.0)
    with pytest.raises(KeyError, match="never asked"):
        it.fail(number)


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf, 1.1e100, -1.1e100])
def test_metrics_that_are_not_finite_or_too_large_are_refused_and_change_nothing(metric: float) -> None:
    it = search()
    it.ask()
    before = it.state_dict()
    message = f"metric must be in [-1e+100, 1e+100], got {metric} for trial 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        it.tell(0, metric)
    assert it.state_dict() == before


def test_the_largest_metrics_are_taken() -> None:
    it = search(batch_size=2)
    it.ask()
    it.ask()
    it.tell(0, 1e100)
    update = it.tell(1, -1e100)
    assert update is not None
    assert update.figures == {"reward": [1e100, -1e100]}


def test_directions_other_than_max_and_min_are_refused() -> None:
    with pytest.raises(ValueError, match="direction must be one of 'max', 'min', got 'up'"):
        Search(ToySearcher(ToySpace()), "up")


def walk(it: Search, generator: random.Random, steps: int) -> list[Any]:
    """Random asks, tells and fails, with a metric that depends on the trial alone; returns what came back."""
    seen: list[Any] = []
    for _ in range(steps):
        action = generator.random()
        if action < 0.5 or not it.unfinished:
            seen.append(it.ask())
        elif action < 0.9:
            number = generator.choice(sorted(it.unfinished))
            seen.append(it.tell(number, math.sin(number)))
        else:
            number = generator.choice(sorted(it.unfinished))
            it.fail(number)
            seen.append(("failed", number))
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_a_search_goes_on_from_its_state_as_if_it_had_not_stopped(seed: int) -> None:
    whole = search(batch_size=3, seed=seed)
    generator = random.Random(seed)
    walk(whole, generator, 100)
    resumed = search(batch_size=3, seed=seed)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.state_dict() == whole.state_dict()
    random_state = generator.getstate()
    expected = walk(whole, generator, 100)
    generator.setstate(random_state)
    assert walk(resumed, generator, 100) == expected
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_is_a_copy() -> None:
    it = search()
    it.ask()
    state = it.state_dict()
    it.tell(0, 1.0)
    assert [trial["number"] for trial in state["unfinished"]] == [0]
    assert state["finished"] == []


@pytest.mark.parametrize("module", [core, searcher, space])
def test_the_core_knows_no_processes_files_or_clocks(module: Any) -> None:
    """By an allow list: whatever else it comes to import must be thought about."""
    allowed = {"__future__", "abc", "collections.abc", "dataclasses", "hashlib", "json", "math", "random", "typing"}
    ours = {"core", "searcher", "space", "policy"}
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.module in (ours if node.level else allowed)
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else None
            assert called not in ("open", "__import__", "exec", "eval")


# The base class of spaces, seen through the toy one: tokens on, rate, on, rate.


def test_asked_follows_the_earlier_choices_and_takes_prefixes() -> None:
    toy = ToySpace()
    assert toy.asked([1, 2, 0, 0]) == [True, True, True, False]
    assert toy.asked([0, 0, 1]) == [True, False, True]
    assert toy.asked([]) == []


def test_tokens_behind_one_that_is_not_asked_are_not_asked() -> None:
    class Chain(ToySpace):
        def __init__(self) -> None:
            tokens = [
                Token(0, "a", (False, True)),
                Token(0, "b", (1, 2), when=(0, (1,))),
                Token(0, "c", (1, 2), when=(1, (0,))),
            ]
            super(ToySpace, self).__init__(tokens)

    assert Chain().asked([0, 0, 0]) == [True, False, False]  # b is 0, but was not asked
    assert Chain().asked([1, 0, 1]) == [True, True, True]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([1, 0, 0], "choices must be 4, one a token, got 3"),
        ([1, 4, 0, 0], r"choices\[1\] \(rate of site 0\) must be in \[0, 4\), got 4"),
        ([2, 0, 0, 0], r"choices\[0\] \(on of site 0\) must be in \[0, 2\), got 2"),
        ([1, -1, 0, 0], r"choices\[1\] .* must be in \[0, 4\), got -1"),
        ([1, 3, 0, 1], r"choices\[3\] \(rate of site 1\) must be in \[0, 1\), as the token is not asked .*, got 1"),
    ],
)
def test_check_names_the_offending_choice(choices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToySpace().check(choices)


def test_check_returns_a_tuple_of_plain_integers() -> None:
    checked = ToySpace().check([True, 3, 0, 0])
    assert checked == (1, 3, 0, 0)
    assert [type(choice) for choice in checked] == [int] * 4


def test_samples_are_sequences_and_uniform_over_asked_tokens() -> None:
    """Pearson's test of the 5 x 5 = 25 sequences against their exact probabilities, at alpha = 1e-6, fixed seed."""
    toy = ToySpace()
    generator = random.Random(7)
    draws = 4000
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        choices = toy.check(toy.sample(generator))
        counts[choices] = counts.get(choices, 0) + 1
    site = {(0, 0): 1 / 2, **{(1, rate): 1 / 8 for rate in range(4)}}
    expected = {a + b: draws * p * q for a, p in site.items() for b, q in site.items()}
    assert set(counts) <= set(expected)
    statistic = sum((counts.get(choices, 0) - mean) ** 2 / mean for choices, mean in expected.items())
    assert statistic < 72.3  # the upper 1e-6 point of chi-squared with 24 degrees of freedom is 72.23


def test_sequences_and_policies_correspond() -> None:
    toy = ToySpace()
    policies = set()
    for first in [(0, 0), *((1, rate) for rate in range(4))]:
        for second in [(0, 0), *((1, rate) for rate in range(4))]:
            policy = toy.decode((*first, *second))
            assert toy.encode(policy) == (*first, *second)
            policies.add(policy)
    assert len(policies) == 25


def test_encode_refuses_policies_outside_the_space() -> None:
    with pytest.raises(ValueError, match="choices must be 4"):
        ToySpace().encode(Policy.uniform(BernoulliPattern(0.1)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one token"),
        ([("a", None), ("b", (1, (0,)))], r"tokens\[1\].when must name an earlier token, got 1"),
        ([("a", None), ("b", (-1, (0,)))], r"tokens\[1\].when must name an earlier token, got -1"),
        ([("a", None), ("b", (0, ()))], r"tokens\[1\].when must hold choices in \[0, 2\)"),
        ([("a", None), ("b", (0, (2,)))], r"tokens\[1\].when must hold choices in \[0, 2\), got \(2,\)"),
    ],
)
def test_tokens_are_checked(tokens: list[Any], message: str) -> None:
    class Any_(ToySpace):  # noqa: N801
        def __init__(self) -> None:
            super(ToySpace, self).__init__([Token(0, kind, (0, 1), when) for kind, when in tokens])

    with pytest.raises(ValueError, match=message):
        Any_()


@pytest.mark.parametrize("values", [(), (1, 1), ("a", "b", "a")])
def test_values_of_a_token_differ(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="values must"):
        Token(0, "a", values)


def test_values_of_different_types_differ() -> None:
    assert Token(0, "a", (False, 0, 0.0, 1, True)).values == (False, 0, 0.0, 1, True)


def test_fingerprints_tell_spaces_apart() -> None:
    assert ToySpace(2).fingerprint() == ToySpace(2).fingerprint()
    assert ToySpace(2).fingerprint() != ToySpace(3).fingerprint()
    assert len(ToySpace().fingerprint()) == 16
