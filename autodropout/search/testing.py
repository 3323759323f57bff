"""The contract of a searcher as tests, for those who write one.

    from autodropout.search.testing import SearcherContract

    class TestMySearcher(SearcherContract):
        def make(self, space, seed):
            return MySearcher(space, seed)

pytest collects what the class inherits. The tests drive searchers through `Search`, as a driver does, on small spaces
with conditions; that a searcher finds anything is not asked of it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..policy import Policy
from ..policy import Site
from .core import LARGEST
from .core import Search
from .core import Trial
from .core import Update
from .searcher import Searcher
from .space import Choices
from .space import SearchSpace
from .space import Token

Event = Trial | Update
Reward = Callable[[Choices], float]


class PlaceholderSpace(SearchSpace):
    """Any tokens. Its policies drop nothing, and carry the choices in their provenance.

    Args:
        name: tells the policies of two such spaces apart.
        tokens: as for every space; sites are numbered from 0.
    """

    def __init__(self, name: str, tokens: Sequence[Token]) -> None:
        super().__init__(tokens)
        self.name = name
        self.sites = max(token.site for token in tokens) + 1

    def decode(self, choices: Sequence[int]) -> Policy:
        sites = tuple(Site(f"site{i}", i / max(self.sites - 1, 1)) for i in range(self.sites))
        return Policy(sites, {"space": self.name, "choices": list(self.check(choices))})

    def encode(self, policy: Policy) -> Choices:
        if policy.provenance.get("space") != self.name:
            raise ValueError(f"policy must be one of the space {self.name}, got {dict(policy.provenance)}")
        return self.check(policy.provenance["choices"])

    def to_json(self) -> dict[str, Any]:
        tokens = [[token.site, token.kind, list(token.values), token.when] for token in self.tokens]
        return {"kind": "placeholder", "name": self.name, "tokens": tokens}


def contract_spaces() -> list[PlaceholderSpace]:
    """Tokens that are always asked; conditions on conditions, and a token of a single value; a single sequence."""
    plain = [Token(site, kind, tuple(range(3 + site))) for site in range(3) for kind in ("size", "stride")]
    nested: list[Token] = []
    for site in range(3):
        first = len(nested)
        nested += [
            Token(site, "kind", ("off", "tiled", "dropout")),
            Token(site, "rate", (0.1, 0.2, 0.3), (first, (2,))),
            Token(site, "size", (0.25, 0.5), (first, (1,))),
            Token(site, "place", ("here",)),
            Token(site, "stride", (0.0, 0.5, 1.0, 2.0), (first + 2, (1,))),
        ]
    single = [Token(0, "kind", ("tiled",)), Token(0, "size", (0.5,), (0, (0,)))]
    return [PlaceholderSpace("plain", plain), PlaceholderSpace("nested", nested), PlaceholderSpace("single", single)]


def zeros(choices: Choices) -> float:
    """A reward for searchers to climb: the share of choices that are 0."""
    return sum(choice == 0 for choice in choices) / len(choices)


def play(
    search: Search,
    trials: int,
    *,
    workers: int = 1,
    seed: int = 0,
    fail_every: int = 0,
    reward: Reward = zeros,
    drain: bool = True,
) -> list[Event]:
    """Drives a search as workers of random speed would, until `trials` are asked and ended; goes on where it stands.

    Args:
        search: asked and told.
        trials: in all.
        workers: trials that are unfinished at a time; which of them ends next is random.
        seed: of that order.
        fail_every: each trial whose number is 1 below a multiple of this fails; 0: none does.
        reward: of a sequence.
        drain: False: stops as soon as the last trial is asked, with others unfinished.

    Returns:
        What was asked and updated, in order.
    """
    events: list[Event] = []
    while search.asked < trials or (drain and search.unfinished):
        while search.asked < trials and len(search.unfinished) < workers:
            events.append(search.ask())
        if search.asked == trials and not drain:
            break
        ended = search.asked - len(search.unfinished)
        number = random.Random(f"{seed}/{ended}").choice(sorted(search.unfinished))
        if fail_every and (number + 1) % fail_every == 0:
            search.fail(number)
            continue
        update = search.tell(number, reward(search.unfinished[number].choices))
        if update is not None:
            events.append(update)
    return events


def same(a: object, b: object) -> bool:
    """Whether two states are equal bit for bit: types, floats (NaN equals NaN, 0.0 differs from -0.0), tensors."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, float):
        return isinstance(b, float) and a.hex() == b.hex()
    return type(a) is type(b) and a == b


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class SearcherContract:
    """Inherit, and say in `make` what is tested.

    Attributes:
        trials: that most tests run; enough for several updates, and for what a searcher does after its beginning.
    """

    trials = 48

    def make(self, space: SearchSpace, seed: int) -> Searcher:
        """A fresh searcher."""
        raise NotImplementedError

    def test_proposes_sequences_of_the_space(self) -> None:
        for space in contract_spaces():
            search = Search(self.make(space, 0))
            for event in play(search, self.trials, workers=4, fail_every=7):
                if isinstance(event, Trial):
                    assert space.check(event.choices) == event.choices
                    assert all(type(choice) is int for choice in event.choices)

    def test_log_probs_are_probabilities_or_none(self) -> None:
        for space in contract_spaces():
            events = play(Search(self.make(space, 0)), self.trials, workers=4)
            log_probs = [event.log_prob for event in events if isinstance(event, Trial)]
            assert all(x is None for x in log_probs) or all(type(x) is float and -math.inf < x <= 0 for x in log_probs)

    def test_same_calls_give_same_proposals_and_state(self) -> None:
        for space in contract_spaces():
            one, other = (Search(self.make(space, 3)) for _ in range(2))
            for until in (self.trials // 2, self.trials):
                # In turns, so that what they share, if anything, would show.
                events = [play(search, until, workers=3, fail_every=5) for search in (one, other)]
                assert events[0] == events[1]
            assert same(one.state_dict(), other.state_dict())

    def test_seeds_differ(self) -> None:
        space = contract_spaces()[1]
        proposals = {self.make(space, seed).propose(0).choices for seed in range(10)}
        assert len(proposals) > 1

    def test_global_random_numbers_are_left_alone(self) -> None:
        space = contract_spaces()[1]
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            runs = []
            for seed in range(2):
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
                states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
                runs.append(play(Search(self.make(space, 0)), self.trials, workers=3, fail_every=5))
                assert states[0] == random.getstate(), "random was used"
                assert states[1] == repr(np.random.get_state()), "numpy.random was used"
                assert torch.equal(states[2], torch.get_rng_state()), "torch's default generator was used"
            assert runs[0] == runs[1], "proposals depend on a global random state"
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])

    def test_state_goes_on_bit_for_bit(self) -> None:
        """At any point, through a file that holds tensors and plain values only, and without touching the original."""
        for space in contract_spaces():
            search = Search(self.make(space, 2))
            whole: list[Event] = []
            saved: list[tuple[int, dict[str, Any]]] = []
            for until in (0, 1, self.trials // 3, self.trials - 5):
                whole += play(search, until, workers=3, fail_every=5, drain=False)
                saved.append((len(whole), _filed(search.state_dict())))
            shared = search.state_dict()  # not copied: what follows must not change it
            kept = copy.deepcopy(shared)
            at = len(whole)
            whole += play(search, self.trials, workers=3, fail_every=5)
            assert same(shared, kept), "state_dict must be a copy"
            for start, state in [*saved, (at, shared)]:
                again = Search(self.make(space, 2))
                again.load_state_dict(state)
                assert play(again, self.trials, workers=3, fail_every=5) == whole[start:]
                assert same(again.state_dict(), search.state_dict())

    def test_updates_take_batches_of_any_age(self) -> None:
        """With more workers than a batch takes, samples are older than an update; figures are JSON, one a sample."""
        space = contract_spaces()[1]
        searcher = self.make(space, 0)
        size = searcher.batch_size
        assert type(size) is int
        assert size >= 1
        events = play(Search(searcher), self.trials, workers=3 * size)
        updates = [event for event in events if isinstance(event, Update)]
        assert len(updates) == self.trials // size
        assert max(age for update in updates for age in update.ages) >= 1 or len(updates) < 2
        for update in updates:
            assert type(update.figures) is dict
            json.dumps(update.figures)
            assert all(len(figure) == size for figure in update.figures.values() if isinstance(figure, list))

    def test_nothing_but_failures(self) -> None:
        for space in contract_spaces():
            search = Search(self.make(space, 0))
            play(search, self.trials, workers=2, fail_every=1)
            assert search.updates == 0
            assert space.check(search.ask().choices)

    def test_any_finite_reward(self) -> None:
        """Equal ones, huge ones, and minus zero: no proposal leaves the space, and no log-probability is NaN."""
        space = contract_spaces()[1]
        rewards: list[Reward] = [
            lambda _: 0.5,
            lambda choices: LARGEST * (2 * zeros(choices) - 1),
            lambda _: -0.0,
            lambda _: -1e-300,
        ]
        for reward in rewards:
            for event in play(Search(self.make(space, 0)), self.trials, workers=2, reward=reward):
                if isinstance(event, Trial):
                    space.check(event.choices)
                    assert event.log_prob is None or -math.inf < event.log_prob <= 0

    def test_settings_make_it_again(self) -> None:
        space = contract_spaces()[1]
        searcher = self.make(space, 5)
        settings = json.loads(json.dumps(searcher.settings(), allow_nan=False))
        assert settings["seed"] == 5
        again = type(searcher)(space, **settings)
        assert again.settings() == searcher.settings()
        assert again.batch_size == searcher.batch_size
        searches = [Search(searcher), Search(again)]
        events = [play(search, self.trials, workers=2) for search in searches]
        assert events[0] == events[1]


def _filed(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a snapshot is: `weights_only` refuses whatever else than tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
