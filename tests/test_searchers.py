"""The searchers that come with the package: the contract, and what each of them promises."""

import importlib
import random
import sys
from collections import Counter

import pytest

from autodropout.search.core import Search
from autodropout.search.evolution import EvolutionSearcher
from autodropout.search.evolution import mutated
from autodropout.search.random_search import RandomSearcher
from autodropout.search.searcher import Sample
from autodropout.search.searchers import SEARCHERS
from autodropout.search.searchers import make_searcher
from autodropout.search.space import Token
from autodropout.search.testing import PlaceholderSpace
from autodropout.search.testing import SearcherContract
from autodropout.search.testing import contract_spaces
from autodropout.search.testing import play
from autodropout.search.testing import zeros
from autodropout.search.tpe import TPESearcher

NESTED = contract_spaces()[1]


class TestRandom(SearcherContract):
    def make(self, space, seed):
        return make_searcher("random", space, seed)


class TestEvolution(SearcherContract):
    def make(self, space, seed):
        return make_searcher("evolution", space, seed, population=12, tournament=4)


class TestTPE(SearcherContract):
    def make(self, space, seed):
        return make_searcher("tpe", space, seed)


class TestController(SearcherContract):
    def make(self, space, seed):
        return make_searcher("controller", space, seed)


def test_random_is_uniform():
    """Chi-squared of the nine ways of the first site, each token uniform where it is asked; alpha = 0.001."""
    searcher = RandomSearcher(NESTED, 1)
    count = 3000
    sites = Counter(searcher.propose(number).choices[:5] for number in range(count))
    expected = {(0, 0, 0, 0, 0): 1 / 3, (1, 0, 0, 0, 0): 1 / 6}
    expected |= {(1, 0, 1, 0, stride): 1 / 24 for stride in range(4)}
    expected |= {(2, rate, 0, 0, 0): 1 / 9 for rate in range(3)}
    assert sum(expected.values()) == pytest.approx(1)
    assert set(sites) == set(expected)
    chi2 = sum((sites[site] - count * p) ** 2 / (count * p) for site, p in expected.items())
    assert chi2 < 26.12  # 8 degrees of freedom


def test_random_trials_do_not_depend_on_each_other():
    one, other = RandomSearcher(NESTED, 4), RandomSearcher(NESTED, 4)
    backwards = [other.propose(number) for number in reversed(range(20))]
    assert [one.propose(number) for number in range(20)] == backwards[::-1]


def neighbours(choices):
    """All that one mutation can lead to, from the definition: one asked token changes, dependents follow."""
    tokens = NESTED.tokens
    asked = NESTED.asked(choices)
    result = set()
    for i, token in enumerate(tokens):
        for value in range(len(token.values)) if asked[i] else ():
            if value == choices[i]:
                continue
            fillings = [[*choices[:i], value]]
            for j in range(i + 1, len(tokens)):
                now_asked = [NESTED.asked([*filling, 0])[-1] for filling in fillings]
                fillings = [
                    [*filling, new]
                    for filling, is_asked in zip(fillings, now_asked, strict=True)
                    for new in ([0] if not is_asked else [choices[j]] if asked[j] else range(len(tokens[j].values)))
                ]
            result |= {tuple(filling) for filling in fillings}
    return result


def test_mutation_reaches_all_neighbours_and_no_others():
    generator = random.Random(0)
    for _ in range(5):
        parent = NESTED.sample(generator)
        children = {mutated(NESTED, parent, generator) for _ in range(1500)}
        assert children == neighbours(parent)


def test_mutation_draws_token_and_value_uniformly():
    space = PlaceholderSpace("two", [Token(0, "a", (0, 1)), Token(0, "b", (0, 1, 2, 3)), Token(0, "c", (0,))])
    generator = random.Random(1)
    children = Counter(mutated(space, (0, 2, 0), generator) for _ in range(3000))
    expected = {(1, 2, 0): 1500, (0, 0, 0): 500, (0, 1, 0): 500, (0, 3, 0): 500}
    assert set(children) == set(expected)
    assert sum((children[c] - n) ** 2 / n for c, n in expected.items()) < 16.27  # 3 degrees of freedom, alpha = 0.001


def test_evolution_begins_at_random_and_goes_on_with_children_of_the_best():
    searcher = EvolutionSearcher(NESTED, 0, population=10, tournament=10)
    generator = random.Random(3)
    first = [searcher.propose(number).choices for number in range(10)]
    assert first == [NESTED.sample(random.Random(f"evolution/0/{number}")) for number in range(10)]
    for number, choices in enumerate(first):
        searcher.update([Sample(number, choices, None, 5.0 if number == 6 else generator.random(), 0)])
    for number in range(10, 40):
        assert searcher.propose(number).choices in neighbours(first[6])


def test_evolution_forgets_the_old_however_good():
    searcher = EvolutionSearcher(NESTED, 0, population=4, tournament=4)
    best, other = (0,) * 15, NESTED.sample(random.Random(5))
    searcher.update([Sample(0, best, None, 100.0, 0)])
    for number in range(1, 4):
        searcher.update([Sample(number, other, None, float(number), 0)])
    assert searcher.propose(10).choices in neighbours(best)
    searcher.update([Sample(4, other, None, 0.0, 0)])
    assert searcher.propose(11).choices in neighbours(other)
    assert searcher.state_dict()["alive"] == [[reward, list(other)] for reward in (1.0, 2.0, 3.0, 0.0)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("evolution", {"population": 0, "tournament": 1}, r"population must be an integer in \[1, \d+\], got 0"),
        ("evolution", {"population": 2.5}, r"population must be an integer in .* got 2.5 of type float"),
        ("evolution", {"population": 5, "tournament": 0}, r"tournament must be an integer in \[1, 5\], got 0"),
        ("evolution", {"population": 5, "tournament": 6}, r"tournament must be an integer in \[1, 5\], got 6"),
        ("evolution", {"tournament": "a"}, r"tournament must be an integer in \[1, 50\], got 'a' of type str"),
        ("evolution", {"seed": 1.5}, r"seed must be an integer in .* got 1.5 of type float"),
        ("evolution", {"seed": 2**64}, r"seed must be an integer in .* got 18446744073709551616"),
        ("random", {"seed": 1.5}, r"seed must be an integer in .* got 1.5 of type float"),
        ("tpe", {"startup": 0}, r"startup must be an integer in \[1, \d+\], got 0"),
        ("tpe", {"startup": 1.5}, r"startup must be an integer in .* got 1.5 of type float"),
        ("tpe", {"seed": "a"}, r"seed must be an integer in .* got 'a' of type str"),
    ],
)
def test_arguments_are_named(name, settings, message):
    with pytest.raises(TypeError if " of type " in message else ValueError, match=f"^{message}$"):
        make_searcher(name, NESTED, **settings)


def test_tpe_asks_optuna_in_order():
    searcher = TPESearcher(NESTED, 0)
    with pytest.raises(ValueError, match="number must be 0"):
        searcher.propose(1)


def test_tpe_does_not_propose_the_same_to_all_who_wait():
    searcher = TPESearcher(NESTED, 0)
    search = Search(searcher)
    play(search, 40)
    assert len({search.ask().choices for _ in range(8)}) > 3


def test_tpe_says_nothing(capfd):
    """Optuna's log is neither written to nor changed."""
    import optuna

    before = optuna.logging.get_verbosity()
    play(Search(TPESearcher(NESTED, 0)), 15)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize(("name", "trials"), [("evolution", 200), ("tpe", 80), ("controller", 200)])
def test_those_who_learn_come_near_the_best(name, trials):
    """The share of zeros, which is the reward, in 50 proposals after so many trials."""
    space = PlaceholderSpace("line", [Token(0, f"t{i}", (0, 1, 2, 3)) for i in range(6)])
    search = Search(make_searcher(name, space, 0))
    play(search, trials)
    late = [zeros(search.ask().choices) for _ in range(50)]
    assert sum(late) / len(late) > 0.5  # random: 0.25 with a standard error of 0.025


def test_names():
    for name in SEARCHERS:
        searcher = make_searcher(name, NESTED, 3)
        assert type(searcher).__name__.lower() == f"{name}searcher"
        assert searcher.settings()["seed"] == 3
        settings = {key: value for key, value in searcher.settings().items() if key != "seed"}
        assert make_searcher(name, NESTED, 3, **settings).settings() == searcher.settings()


def test_unknown_names_and_settings():
    with pytest.raises(ValueError, match="searcher must be one of controller, random, evolution, tpe, got 'grid'"):
        make_searcher("grid", NESTED)
    with pytest.raises(ValueError, match="settings of the searcher evolution are population, tournament, got 'size'"):
        make_searcher("evolution", NESTED, size=3)
    with pytest.raises(ValueError, match="settings of the searcher random are none, got 'population'"):
        make_searcher("random", NESTED, population=3)


def test_optuna_is_needed_by_those_who_use_it_only(monkeypatch):
    for module in ("searchers", "tpe"):
        monkeypatch.delitem(sys.modules, f"autodropout.search.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)  # importing it raises ImportError
    fresh = importlib.import_module("autodropout.search.searchers")
    fresh.make_searcher("random", NESTED)
    fresh.make_searcher("evolution", NESTED)
    with pytest.raises(ImportError, match="the searcher tpe needs Optuna: pip install 'autodropout.search.'"):
        fresh.make_searcher("tpe", NESTED)
