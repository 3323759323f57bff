"""The sites of a model: where a policy puts its patterns.

Two places are known in ConvNets (Pham & Le 2021 mask the output of batch normalisation; the second is ours, for
stochastic depth):

- `"batch_norm"`: the output of every `BatchNorm2d` (and subclasses, and `SyncBatchNorm`), before the activation, except
  on a shortcut branch (`on_shortcut` of conventions.py). A `BatchNormPatternReLU2d` has its own pattern and is none.
- `"branch"`: the output of every `nn.Identity` that is called `branch`, the end of a residual branch by the convention
  of `autodropout.reproduce.models.wide_resnet`.

Those of a Transformer's layer ("query", "key", "value", "softmax", "output", "residual"; ours: "feed_forward") are the
outputs of the `PatternSite` modules that name them; in a model without any they are known by the names of its modules,
see conventions.py.

The order is that of the execution, found by running an example; depth is the position in it, from 0 to 1. In a
Transformer with an encoder and a decoder (components of the paths) each of them has depths of its own, so that the
patterns of a model with one stack reach all depths of both (our choice).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn.parameter import is_lazy

from .attention_weights import Listener
from .conventions import Spot
from .conventions import attends_time_first
from .conventions import find_spots
from .conventions import on_shortcut
from .conventions import skip_child
from .fused import BatchNormPatternReLU2d
from .nn import PatternSite
from .policy import LAYER_PLACES
from .policy import PLACES

Example = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
Map = tuple[int, int, int]

Size = Map | int
# Which dimension of a layout counts its tokens.
TOKENS = {"NTC": 1, "TNC": 0, "NHTD": 2, "NHQK": 3}

STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class ModelSite:
    """One site of a model.

    Args:
        name: path of the module in the model; with ":" and the place where the model does not mark its places.
        depth: position in order of execution, from 0 (the first site) to 1 (the last); 0 for a single site. In a
            Transformer with encoder and decoder in the one of them.
        place: one of `PLACES`.
        maps: (channels, height, width) of the output, every size seen with the example, in order; empty without one,
            and in a Transformer.
        lengths: tokens of the output of a Transformer's place (of a softmax: keys), likewise.
        target: path of the module whose output is masked; another than `name` where the normalisation brings its
            activation along.
        block: path of the residual block, of a known kind, whose last site this is; else None.
        spot: how the place's tensor is found in a model that does not mark its places; else None.
    """

    name: str
    depth: float
    place: str
    maps: tuple[Map, ...]
    target: str
    block: str | None
    lengths: tuple[int, ...] = ()
    spot: Spot | None = None

    @property
    def map(self) -> Map | None:
        """The first map; a module that is shared may see several."""
        return self.maps[0] if self.maps else None


def find_sites(model: nn.Module, example: Example | None = None, place: str = "batch_norm") -> tuple[ModelSite, ...]:
    """The sites of a model, in order of execution.

    Args:
        model: any module. It is run once on the example, in evaluation mode and without gradients; training flags,
            buffers and the random number generators are put back.
        example: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
            Modules that it does not reach are no sites. None: order of registration, no maps and no lengths.
        place: one of `PLACES`.

    Returns:
        A tuple of sites, empty if there are none.

    Raises:
        TypeError: `model` is no module, `example` none of these.
        ValueError: `place` is none of them; the model has parameters that are not initialised yet, and an example; no
            example for a Transformer that does not mark its places, where it takes a run to know which modules do what
            their names say.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(map(repr, PLACES))}, got {place!r}")
    return sites_by_place(model, example, (place,))[place]


def sites_by_place(
    model: nn.Module, example: Example | None, places: Sequence[str]
) -> dict[str, tuple[ModelSite, ...]]:
    """The sites of several places, as of `find_sites`, from one run of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    if example is not None:
        check_example(example)
        _check_initialised(model)
    modules = dict(model.named_modules())
    spots = {s.name: s for s in find_spots(model) if s.place in places} if set(places) & set(LAYER_PLACES) else {}
    if spots and example is None:
        raise ValueError(
            f"example must be given, got None: the places of {type(model).__name__} are known by the names of its "
            "modules, and only a run shows which of them do what their names say"
        )
    could_be = {place: _candidates(modules, spots.values(), place) for place in places}
    names = [name for name in modules if any(name in of_place for of_place in could_be.values())]
    watched = {name: modules[name] for name in names}
    seen: dict[str, tuple[Size, ...]]
    seen = dict.fromkeys(names, ()) if example is None else _trace(model, watched, spots, example)
    return {
        place: _sites(model, place, {name: sizes for name, sizes in seen.items() if name in of_place}, spots)
        for place, of_place in could_be.items()
    }


def candidates(model: nn.Module, place: str) -> set[str]:
    """The names of what could be sites of a place, whether or not an example reaches them."""
    spots = find_spots(model) if place in LAYER_PLACES else ()
    return _candidates(dict(model.named_modules()), spots, place)


def _candidates(modules: Mapping[str, nn.Module], spots: Iterable[Spot], place: str) -> set[str]:
    marked = {name for name in modules if _is_site(name, modules, place)}
    return marked | {spot.name for spot in spots if spot.place == place}


def check_example(example: object) -> None:
    """Refuses what a model cannot be called with.

    Raises:
        TypeError: it is neither a tensor nor a tuple nor a mapping.
    """
    if not isinstance(example, (Tensor, tuple, Mapping)):
        kind = type(example).__name__
        raise TypeError(
            f"example must be a tensor, a tuple of positional or a mapping of keyword arguments, got {kind}; "
            f"(example,) for a model that is called with one {kind}"
        )


def _check_initialised(model: nn.Module) -> None:
    """A run would make a lazy module another one for good."""
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(is_lazy(tensor) for tensor in tensors):
            raise ValueError(
                f"model must have initialised parameters, got a {type(module).__name__} that has never run at {name!r}"
            )


def uncompiled(model: nn.Module) -> nn.Module:
    """A compiled model from inside: the wrapper would add a component to every path."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def _sites(
    model: nn.Module, place: str, seen: dict[str, tuple[Size, ...]], spots: dict[str, Spot]
) -> tuple[ModelSite, ...]:
    """The sites of one place, from the sizes seen by each, in order of execution."""
    blocks = {name: _block_of(model, name) if place == "batch_norm" else None for name in seen}
    last = {block: name for name, block in blocks.items()}
    depths = _depths(list(seen), place)
    return tuple(
        ModelSite(
            name=name,
            depth=depths[name],
            place=place,
            maps=tuple(size for size in sizes if isinstance(size, tuple)),
            lengths=tuple(size for size in sizes if isinstance(size, int)),
            target=spots[name].target if name in spots else _target(name, model.get_submodule(name)),
            block=blocks[name] if last[blocks[name]] == name else None,
            spot=spots.get(name),
        )
        for name, sizes in seen.items()
    )


def _depths(names: Sequence[str], place: str) -> dict[str, float]:
    """By name: the position among the sites of a place, or among those of its stack."""
    stacks = dict.fromkeys(names, "")
    if place in LAYER_PLACES:
        stacks = {name: next((p for p in name.split(".") if p in STACKS), "") for name in names}
        if not set(STACKS) <= set(stacks.values()):
            stacks = dict.fromkeys(names, "")
    depths: dict[str, float] = {}
    for stack in set(stacks.values()):
        members = [name for name in names if stacks[name] == stack]
        depths |= {name: position / max(1, len(members) - 1) for position, name in enumerate(members)}
    return depths


def _is_site(name: str, modules: Mapping[str, nn.Module], place: str) -> bool:
    module = modules[name]
    if place == "branch":
        return name.split(".")[-1] == "branch" and isinstance(module, nn.Identity)
    if place != "batch_norm":
        return isinstance(module, PatternSite) and module.place == place
    normalises = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
    fused = isinstance(module, BatchNormPatternReLU2d)  # drops by itself, and its output has seen the activation
    return normalises and not fused and not on_shortcut(name, modules)


def _target(name: str, module: nn.Module) -> str:
    # timm's BatchNormAct2d normalises, calls `drop`, then `act`: a pattern belongs between the two.
    if isinstance(getattr(module, "drop", None), nn.Module) and isinstance(getattr(module, "act", None), nn.Module):
        return f"{name}.drop" if name else "drop"
    return name


def _block_of(model: nn.Module, name: str) -> str | None:
    """The path of the innermost residual block of a known kind around the module called `name`."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:length])
        if skip_child(model.get_submodule(path)) is not None:
            return path
    return None


def _trace(
    model: nn.Module, candidates: dict[str, nn.Module], spots: dict[str, Spot], example: Example
) -> dict[str, tuple[Size, ...]]:
    """The sizes seen by each candidate and each spot, in the order in which they first ran."""
    seen: dict[str, tuple[Size, ...]] = {}
    running: list[str] = []  # targets of spots, the innermost last
    inside = {(s.target, s.place): name for name, s in spots.items() if s.where == "inside" and s.matrix is None}
    given = {name: s for name, s in spots.items() if s.matrix is not None}

    def record(name: str, size: Size | None) -> None:
        if size is not None:
            before = seen.setdefault(name, ())
            seen[name] = before if size in before else (*before, size)

    def record_inside(place: str, tokens: int) -> None:
        target = next((target for target in reversed(running) if (target, place) in inside), None)
        if target is not None:
            record(inside[target, place], tokens)

    def record_given(weight: Tensor, y: Tensor) -> None:
        for name, spot in given.items():
            if running[-1:] == [spot.target] and spot_weight(model, spot) is weight:
                record(name, _tokens("NTC", y))

    def watch(name: str, module: nn.Module) -> list[Any]:
        return [module.register_forward_hook(lambda _module, _args, y: record(name, _size(module, y)))]

    def watch_target(target: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda _module, _args: running.append(target)),
            module.register_forward_hook(lambda _module, _args, _y: running.remove(target), always_call=True),
        ]

    def watch_spot(spot: Spot, module: nn.Module) -> list[Any]:
        layout = layout_at(spot, module)
        if spot.where == "input":
            return [module.register_forward_pre_hook(lambda _module, args: record(spot.name, _tokens(layout, *args)))]
        if spot.where == "output":
            return [module.register_forward_hook(lambda _module, _args, y: record(spot.name, _tokens(layout, y)))]
        return []

    handles = [handle for name, module in candidates.items() for handle in watch(name, module)]
    handles += [handle for spot in spots.values() for handle in watch_spot(spot, model.get_submodule(spot.target))]
    for target in dict.fromkeys(spot.target for spot in spots.values()):
        handles += watch_target(target, model.get_submodule(target))
    try:
        # Compiled parts run as they were written: Dynamo would compile them for the sake of hooks that do not stay.
        listener = Listener(record_inside, record_given)
        with _untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), listener:
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, tuple):
                model(*example)
            else:
                model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _size(module: nn.Module, output: object) -> Size | None:
    """Of the output of a marked place, or of a map."""
    if not isinstance(output, Tensor):
        return None
    if isinstance(module, PatternSite):
        return output.shape[TOKENS[module.layout]]
    return (output.shape[1], output.shape[2], output.shape[3]) if output.dim() == 4 else None


def _tokens(layout: str, *tensors: object) -> int | None:
    """How many tokens a spot's tensor has, the first of these: (N, T, C), or (N, H, W, C), whose cells are tokens."""
    x = tensors[0] if tensors else None
    x = x[0] if isinstance(x, tuple) and x else x
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        return None
    return x.shape[TOKENS[layout]] if x.dim() == 3 else x.shape[1] * x.shape[2]


def layout_at(spot: Spot | None, module: nn.Module) -> str:
    """Of the tensor at a spot of a module."""
    if spot is not None and spot.where == "inside":
        return "NHQK" if spot.place == "softmax" else "NTC"
    return "TNC" if attends_time_first(module) or (spot is not None and spot.time_first) else "NTC"


def spot_weight(model: nn.Module, spot: Spot) -> object:
    """What the target of a spot gives to `linear`."""
    return getattr(model.get_submodule(spot.target).get_submodule(str(spot.matrix)), "weight", None)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers and random numbers as before when it is left."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index for device in devices)):
        for module, _ in training:  # not by `eval`, which may do more: a LoRA merges its weights
            module.training = False
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for module, before in buffers:
                module._buffers.clear()
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not buffer.is_meta and not torch.equal(buffer, value):
                        buffer.resize_(value.shape).copy_(value)  # observers of quantisation have no size yet
