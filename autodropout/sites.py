"""The sites of a model: where a policy puts its patterns.

Two places are known in ConvNets (Pham & Le 2021 mask the output of batch normalisation; the second is ours, for
stochastic depth):

- `"batch_norm"`: the output of every `BatchNorm2d` (and subclasses, and `SyncBatchNorm`), before the activation, except
  on a shortcut branch: a module whose path has a component named `downsample`, `shortcut` or `skip`.
- `"branch"`: the output of every `nn.Identity` that is called `branch`, the end of a residual branch by the convention
  of `autodropout.reproduce.models.wide_resnet`.

Those of a Transformer's layer ("query", "key", "value", "softmax", "output", "residual"; ours: "feed_forward") are the
outputs of the `PatternSite` modules that name them.

The order is that of the execution, found by running an example; depth is the position in it, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .nn import PatternSite
from .policy import PLACES

Example = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
Map = tuple[int, int, int]

Size = Map | int
# Which dimension of a layout counts its tokens.
TOKENS = {"NTC": 1, "TNC": 0, "NHTD": 2, "NHQK": 3}

SHORTCUT_NAMES = frozenset({"downsample", "shortcut", "skip"})

# Residual blocks whose skip tensor can be masked just before the addition, and the child that makes that tensor. Found
# by name through the MRO, so that subclasses count and neither library is imported.
SKIP_CHILDREN = {
    ("torchvision.models.resnet", "BasicBlock"): "downsample",
    ("torchvision.models.resnet", "Bottleneck"): "downsample",
    ("timm.models.resnet", "BasicBlock"): "downsample",
    ("timm.models.resnet", "Bottleneck"): "downsample",
    ("autodropout.reproduce.models.wide_resnet", "WideBlock"): "shortcut",
}


@dataclass(frozen=True)
class ModelSite:
    """One site of a model.

    Args:
        name: path of the module in the model.
        depth: position in order of execution, from 0 (the first site) to 1 (the last); 0 for a single site.
        place: one of `PLACES`.
        maps: (channels, height, width) of the output, every size seen with the example, in order; empty without one,
            and in a Transformer.
        lengths: tokens of the output of a Transformer's place (of a softmax: keys), likewise.
        target: path of the module whose output is masked; another than `name` where the normalisation brings its
            activation along.
        block: path of the residual block, of a known kind, whose last site this is; else None.
    """

    name: str
    depth: float
    place: str
    maps: tuple[Map, ...]
    target: str
    block: str | None
    lengths: tuple[int, ...] = ()

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
        ValueError: `place` is none of them.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(map(repr, PLACES))}, got {place!r}")
    return sites_by_place(model, example, (place,))[place]


def sites_by_place(
    model: nn.Module, example: Example | None, places: Sequence[str]
) -> dict[str, tuple[ModelSite, ...]]:
    """The sites of several places, as of `find_sites`, from one run of the model."""
    # A compiled model is looked at from inside: the wrapper would add a component to every path.
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules())
    candidates = {place: {n for n, module in modules.items() if _is_site(n, module, place)} for place in places}
    names = [name for name in modules if any(name in of_place for of_place in candidates.values())]
    seen: dict[str, tuple[Size, ...]]
    seen = dict.fromkeys(names, ()) if example is None else _trace(model, {n: modules[n] for n in names}, example)
    return {
        place: _sites(model, place, {name: sizes for name, sizes in seen.items() if name in of_place})
        for place, of_place in candidates.items()
    }


def _sites(model: nn.Module, place: str, seen: dict[str, tuple[Size, ...]]) -> tuple[ModelSite, ...]:
    """The sites of one place, from the sizes seen by each, in order of execution."""
    blocks = {name: _block_of(model, name) if place == "batch_norm" else None for name in seen}
    last = {block: name for name, block in blocks.items()}
    return tuple(
        ModelSite(
            name=name,
            depth=position / max(1, len(seen) - 1),
            place=place,
            maps=tuple(size for size in sizes if isinstance(size, tuple)),
            lengths=tuple(size for size in sizes if isinstance(size, int)),
            target=_target(name, model.get_submodule(name)),
            block=blocks[name] if last[blocks[name]] == name else None,
        )
        for position, (name, sizes) in enumerate(seen.items())
    )


def skip_child(block: nn.Module) -> str | None:
    """The name of the child that makes the skip tensor of a residual block, or None if its kind is not known."""
    for kind in type(block).__mro__:
        name = SKIP_CHILDREN.get((kind.__module__, kind.__name__))
        if name is not None:
            return name
    return None


def _is_site(name: str, module: nn.Module, place: str) -> bool:
    parts = name.split(".")
    if place == "branch":
        return parts[-1] == "branch" and isinstance(module, nn.Identity)
    if place != "batch_norm":
        return isinstance(module, PatternSite) and module.place == place
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and SHORTCUT_NAMES.isdisjoint(parts)


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


def _trace(model: nn.Module, candidates: dict[str, nn.Module], example: Example) -> dict[str, tuple[Size, ...]]:
    """The sizes seen by each candidate, in the order in which they first ran."""
    seen: dict[str, tuple[Size, ...]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return
            size: Size
            if isinstance(module, PatternSite):
                size = output.shape[TOKENS[module.layout]]
            elif output.dim() == 4:
                size = (output.shape[1], output.shape[2], output.shape[3])
            else:
                return
            before = seen.setdefault(name, ())
            seen[name] = before if size in before else (*before, size)

        return module.register_forward_hook(record)

    handles = [watch(name, module) for name, module in candidates.items()]
    try:
        # Compiled parts run as they were written: Dynamo would compile them for the sake of hooks that do not stay.
        with _untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
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


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers and random numbers as before when it is left."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index for device in devices)):
        model.eval()
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
                        buffer.copy_(value)
