"""The compared methods on Transformers: policies in the layers, and dropout of the model's own outside them.

All methods act in the layers by a policy, put there by the same `apply_policy`. Outside them, on embedded words and, in
a language model, on what the last layer gives, which are no places of a policy, they act by dropout of the model's own.
Which places, and the strengths that are tried, are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout.patterns.token import MAX_SPAN

# Rates for the classical methods; for autodropout one factor on the rates of its policy's patterns.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (),
    "dropout": (0.1, 0.2, 0.3),
    "variational": (0.1, 0.2, 0.3),
    "autodropout": (0.5, 1.0, 1.5),
}
METHODS = tuple(STRENGTHS)
OFF = Policy.uniform(None)
# Of AutoDropout at strength 1.
OUTSIDE_RATE = 0.2


@dataclass(frozen=True)
class Outside:
    """Dropout outside the layers."""

    rate: float = 0.0
    variational: bool = False


def method_policy(method: str, strength: float | None, learned: Policy) -> tuple[Policy, Outside]:
    """The policy of a method at a strength, and the dropout outside the layers.

    - `"dropout"`: at the weights of attention, the two outputs and the hidden layer of the feed-forward part, and
      outside, at the same rate: where Transformer-XL's own code has it.
    - `"variational"`: one decision a channel for all words of a segment (Gal & Ghahramani 2016), at the same places but
      the weights of attention, where it would drop a query's whole row.
    - `"autodropout"`: the learned policy, its rates times strength; outside, dropout at 0.2 times strength.

    Args:
        method: one of METHODS.
        strength: None for "none", else a rate or the factor.
        learned: the policy of "autodropout" at strength 1.

    Raises:
        ValueError: an unknown method, or a strength out of range.
    """
    if method not in STRENGTHS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if (strength is None) != (method == "none"):
        raise ValueError(f"strength must be a number, and None for the method none; got {strength} for {method}")
    if strength is None:
        return OFF, Outside()
    if method == "autodropout":
        return learned.scaled(strength), Outside(OUTSIDE_RATE * strength)
    outputs = ("output", "feed_forward", "residual")
    if method == "variational":
        return _everywhere(outputs, TokenPattern(MAX_SPAN, rate=strength, share_t=True)), Outside(strength, True)
    return _everywhere(("softmax", *outputs), TokenPattern(1, rate=strength)), Outside(strength)


def _everywhere(places: tuple[str, ...], pattern: TokenPattern) -> Policy:
    return Policy(tuple(Site(place, 0.0, place, pattern) for place in places))
