"""Search spaces small enough to enumerate."""

from __future__ import annotations

from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace
from autodropout.search.space import Token
from autodropout.search.testing import PlaceholderSpace


def conditional() -> PlaceholderSpace:
    """Two sites; three kinds, one of them with two value sets; tokens that others leave out, also at second hand."""
    return PlaceholderSpace(
        "conditional",
        [
            Token(0, "op", ("off", "tiled", "rate")),
            Token(0, "size", (1, 2, 3, 4), when=(0, (1, 2))),
            Token(0, "share", (False, True), when=(1, (0, 3))),
            Token(3, "op", ("off", "tiled", "rate")),
            Token(3, "size", (1, 2, 3), when=(3, (1,))),
            Token(3, "share", (False,)),
        ],
    )


def sites(count: int) -> PlaceholderSpace:
    """`count` sites of four tokens, three of them asked only where the first is not "off"."""
    tokens: list[Token] = []
    for site in range(count):
        first = len(tokens)
        tokens.append(Token(site, "op", ("off", "a", "b")))
        tokens += [Token(site, f"value {kind}", tuple(range(4)), when=(first, (1, 2))) for kind in range(3)]
    return PlaceholderSpace("sites", tokens)


def arms(*counts: int) -> PlaceholderSpace:
    """Independent tokens, each of a kind of its own."""
    return PlaceholderSpace("arms", [Token(site, str(site), tuple(range(count))) for site, count in enumerate(counts)])


def every_sequence(space: SearchSpace) -> list[Choices]:
    """All sequences of the space, in lexicographical order."""
    prefixes: list[Choices] = [()]
    for token in space.tokens:
        prefixes = [
            (*prefix, choice)
            for prefix in prefixes
            for choice in range(len(token.values) if space.asked([*prefix, 0])[-1] else 1)
        ]
    return prefixes
