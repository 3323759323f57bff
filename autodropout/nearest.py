"""From which site of a policy a site of a model takes its pattern: from that of its name, or from the nearest in depth.

All here is about the sites of one place.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import TypeVar

from torch import nn

from .patterns import Pattern
from .policy import LAYER_PLACES
from .policy import Policy
from .policy import Site
from .sites import STACKS
from .sites import ModelSite
from .sites import candidates

AnySite = TypeVar("AnySite", Site, ModelSite)

# Components of paths that come and go with a wrapper: DDP and averaged models, `torch.compile`, checkpoints, FSDP1.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# Modules of the library between a user's line and a warning.
BETWEEN = frozenset(f"{__package__}.{name}" for name in ("nearest", "apply", "fit", "policy"))


def by_name(sources: tuple[Site, ...], targets: tuple[ModelSite, ...], model: nn.Module) -> dict[str, Site] | None:
    """By the name of each target its site of the policy, if the policy is one of this very model; else None.

    It is if it names all targets, and what else it names are modules of the model that the example did not reach: names
    that the model lacks are those of a larger relative, whose policy moves by depth.

    Raises:
        ValueError: a pattern at a module that is no site, reached or not, where it would do nothing.
    """
    for key in (str, _unwrapped):
        given = {key(site.name): site for site in sources}
        found = {key(site.name): site for site in targets}
        others = {name.partition(":")[0] for name in given.keys() - found.keys()}
        unambiguous = len(given) == len(sources) and len(found) == len(targets)
        if unambiguous and found.keys() <= given.keys() and others <= {key(name) for name, _ in model.named_modules()}:
            sites = {key(name) for name in candidates(model, targets[0].place)}
            _check_none_at([site for name, site in given.items() if name not in found.keys() | sites])
            return {target.name: given[name] for name, target in found.items()}
    return None


def _check_none_at(sources: Iterable[Site]) -> None:
    for site in sources:
        if site.pattern is not None:
            raise ValueError(
                f"pattern must be None at {site.name!r}, which is no site of place {site.place!r}, got {site.pattern!r}"
            )


def by_depth(sources: tuple[Site, ...], targets: tuple[ModelSite, ...], place: str) -> dict[str, Pattern | None]:
    """By name the pattern of the nearest site, of the target's own stack where policy and model have both stacks."""
    given, found = _by_stack(sources, place), _by_stack(targets, place)
    patterns: dict[str, Pattern | None] = {}
    for stack, members in found.items():
        own = given.get(stack, sources) if len(found) > 1 else sources
        policy = Policy(tuple(own))
        patterns |= {target.name: policy.pattern_at(target.depth) for target in members}
    return patterns


def warn_of_names(sources: tuple[Site, ...], targets: tuple[ModelSite, ...], model: nn.Module) -> None:
    """Patterns go by depth though the policy speaks of this model by name: misspelt, or of some of its sites only."""
    place = targets[0].place
    given = {_unwrapped(site.name) for site in sources}
    found = {_unwrapped(site.name) for site in targets}
    wrong, missing = sorted(given - found), sorted(found - given)
    if len(given) == len(found) > 2 * len(wrong):
        _warn(
            f"patterns go by depth, as the policy names the sites of place {place!r} otherwise than the model: "
            f"{', '.join(wrong)} for {', '.join(missing)}"
        )
    elif _of_a_whole_model(sources, place):
        return
    elif missing and len(given) >= 2 * len(wrong):
        _warn(
            f"patterns go by depth, as the policy names only {len(given & found)} of the {len(found)} sites of place "
            f"{place!r}; one that names all of them, with pattern None where nothing is dropped, is applied by name"
        )
    elif strange := _inside(model, wrong) if missing else wrong:
        _warn(
            f"patterns go by depth, as the policy names what is no site of place {place!r} of the model: "
            f"{', '.join(strange)}"
        )


def _inside(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of names of sites those inside a module of this model that has a name too: meant for it, and misspelt."""
    modules = {_unwrapped(name) for name, _ in model.named_modules()} - {""}
    return [name for name in names if name.partition(":")[0].rpartition(".")[0] in modules]


def _warn(message: str) -> None:
    """At the line that called the library; how many frames lie between depends on the version of Python, too."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__") in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _of_a_whole_model(sources: tuple[Site, ...], place: str) -> bool:
    """Whether the depths are those of all sites of some model: a relative's, which has the names too, moves unasked."""
    return len(sources) > 1 and all(
        abs(site.depth - position / max(1, len(members) - 1)) < 1e-9
        for members in _by_stack(sources, place).values()
        for position, site in enumerate(sorted(members, key=lambda site: site.depth))
    )


def _by_stack(sites: Iterable[AnySite], place: str) -> dict[str, list[AnySite]]:
    """The sites that have depths from 0 to 1 among themselves: of each stack, or under "" all, see sites.py."""
    stacks: dict[str, list[AnySite]] = {}
    for site in sites:
        stacks.setdefault(next((part for part in site.name.split(".") if part in STACKS), ""), []).append(site)
    return stacks if place in LAYER_PLACES and set(STACKS) <= stacks.keys() else {"": list(sites)}


def _unwrapped(name: str) -> str:
    """Without the components of wrappers; what follows the colon is the place, see `ModelSite`."""
    path, colon, place = name.partition(":")
    return ".".join(part for part in path.split(".") if part not in WRAPPERS) + colon + place
