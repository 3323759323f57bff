"""Puts a policy on a model, and takes it off again. What becomes of the modules at the sites: masked.py.

A forward hook would be the obvious way, but Dynamo does not look for hooks (`skip_nnmodule_hook_guards`): code that it
compiled for a model without a policy would be used, silently, for the same model with one. It does look at classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace

from torch import nn

from .conventions import Spot
from .conventions import skip_child
from .masked import CHILD
from .masked import MaskedLayer
from .masked import MaskedModule
from .masked import SiteDropout
from .masked import masked_class
from .nearest import by_depth
from .nearest import by_name
from .nearest import warn_of_names
from .nn import PatternSite
from .patterns import BernoulliPattern
from .patterns import Pattern
from .patterns import TiledPattern
from .patterns import TokenPattern
from .policy import LAYER_PLACES
from .policy import MAP_PLACES
from .policy import PLACES
from .policy import Policy
from .policy import Site
from .sites import Example
from .sites import Map
from .sites import ModelSite
from .sites import layout_at
from .sites import sites_by_place
from .sites import uncompiled

MAX_RATE = 0.95
MAP_DIMS = 4  # (N, C, H, W)

# What a model without sites of a place is told.
_OF_LAYERS = (
    "In a model of your own mark it by an autodropout.nn.PatternSite or name it by "
    "autodropout.conventions.register_places; Policy.fit leaves out what a model has not"
)
_WHERE = {
    "batch_norm": "They are the outputs of BatchNorm2d and SyncBatchNorm; for a Transformer name its places",
    "branch": "They are the outputs of nn.Identity modules called 'branch', at the ends of residual branches",
} | dict.fromkeys(LAYER_PLACES, _OF_LAYERS)


@dataclass(frozen=True)
class AppliedSite:
    """A site that has a pattern now.

    Args:
        name: path of the site's module.
        depth: position in order of execution, from 0 to 1.
        map: (channels, height, width) of the activation; None if no example was given, and in a Transformer.
        pattern: what is dropped there.
        rate: exact expected dropped share on that map, or in sequences of that length; None if no example was given.
        length: tokens at a place of a Transformer (of a softmax: keys), else None.
    """

    name: str
    depth: float
    map: Map | None
    pattern: Pattern
    rate: float | None
    length: int | None = None


def apply_policy(model: nn.Module, policy: Policy, example: Example | None = None) -> list[AppliedSite]:
    """Puts the patterns of a policy at the sites of a model, in place.

    If the policy names all sites of the model, each gets the pattern of its name, else that of the nearest site in
    relative depth (ties to the earlier). What wrappers add to the names (`module.` of DDP) does not matter, and the
    policy may also name modules that the example does not reach. By depth, an encoder and a decoder take from the
    policy's encoder and decoder where it has both.

    A tiled pattern with `residual=True` masks the skip tensor of its residual block too, just before the addition, by a
    draw of its own. Only the last site of a block can have it: a policy that names the sites is refused if it says
    otherwise, one that moves by depth loses the flag at other sites. The blocks that can be masked so are `BasicBlock`
    and `Bottleneck` of torchvision's and timm's ResNets, our `WideBlock`, and those of
    `autodropout.conventions.register_residual_block`; what makes their skip tensors has no sites.

    A Transformer takes `TokenPattern`s, and `BernoulliPattern`s of cells or samples; a policy moves between
    Transformers place by place. The places are those that the model marks (`PatternSite`), or in models of timm and
    `transformers` those that the names of their modules tell (conventions.py), which needs an example.

    The keys of the `state_dict` stay the same, evaluation does what it did, and `deepcopy`, pickling, EMA copies,
    `torch.compile` (before or after), `torch.export`, DDP and FSDP work. `convert_sync_batchnorm` makes new modules:
    convert first. The dropout of a site follows the training flag of its batch normalisation: a frozen one, in
    evaluation mode, drops nothing. That of a skip tensor follows the module that makes it, the last of a `Sequential`;
    where the input itself is added, the block: it drops on while only the normalisations are frozen.

    Args:
        model: any module; see `find_sites` for what its sites are.
        policy: patterns and their sites. A site whose pattern is None is left alone.
        example: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments. With
            it the sites are taken in the order in which they run, and rates are checked; without it in the order in
            which they are registered.

    Returns:
        The sites that have a pattern now, place by place, in order.

    Raises:
        TypeError: `model` is no module, `policy` no policy or `example` none of these.
        ValueError: the model has no sites of a place of the policy, or has a policy already; a pattern of maps at a
            place of tokens or the other way round, or one that shares dimensions that maps have not; in a policy that
            names all sites, a pattern at a module that is none; the exact expected rate of a pattern on the map, or in
            the sequences, of its site is above 0.95 (needs `example`); `residual` where it means nothing; an example
            for a model with parameters that are not initialised yet.

        Whatever is raised, the model is left untouched.

    Warns:
        UserWarning: patterns go by depth though the policy names sites of this model, or what looks like them:
            misspelt, or not all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, got {type(policy).__name__}")
    model = uncompiled(model)
    for parent, _, _ in _site_dropouts(model):
        if isinstance(parent, nn.SyncBatchNorm) and not isinstance(parent, MaskedModule):
            raise ValueError(
                "model has a policy that does nothing since convert_sync_batchnorm made new modules: call "
                "remove_policy, then apply_policy again"
            )
        raise ValueError("model has a policy already: call remove_policy first")
    for source in policy.sites:
        check_kind(source)
    places = [place for place in PLACES if any(site.place == place for site in policy.sites)]
    found = sites_by_place(model, example, places)
    plan: list[tuple[ModelSite, Pattern]] = []
    for place in places:
        of_place = plan_place(model, policy, place, found[place], example is not None)
        plan += [(site, pattern) for site, pattern in of_place if pattern is not None]
    applied = [checked_site(site, pattern) for site, pattern in plan]

    try:
        for site, pattern in plan:
            _put_on(model, site, pattern)
    except BaseException:
        remove_policy(model)
        raise
    return applied


def remove_policy(model: nn.Module) -> None:
    """Takes off what `apply_policy` put on a model, or on the one it is a copy of. Without a policy nothing happens.

    Raises:
        TypeError: `model` is no module.
        ValueError: something else (a parametrization, `fully_shard` on the very module) changed the class of a site's
            module after `apply_policy` did: undo that first. The model is left untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = list(_site_dropouts(model))
    for parent, _, _ in found:
        if isinstance(parent, MaskedModule) and type(parent) is not masked_class(
            parent.unmasked_class, parent.masked_base
        ):
            raise ValueError(f"model must have the classes that apply_policy gave it, got {type(parent).__name__}")
    for parent, name, dropout in found:
        own = name.startswith(CHILD)
        if isinstance(parent, MaskedModule) and own:
            parent.__class__ = parent.unmasked_class  # type: ignore[assignment]
        if dropout.was_child:
            parent._modules[name] = None
        else:
            delattr(parent, name)
            if not own:
                setattr(parent, name, None)


def plan_place(
    model: nn.Module, policy: Policy, place: str, targets: tuple[ModelSite, ...], ran: bool
) -> list[tuple[ModelSite, Pattern | None]]:
    """Which site of a place gets which pattern, checked. Changes nothing; `ran`: whether an example was given."""
    sources = tuple(site for site in policy.sites if site.place == place)
    if not targets:
        reached = " that the example reaches" if ran else ""
        raise ValueError(f"model has no sites of place {place!r}{reached}: {type(model).__name__}. {_WHERE[place]}")
    named = by_name(sources, targets, model)
    if any(_residual(site.pattern) for site in sources):
        _check_residual(sources, targets, named, place)
    if named is None:
        warn_of_names(sources, targets, model)
        patterns = by_depth(sources, targets, place)
    else:
        patterns = {name: site.pattern for name, site in named.items()}
    plan = []
    for target in targets:
        pattern = patterns[target.name]
        if isinstance(pattern, TiledPattern) and pattern.residual and target.block is None:
            pattern = replace(pattern, residual=False)
        if pattern is not None:
            _check_layout(model.get_submodule(target.target), target, pattern)
        plan.append((target, pattern))
    return plan


def check_kind(site: Site) -> None:
    """Maps have no tokens, and four dimensions; sequences have neither rows nor columns."""
    pattern = site.pattern
    if pattern is None:
        return
    if site.place in MAP_PLACES:
        fits, allowed = not isinstance(pattern, TokenPattern), "a pattern of maps"
    else:
        cells = isinstance(pattern, BernoulliPattern) and pattern.shared in ("none", "sample")
        fits = cells or isinstance(pattern, TokenPattern)
        allowed = "a TokenPattern, or a BernoulliPattern of cells or samples,"
    if not fits:
        raise ValueError(f"pattern must be {allowed} at place {site.place!r}, got {pattern!r} at {site.name!r}")
    shared = pattern.shared if isinstance(pattern, BernoulliPattern) else "none"
    if isinstance(shared, tuple) and max(shared) >= MAP_DIMS:
        raise ValueError(f"shared must hold dimensions of maps, 0 to {MAP_DIMS - 1}, got {shared!r} at {site.name!r}")


def _check_layout(module: nn.Module, site: ModelSite, pattern: Pattern) -> None:
    """A decision of a sample is one of the first dimension, which has the tokens where time comes first."""
    samples = isinstance(pattern, BernoulliPattern) and pattern.shared == "sample"
    layout = module.layout if isinstance(module, PatternSite) else layout_at(site.spot, module)
    if samples and layout == "TNC":
        raise ValueError(f"shared must be 'none' where the layout is 'TNC', got 'sample' at {site.name!r}")


def _residual(pattern: Pattern | None) -> bool:
    return isinstance(pattern, TiledPattern) and pattern.residual


def _check_residual(
    sources: tuple[Site, ...], targets: tuple[ModelSite, ...], named: Mapping[str, Site] | None, place: str
) -> None:
    if place != "batch_norm":
        name = next(site.name for site in sources if _residual(site.pattern))
        raise ValueError(f"residual must be False at sites of place {place!r}, got True at {name!r}")
    if all(target.block is None for target in targets):
        raise ValueError(
            "residual must be False on this model: it has no residual block of a known kind "
            "(BasicBlock or Bottleneck of torchvision's or timm's ResNets, WideBlock, or what "
            "autodropout.conventions.register_residual_block was told)"
        )
    ends = {target.name for target in targets if target.block is not None}
    for name, site in ({} if named is None else named).items():
        if _residual(site.pattern) and name not in ends:
            raise ValueError(f"residual must be False at {name!r}, which does not end a residual block")


def checked_site(site: ModelSite, pattern: Pattern) -> AppliedSite:
    """What is dropped at a site.

    Raises:
        ValueError: more than 95% of it.
    """
    rates = [
        *(_checked(site, pattern, f"map {c}x{h}x{w}", pattern.expected_rate(h, w)) for c, h, w in site.maps),
        *(_checked(site, pattern, f"{length} tokens", _rate_in(pattern, length)) for length in site.lengths),
    ]
    length = site.lengths[0] if site.lengths else None
    return AppliedSite(site.name, site.depth, site.map, pattern, rates[0] if rates else None, length)


def _rate_in(pattern: Pattern, length: int) -> float:
    """The expected rate in sequences of so many tokens."""
    return pattern.expected_rate(length) if isinstance(pattern, TokenPattern) else pattern.expected_rate(1, length)


def _checked(site: ModelSite, pattern: Pattern, where: str, rate: float) -> float:
    if rate > MAX_RATE:
        raise ValueError(
            f"pattern at site {site.name!r} ({where}) must have an expected rate of at most {MAX_RATE}, "
            f"got {rate:.4f}: {pattern!r}"
        )
    return rate


def _put_on(model: nn.Module, site: ModelSite, pattern: Pattern) -> None:
    module = model.get_submodule(site.target)
    if site.spot is None:
        _mask_output(module, pattern)
    else:
        _mask_spot(module, site.spot, pattern)
    if site.block is not None and isinstance(pattern, TiledPattern) and pattern.residual:
        _mask_skip(model.get_submodule(site.block), pattern)


def _mask_output(module: nn.Module, pattern: Pattern) -> None:
    layout = module.layout if isinstance(module, PatternSite) else None
    module.add_module(CHILD, SiteDropout(pattern, layout=layout).train(module.training))
    if not isinstance(module, nn.Sequential):  # an empty one, see _mask_skip: it runs its children by itself
        module.__class__ = masked_class(type(module))


def _mask_spot(module: nn.Module, spot: Spot, pattern: Pattern) -> None:
    dropout = SiteDropout(pattern, layout=layout_at(spot, module)).train(module.training)
    dropout.place, dropout.layout_of_parts = spot.place, spot.layout
    dropout.inside, dropout.matrix = spot.where == "inside", spot.matrix
    module.add_module(f"{CHILD}_{spot.place}", dropout)
    if not isinstance(module, MaskedLayer):
        module.__class__ = masked_class(type(module), MaskedLayer)


def _mask_skip(block: nn.Module, pattern: Pattern) -> None:
    """Masks the skip tensor of a block of a known kind, by a draw of its own."""
    name = skip_child(block)
    assert name is not None
    module = getattr(block, name)
    if module is None:  # both libraries then add the input itself, and call the child when there is one
        dropout = SiteDropout(pattern).train(block.training)
        dropout.was_child = name in block._modules
        setattr(block, name, dropout)
        return
    while isinstance(module, nn.Sequential) and len(module) > 0:
        module = module[-1]
    _mask_output(module, pattern)


def _site_dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, SiteDropout]]:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, SiteDropout):
                yield module, name, child
