"""Search spaces: which tokens describe a policy, and which values each may take.

A policy is a sequence of choices, one for each token, in the order in which a controller makes them. A choice is an
index into the values of its token. Tokens that an earlier choice makes meaningless (the rotation of a site that is off)
are not asked: their choice is 0, with probability 1, so that sequences and policies correspond one to one.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..policy import Policy

Value = bool | int | float | str
Choices = tuple[int, ...]


@dataclass(frozen=True)
class Token:
    """One decision of a sequence.

    Args:
        site: the index of the site that it describes.
        kind: what it decides, for example "size"; tokens of a kind share an embedding and a vocabulary in a controller.
        values: what can be chosen; at least one, all different.
        when: (position, choices) of an earlier token: this one is asked only if that one was asked and its choice is
            one of these. None: always asked.

    Raises:
        ValueError: naming the field.
    """

    site: int
    kind: str
    values: tuple[Value, ...]
    when: tuple[int, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"values must hold at least one value, got none for {self.kind!r}")
        if len({(type(value), value) for value in self.values}) < len(self.values):
            raise ValueError(f"values must all differ, got {self.values!r} for {self.kind!r}")


class SearchSpace(ABC):
    """Tokens, and the bijection between their choices and policies. Immutable.

    A subclass hands its tokens to `__init__` and says what a sequence means, in `decode` and `encode`.

    Args:
        tokens: in the order of choice; at least one.

    Raises:
        ValueError: no tokens, or a token whose `when` names no earlier token or a choice that it does not have.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        if not tokens:
            raise ValueError("tokens must hold at least one token, got none")
        for position, token in enumerate(tokens):
            if token.when is not None:
                earlier, choices = token.when
                if not 0 <= earlier < position:
                    raise ValueError(f"tokens[{position}].when must name an earlier token, got {earlier}")
                known = len(tokens[earlier].values)
                if not choices or any(not 0 <= choice < known for choice in choices):
                    raise ValueError(f"tokens[{position}].when must hold choices in [0, {known}), got {choices}")
        self.tokens = tuple(tokens)

    @abstractmethod
    def decode(self, choices: Sequence[int]) -> Policy:
        """The policy of a sequence.

        Raises:
            ValueError: not a sequence of this space, see `check`.
        """

    @abstractmethod
    def encode(self, policy: Policy) -> Choices:
        """The sequence of a policy: `encode(decode(s)) == s`, and `decode(encode(p))` has the sites of p.

        Raises:
            ValueError: a policy that no sequence of this space describes, naming site and field.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What determines the space, as a JSON object: recorded with a search, and compared when it is resumed."""

    def asked(self, choices: Sequence[int]) -> list[bool]:
        """Which of the first `len(choices)` tokens are asked, given these choices; a prefix is enough."""
        result: list[bool] = []
        for token in self.tokens[: len(choices)]:
            when = token.when
            result.append(when is None or (result[when[0]] and choices[when[0]] in when[1]))
        return result

    def check(self, choices: Sequence[int]) -> Choices:
        """The choices as a tuple, if they are a sequence of this space.

        Raises:
            ValueError: the wrong number of choices, one outside its token's values, or one other than 0 for a token
                that is not asked.
        """
        if len(choices) != len(self.tokens):
            raise ValueError(f"choices must be {len(self.tokens)}, one a token, got {len(choices)}")
        for position, (token, choice, asked) in enumerate(zip(self.tokens, choices, self.asked(choices), strict=True)):
            most = len(token.values) if asked else 1
            if not 0 <= choice < most:
                remark = "" if asked else ", as the token is not asked after the earlier choices"
                which = f"choices[{position}] ({token.kind} of site {token.site})"
                raise ValueError(f"{which} must be in [0, {most}){remark}, got {choice}")
        return tuple(int(choice) for choice in choices)

    def sample(self, generator: random.Random) -> Choices:
        """A sequence in which every asked token is uniform over its values."""
        choices: list[int] = []
        asked: list[bool] = []  # built up here, as `asked` begins anew with each token
        for token in self.tokens:
            when = token.when
            asked.append(when is None or (asked[when[0]] and choices[when[0]] in when[1]))
            choices.append(generator.randrange(len(token.values)) if asked[-1] else 0)
        return tuple(choices)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `to_json`."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
