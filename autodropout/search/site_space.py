"""What the spaces of this package have in common: tokens site by site, each site's tokens describing its pattern."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields
from typing import Any

from ..patterns import Pattern
from ..policy import Policy
from ..policy import Site
from .space import Choices
from .space import SearchSpace
from .space import Token
from .space import Value

Values = Mapping[str, Sequence[Value]]


@dataclass(frozen=True)
class Question:
    """A token of a site before its position is known.

    Args:
        kind, values: as for `Token`.
        of, when: asked only if the site's token of kind `of` was asked and has one of the values `when`.
    """

    kind: str
    values: tuple[Value, ...]
    of: str | None = None
    when: tuple[Value, ...] = ()


class SiteSpace(SearchSpace):
    """A space that describes one site after another.

    A subclass says what the answers at a site mean: `_pattern` and `_answers`, inverse to each other.

    Args:
        sites: names, depths and places; their patterns are None.
        questions: for each site, in the order of choice. A question whose `when` holds every value that can be chosen
            is always asked; one whose `when` holds none of them is left out.

    Raises:
        ValueError: from `Token` or `Policy`.
    """

    def __init__(self, sites: Sequence[Site], questions: Sequence[Sequence[Question]]) -> None:
        self.sites = Policy(tuple(sites)).sites
        tokens: list[Token] = []
        self._positions: list[dict[str, int]] = []
        for index, asked in enumerate(questions):
            positions: dict[str, int] = {}
            for question in asked:
                when = None
                if question.of is not None:
                    earlier = positions[question.of]
                    known = tokens[earlier].values
                    choices = tuple(choice for choice, value in enumerate(known) if value in question.when)
                    if not choices:
                        continue
                    when = None if len(choices) == len(known) and tokens[earlier].when is None else (earlier, choices)
                positions[question.kind] = len(tokens)
                tokens.append(Token(index, question.kind, question.values, when))
            self._positions.append(positions)
        super().__init__(tokens)

    @abstractmethod
    def _pattern(self, answers: dict[str, Value]) -> Pattern | None:
        """The pattern of a site from the answers to the tokens that were asked there, by kind."""

    @abstractmethod
    def _answers(self, pattern: Pattern | None) -> dict[str, Value] | None:
        """What would have been answered for this pattern, by kind; None if it is of a kind that the space lacks."""

    def decode(self, choices: Sequence[int]) -> Policy:
        checked = self.check(choices)
        asked = self.asked(checked)
        sites = []
        for site, positions in zip(self.sites, self._positions, strict=True):
            answers = {kind: self.tokens[at].values[checked[at]] for kind, at in positions.items() if asked[at]}
            sites.append(Site(site.name, site.depth, site.place, self._pattern(answers)))
        return Policy(tuple(sites))

    def encode(self, policy: Policy) -> Choices:
        if len(policy.sites) != len(self.sites):
            raise ValueError(f"sites must be {len(self.sites)}, those of the space, got {len(policy.sites)}")
        choices: list[int] = []
        asked: list[bool] = []
        for index, (site, own) in enumerate(zip(policy.sites, self.sites, strict=True)):
            for field in ("name", "depth", "place"):
                got, wanted = getattr(site, field), getattr(own, field)
                if got != wanted:
                    raise ValueError(f"sites[{index}].{field} must be {wanted!r} in this space, got {got!r}")
            self._encode_site(f"sites[{index}] ({site.name!r})", index, site.pattern, choices, asked)
        return tuple(choices)

    def _encode_site(
        self, where: str, index: int, pattern: Pattern | None, choices: list[int], asked: list[bool]
    ) -> None:
        """Appends the choices of one site, and which of its tokens are asked."""
        answers = self._answers(pattern)
        if answers is None:
            raise ValueError(f"{where}: pattern must be of a kind that the space has, got {pattern!r}")
        given: dict[str, Value] = {}
        for kind, at in self._positions[index].items():
            values, when = self.tokens[at].values, self.tokens[at].when
            asked.append(when is None or (asked[when[0]] and choices[when[0]] in when[1]))
            if not asked[at]:
                choices.append(0)
                continue
            if answers.get(kind) not in values:
                allowed = ", ".join(map(repr, values))
                raise ValueError(f"{where}: {kind} must be one of {allowed}, got {answers.get(kind)!r} in {pattern!r}")
            given[kind] = answers[kind]
            choices.append(values.index(answers[kind]))
        made = self._pattern(given)
        if made is None and pattern is not None:
            raise ValueError(f"{where}: pattern must be None for what drops nothing, got {pattern!r}")
        if made is not None and made != pattern:  # in a field that is not asked for after what was answered
            field = next(f.name for f in fields(made) if getattr(made, f.name) != getattr(pattern, f.name))
            problem = f"{field} must be {getattr(made, field)!r} here, got {getattr(pattern, field)!r}"
            raise ValueError(f"{where}: {problem} in {pattern!r}")

    def _tokens_json(self) -> list[dict[str, Any]]:
        """The tokens as JSON objects."""
        return [
            {
                "site": token.site,
                "kind": token.kind,
                "values": list(token.values),
                "when": None if token.when is None else [token.when[0], list(token.when[1])],
            }
            for token in self.tokens
        ]


def checked_names(values: object, known: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """A user's value sets, by kind of token; what is in them is not looked at yet.

    Raises:
        TypeError, ValueError: not a mapping from some of the known kinds to sequences that are not empty.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping from kinds of tokens to values, got {values!r}")
    result: dict[str, tuple[Value, ...]] = {}
    for kind, chosen in values.items():
        if kind not in known:
            raise ValueError(f"values must be for some of the tokens {', '.join(known)}, got {kind!r}")
        if not isinstance(chosen, Sequence) or isinstance(chosen, str):
            raise TypeError(f"values[{kind!r}] must be a tuple or list, got {chosen!r}")
        if not chosen:
            raise ValueError(f"values[{kind!r}] must hold at least one value, got none")
        result[kind] = tuple(chosen)
    return result
