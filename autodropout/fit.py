"""Moves a policy to a model, and says what goes where; `Policy.fit` has the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from dataclasses import replace
from itertools import groupby

from torch import nn

from .apply import check_kind
from .apply import checked_site
from .apply import plan_place
from .nearest import by_name
from .patterns import Pattern
from .patterns import TiledPattern
from .policy import PLACES
from .policy import Policy
from .policy import Site
from .sites import Example
from .sites import ModelSite
from .sites import sites_by_place
from .sites import uncompiled

Step = tuple[ModelSite, Pattern | None]


def fit_policy(policy: Policy, model: nn.Module, example: Example | None, verbose: bool) -> Policy:
    """See `Policy.fit`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for site in policy.sites:
        check_kind(site)
    model = uncompiled(model)
    wanted = [place for place in PLACES if any(site.place == place for site in policy.sites)]
    found = sites_by_place(model, example, wanted)
    places = [place for place in wanted if found[place]]
    if not places:
        raise ValueError(f"model has no sites of the places {', '.join(wanted)}: {type(model).__name__}")
    if any(not site.name for place in places for site in found[place]):  # there is no name to write into a policy
        raise ValueError(f"model must contain its sites, not be one itself, got {type(model).__name__}")
    notes = [f"{place}: the model has no such place, left out" for place in wanted if not found[place]]
    blocks = any(site.block is not None for place in places for site in found[place])
    if not blocks and any(isinstance(s.pattern, TiledPattern) and s.pattern.residual for s in policy.sites):
        notes.append("residual: the model has no residual block of a known kind, left out")
        policy = replace(policy, sites=tuple(replace(s, pattern=_without_residual(s.pattern)) for s in policy.sites))
    plan = [step for place in places for step in plan_place(model, policy, place, found[place], example is not None)]
    notes += [note for place in places for note in _unreached(model, policy, found[place])]
    described = describe(plan)  # refuses what drops too much
    if verbose:
        print("\n".join([*described, *notes]))
    sites = tuple(Site(site.name, site.depth, site.place, pattern) for site, pattern in plan)
    return Policy(sites, {"fitted_to": type(model).__name__, "from": dict(policy.provenance)})


def _unreached(model: nn.Module, policy: Policy, targets: tuple[ModelSite, ...]) -> list[str]:
    """A note of the patterns of a place that are for sites of this model, by name, which the example does not reach."""
    place = targets[0].place
    sources = tuple(site for site in policy.sites if site.place == place)
    named = by_name(sources, targets, model)
    if named is None:
        return []
    names = [site.name for site in sources if site.pattern is not None and site not in named.values()]
    return [f"{place}: the example does not reach {', '.join(names)}, left out"] if names else []


def describe(plan: Iterable[Step]) -> list[str]:
    """Lines that say what is dropped where: by place, and within it by pattern, in order.

    Raises:
        ValueError: a pattern drops more than 95% of a site.
    """
    lines = []
    for place, of_place in groupby(plan, key=lambda step: step[0].place):
        lines.append(place)
        for pattern, steps in groupby(of_place, key=lambda step: step[1]):
            lines += [f"  {_named(pattern)}", "    depth         size   rate  site"]
            for site, _ in steps:
                rate = None if pattern is None else checked_site(site, pattern).rate
                share = "\N{EN DASH}" if rate is None else f"{rate:.1%}"
                lines.append(f"    {site.depth:5.2f}  {size_of(site):>11}  {share:>5}  {site.name}")
    return lines


def size_of(site: ModelSite) -> str:
    """Channels, height and width of a map, or how many tokens."""
    if site.map is not None:
        return "x".join(map(str, site.map))
    return f"{site.lengths[0]} tokens" if site.lengths else "\N{EN DASH}"


def _named(pattern: Pattern | None) -> str:
    if pattern is None:
        return "nothing is dropped"
    values = [
        f"{field.name}={getattr(pattern, field.name)!r}"
        for field in fields(pattern)
        if getattr(pattern, field.name) != field.default
    ]
    return f"{type(pattern).__name__}({', '.join(values)})"


def _without_residual(pattern: Pattern | None) -> Pattern | None:
    return replace(pattern, residual=False) if isinstance(pattern, TiledPattern) else pattern
