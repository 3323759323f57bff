"""What the tests of both kinds of search space share."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from autodropout import Policy
from autodropout import load_policy
from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace

BINS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
PAGE = Path(__file__).parent.parent / "docs" / "search-space.md"


def sequences(space: SearchSpace) -> Iterator[tuple[Choices, Fraction]]:
    """Every sequence of a space, written from the definition in space.py, and its probability when asked uniformly."""

    def extend(
        choices: tuple[int, ...], asked: tuple[bool, ...], share: Fraction
    ) -> Iterator[tuple[Choices, Fraction]]:
        position = len(choices)
        if position == len(space.tokens):
            yield choices, share
            return
        token = space.tokens[position]
        if token.when is not None and not (asked[token.when[0]] and choices[token.when[0]] in token.when[1]):
            yield from extend((*choices, 0), (*asked, False), share)
            return
        for choice in range(len(token.values)):
            yield from extend((*choices, choice), (*asked, True), share / len(token.values))

    yield from extend((), (), Fraction(1))


def check_every_sequence(space: SearchSpace, count: int) -> None:
    """There are so many sequences; their policies all differ, and each is encoded as the sequence it came from."""
    seen = [choices for choices, _ in sequences(space)]
    assert len(seen) == count
    policies = [space.decode(choices) for choices in seen]
    assert len(set(policies)) == count
    assert [space.encode(policy) for policy in policies] == seen


def check_random_sequences(space: SearchSpace, count: int, folder: Path) -> None:
    """encode(decode(s)) == s, decode(encode(p)) == p, and the same by way of a policy file."""
    generator = random.Random(4)
    for number in range(count):
        choices = space.sample(generator)
        policy = space.decode(choices)
        assert space.encode(policy) == choices
        assert space.decode(space.encode(policy)) == policy
        if number < 20:
            policy.save(folder / "policy.json")
            assert space.encode(load_policy(folder / "policy.json")) == choices
        else:
            assert space.encode(Policy.from_json(json.loads(json.dumps(policy.to_json())))) == choices


def check_json(space: SearchSpace) -> None:
    """`to_json` is JSON as it comes back from a file, and holds every token."""
    data = space.to_json()
    assert json.loads(json.dumps(data)) == data
    assert [(t["site"], t["kind"], t["values"]) for t in data["tokens"]] == [
        (token.site, token.kind, list(token.values)) for token in space.tokens
    ]
    assert [t["when"] for t in data["tokens"]] == [
        None if token.when is None else [token.when[0], list(token.when[1])] for token in space.tokens
    ]


def distribution(rates: Sequence[tuple[float | None, Fraction]]) -> str:
    """The end of a row of the tables in docs/search-space.md: off, bins and quantiles of the rates where on."""
    off = sum(share for rate, share in rates if rate is None)
    on = sorted((rate, share / (1 - off)) for rate, share in rates if rate is not None)
    edges = (-1.0, *BINS, 1.0)  # what is on may still drop nothing: tiles can miss the cells of a tiny map
    bins = [sum(s for rate, s in on if low < rate <= high) for low, high in itertools.pairwise(edges)]
    quantiles = []
    for level in (Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)):
        below = Fraction(0)
        for rate, share in on:
            below += share
            if below >= level:
                quantiles.append(rate)
                break
    cells = [f"{float(off):.0%}", *(f"{float(share) * 100:.0f}" for share in bins), *(f"{q:.2f}" for q in quantiles)]
    return " | ".join([*cells, f"{on[-1][0]:.2f}"])


def check_row(*cells: object) -> None:
    row = f"| {' | '.join(map(str, cells))} |"
    if row not in PAGE.read_text(encoding="utf-8").splitlines():
        pytest.fail(f"docs/search-space.md must hold the row {row}")
