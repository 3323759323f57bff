"""The compared methods: each is a policy of one strength, put on the network by the same `apply_policy`.

The strengths tried are our choice: three for every method, spread around the values that are usual for it.
"""

from __future__ import annotations

from pathlib import Path

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Policy
from autodropout import Site
from autodropout import load_policy
from autodropout.policy import shipped_policies

from .text_files import printable

# Rates for the classical methods; for autodropout one factor on the sizes of tiles and the rates of other patterns.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (),
    "dropout": (0.05, 0.1, 0.2),
    "spatialdropout": (0.05, 0.1, 0.2),
    "dropblock": (0.05, 0.1, 0.2),
    "stochasticdepth": (0.1, 0.2, 0.4),
    "autodropout": (0.5, 1.0, 1.5),
}
METHODS = tuple(STRENGTHS)
OFF = Policy.uniform(None)
UNKNOWN = "of unknown origin"


def method_policy(method: str, strength: float | None, blocks: int, block_size: int, learned: Policy) -> Policy:
    """The policy of `method` at `strength` (None for "none", which has nothing to tune).

    Dropout, SpatialDropout and DropBlock act on the outputs of all batch normalisations, as the learned policy does:
    what differs is the pattern, not the place. Stochastic depth acts on the residual branches of the `blocks` blocks,
    the branch at relative depth d being dropped with probability strength * d (Huang et al. 2016).

    Args:
        method: one of METHODS.
        strength: a rate in [0, 1], or the factor that scales the patterns of `learned`.
        blocks: residual blocks of the network.
        block_size: side of DropBlock's blocks in cells.
        learned: the policy of "autodropout" at strength 1.

    Raises:
        ValueError: an unknown method, or a strength outside the pattern's range.
    """
    if method not in STRENGTHS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if (strength is None) != (method == "none"):
        raise ValueError(f"strength must be a number, and None for the method none; got {strength} for {method}")
    if strength is None:
        return OFF
    if method == "dropout":
        return Policy.uniform(BernoulliPattern(strength, shared="none"))
    if method == "spatialdropout":
        return Policy.uniform(BernoulliPattern(strength, shared="map"))
    if method == "dropblock":
        return Policy.uniform(BlockPattern(strength, block_size))
    if method == "autodropout":
        return learned.scaled(strength)
    depths = [block / max(blocks - 1, 1) for block in range(blocks)]
    return Policy(
        tuple(
            Site(f"block{i}", d, "branch", BernoulliPattern(strength * d, shared="sample") if d > 0 else None)
            for i, d in enumerate(depths)
        )
    )


def method_label(method: str, policy_name: str, origin: str) -> str:
    """How the table and the plot call the method; `origin`: of the policy of "autodropout", see `policy_origin`."""
    learned = f"AutoDropout ({policy_name}, {origin})"
    labels = {
        "none": "none",
        "dropout": "Dropout",
        "spatialdropout": "SpatialDropout",
        "dropblock": "DropBlock",
        "stochasticdepth": "Stochastic depth",
        "variational": "Variational dropout",
        "supervised": "supervised",
        "augmented": "supervised, strongly augmented",
        "uda": "UDA",
    }
    if method.startswith("uda+"):
        return f"UDA + {labels.get(method.removeprefix('uda+'), learned)}"
    return labels.get(method, learned)


def policy_origin(policy: Policy) -> str:
    """In a few words whether a search has found the policy, which its provenance says and not its name."""
    found, scaled = policy.provenance, ""
    try:
        while "scaled_by" in found or "fitted_to" in found:  # what `scaled` and `fit` write
            scaled = ", scaled" if "scaled_by" in found else scaled
            found = found["from"]
        if found.get("kind") == "searched":
            origin = f"searched with the recipe {found['recipe']['name']}, {found['trials']['proposed']} trials"
        else:
            origin = "hand-made, not searched" if found.get("kind") == "hand-made" else UNKNOWN
        return origin + scaled
    except (KeyError, TypeError, AttributeError):  # a file may have anything there
        return UNKNOWN


def open_policy(name_or_path: str) -> tuple[str, Policy]:
    """The policy and the name under which the table shows it: a shipped name, or a file's name without its ending.

    Raises:
        ValueError: neither a shipped policy nor a file, or not a valid policy.
        OSError: the file cannot be read.
    """
    policy = load_policy(name_or_path)
    return (name_or_path if name_or_path in shipped_policies() else printable(Path(name_or_path).stem)), policy
