"""Where the places of a Transformer's layer are in models that do not mark them, by the names of their modules; and
what in ConvNets is a shortcut branch, and which blocks have a skip tensor that can be masked.

timm and `transformers` give an attention's projections a few names, over and over: `q_proj, k_proj, v_proj, o_proj`,
`query, key, value`, `qkv, proj`, ... A module with such children is an attention, one with the two matrices of a
feed-forward part is that; the lists are below. Whether the model calls them is seen by running it (sites.py).

A model of your own marks its places (`autodropout.nn.PatternSite`), or says where they are: `register_places`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .nn import PatternSite
from .patterns.checks import choice
from .policy import LAYER_PLACES
from .qkv_layouts import KEY_AND_VALUE
from .qkv_layouts import KNOWN
from .qkv_layouts import Layout
from .qkv_layouts import QkvLayout

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
)
# One matrix whose output is query, key and value, equal parts one after the other, where qkv_layouts.py does not say
# another order. Not `query_key_value`: there heads come first.
FUSED = ("c_attn", "qkv", "Wqkv")
# A matrix for the query, and one whose output is key and value.
FUSED_PAIRS = (("q_attn", "c_attn"), ("q", "kv"))
OUTPUTS = ("o_proj", "out_proj", "c_proj", "proj", "o", "out_lin", "Wo", "dense")
# The hidden layer is what goes into the second; its output is added to the residual stream.
FEED_FORWARD = (
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("wi_0", "wo"),
    ("Wi", "Wo"),
    ("ffn", "ffn_output"),
)
# Called `output`, with a matrix `dense`: the output of the sibling before it (BERT and its many relatives).
BERT_OUTPUTS = (("self", "output"), ("attention", "output"), ("intermediate", "residual"))
# Called so, two matrices are no feed-forward part: they see tables of relative positions, or tokens as channels.
NO_FEED_FORWARD = frozenset({"rel_pos", "shared_rel_pos", "cpb_mlp", "meta_mlp", "mlp_tokens"})
# Classes whose matrices see (T, N, C), found through the MRO; others do where a sibling is an `nn.MultiheadAttention`
# of that layout.
TIME_FIRST = dict.fromkeys(
    [
        ("transformers.models.longformer.modeling_longformer", "LongformerSelfAttention"),
        ("transformers.models.led.modeling_led", "LEDEncoderSelfAttention"),
        ("transformers.models.fsmt.modeling_fsmt", "Attention"),
        ("transformers.models.fsmt.modeling_fsmt", "EncoderLayer"),
        ("transformers.models.fsmt.modeling_fsmt", "DecoderLayer"),
        ("transformers.models.oneformer.modeling_oneformer", "OneFormerTransformerDecoderFFNLayer"),
    ],
    True,
)


# Residual blocks whose skip tensor can be masked just before the addition, and the child that makes that tensor. Found
# by name through the MRO, so that subclasses count and neither library is imported.
SKIP_CHILDREN: dict[tuple[str, str], str] = {
    ("torchvision.models.resnet", "BasicBlock"): "downsample",
    ("torchvision.models.resnet", "Bottleneck"): "downsample",
    ("timm.models.resnet", "BasicBlock"): "downsample",
    ("timm.models.resnet", "Bottleneck"): "downsample",
    ("autodropout.reproduce.models.wide_resnet", "WideBlock"): "shortcut",
}
# What makes a shortcut in blocks of any kind; `identity` is that of RepVGG, beside its convolutions.
SHORTCUT_NAMES = frozenset({"downsample", "shortcut", "skip", "identity"})
# The same by class, where the name alone could be anything.
SHORTCUT_CHILDREN: dict[tuple[str, str], str] = {
    ("torchvision.models.regnet", "ResBottleneckBlock"): "proj",
    ("timm.models.dla", "DlaTree"): "project",
}


@dataclass(frozen=True)
class Spot:
    """One place of a layer in a model that does not mark it.

    Args:
        place: one of `LAYER_PLACES`.
        target: path of a module.
        where: "output" or "input" of that module; or "inside" it: the attention weights, or what
            `multi_head_attention_forward` projects.
        layout: of that tensor, if the place is only a part of it.
        matrix: inside, the path in the target of a module that it does not call, but whose weight it gives to `linear`.
        time_first: whether that tensor is (T, N, C).
    """

    place: str
    target: str
    where: str = "output"
    layout: QkvLayout | None = None
    matrix: str | None = None
    time_first: bool = False

    @property
    def name(self) -> str:
        """Of the site: no two places share it, though they may share the module."""
        return f"{self.target}:{self.place}"


_REGISTERED: dict[tuple[str, str], dict[str, str]] = {
    ("torchvision.ops.misc", "MLP"): {"feed_forward": "3", "residual": "3"}
}
_LAYOUTS: dict[tuple[str, str], Layout] = {}  # of the "qkv" of registered classes


def register_places(kind: type[nn.Module], layout: Layout | None = None, **paths: str) -> None:
    """Says where the places of a layer are in a class of modules, and its subclasses, whatever the names.

    Example: `register_places(MyAttention, qkv="to_qkv", softmax="", output="to_out.0")`.

    Args:
        kind: the class.
        layout: from a module of that class to the `QkvLayout` of "qkv". None: equal parts, query, key and value in that
            order. Example: `lambda module: QkvLayout(groups=module.heads)` where heads come first.
        **paths: by place, the path of a module inside it, "" for itself. Its output is the place's tensor, (N, T, C) or
            (N, H, W, C); for "feed_forward" its input is, and for "softmax" the weights that it computes by
            `scaled_dot_product_attention` or `softmax`. "qkv" is query, key and value in one tensor.

    Raises:
        TypeError: `kind` is no class of modules, a path no string, or `layout` no function.
        ValueError: an unknown place; a layout without "qkv".
    """
    _check_kind(kind)
    if layout is not None and not callable(layout):
        raise TypeError(f"layout must be a function from the module to a QkvLayout, got {layout!r}")
    if layout is not None and "qkv" not in paths:
        raise ValueError(f"layout must be None without a path of 'qkv', got {layout!r}")
    for place, path in paths.items():
        choice("place", place, (*LAYER_PLACES, "qkv"))
        if not isinstance(path, str):
            raise TypeError(f"{place} must be the path of a module, got {path!r}")
    _REGISTERED[kind.__module__, kind.__qualname__] = dict(paths)
    _LAYOUTS[kind.__module__, kind.__qualname__] = layout or (lambda _module: QkvLayout())


def register_residual_block(kind: type[nn.Module], skip: str) -> None:
    """Says how a residual block makes its skip tensor, so that `residual` of a tiled pattern can mask it.

    Args:
        kind: the class of the blocks; its subclasses count.
        skip: name of the attribute whose module makes the skip tensor from the block's input; where it is None, the
            block must add its input itself, and use a module that is put there.

    Raises:
        TypeError: `kind` is no class of modules, or `skip` no string.
    """
    _check_kind(kind)
    if not isinstance(skip, str):
        raise TypeError(f"skip must be the name of an attribute, got {skip!r}")
    SKIP_CHILDREN[kind.__module__, kind.__qualname__] = skip


def skip_child(block: nn.Module) -> str | None:
    """The name of the child that makes the skip tensor of a residual block, or None if its kind is not known."""
    for kind in type(block).__mro__:
        name = SKIP_CHILDREN.get((kind.__module__, kind.__qualname__))
        if name is not None:
            return name
    return None


def on_shortcut(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module of a ConvNet, or one around it, makes a shortcut: what is added to the main path of a block.

    Args:
        path: of the module.
        modules: by path, all of the model.
    """
    children = zip(_above(path), path.split("."), strict=False)  # none of the model itself
    return any(_is_shortcut(modules[parent], child) for parent, child in children)


def _is_shortcut(parent: nn.Module, child: str) -> bool:
    if child in (skip_child(parent), _by_class(parent, SHORTCUT_CHILDREN)):
        return True
    # A stage has a `downsample` too, which leads to its blocks.
    return child in SHORTCUT_NAMES and not (child == "downsample" and "blocks" in dict(parent.named_children()))


def find_spots(model: nn.Module) -> Iterator[Spot]:
    """The places that the names of a model's modules promise, module by module; none if it marks its own."""
    modules = dict(model.named_modules())
    if any(isinstance(module, PatternSite) for module in modules.values()):
        return
    attentions: set[str] = set()
    for path, module in modules.items():
        children = {name for name, child in module.named_children() if not _convolves(child)}
        registered = _by_class(module, _REGISTERED)
        if registered is not None:
            yield from _said(path, module, registered)
            continue
        if isinstance(module, nn.MultiheadAttention):
            for place in ("query", "key", "value", "softmax"):
                yield Spot(place, path, "inside")
            yield Spot("output", path)
            continue
        attention = list(_attention(path, module, children))
        if attention:
            attentions.add(path)
        yield from attention
        if attentions.isdisjoint(_above(path)) and NO_FEED_FORWARD.isdisjoint(path.split(".")):
            yield from _feed_forward(path, modules, children)
        for sibling, place in BERT_OUTPUTS:
            if {sibling, "output"} <= children and hasattr(module.get_submodule("output"), "dense"):
                target = _joined(path, "output.dense")
                if place == "residual":
                    yield Spot("feed_forward", target, "input")
                elif "intermediate" in children:  # the layer around both: its `output` is that of the feed-forward part
                    continue
                yield Spot(place, target)


def _feed_forward(path: str, modules: dict[str, nn.Module], children: set[str]) -> Iterator[Spot]:
    pair = next((names for names in FEED_FORWARD if set(names) <= children), None)
    if pair is None:
        return
    # The layer is the module itself (PyTorch's) or the one around it.
    siblings = [sibling for layer in (*_above(path)[-1:], path) for sibling in modules[layer].children()]
    time_first = _is_time_first(modules[path]) or any(map(attends_time_first, siblings))
    target = _joined(path, pair[1])
    yield Spot("feed_forward", target, "input", time_first=time_first)
    yield Spot("residual", target, time_first=time_first)


def attends_time_first(module: nn.Module) -> bool:
    """Whether it is an attention of PyTorch, of (T, N, C)."""
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _is_time_first(module: nn.Module) -> bool:
    return _by_class(module, TIME_FIRST) is not None


def _attention(path: str, module: nn.Module, children: set[str]) -> Iterator[Spot]:
    """Whether a projection is called, or its weight given to `linear`, only a run shows: both are promised."""
    projections = _projections(module, children)
    if not projections:
        return
    output = next((name for name in OUTPUTS if name in children), None)
    if output is not None:
        projections.append(("output", output, None))
    time_first = _is_time_first(module)
    for place, child, layout in projections:
        yield Spot(place, _joined(path, child), layout=layout, time_first=time_first)
        yield Spot(place, path, "inside", layout, child)
    yield Spot("softmax", path, "inside")


def _projections(module: nn.Module, children: set[str]) -> list[tuple[str, str, QkvLayout | None]]:
    """Place, child and layout of those of an attention; empty if it is none."""
    known = _by_class(module, KNOWN)
    separate = next((names for names in PROJECTIONS if set(names) <= children), None)
    pair = next((names for names in FUSED_PAIRS if set(names) <= children), None)
    fused = next((name for name in FUSED if name in children), None)
    query = pair[0] if pair is not None else None
    layout: QkvLayout | None
    if known is not None and known[0] in children:
        fused, layout = known[0], known[1](module)
    elif separate is not None:
        return [(place, name, None) for place, name in zip(("query", "key", "value"), separate, strict=True)]
    elif pair is not None:
        fused, layout = pair[1], KEY_AND_VALUE
    else:
        layout = QkvLayout()
    if fused is None or layout is None:
        return []
    alone = [("query", query, None)] if query is not None and "query" not in layout.places else []
    return [*alone, *((place, fused, layout) for place in layout.places)]


def _said(path: str, module: nn.Module, registered: dict[str, str]) -> Iterator[Spot]:
    for place, child in registered.items():
        target = _joined(path, child)
        if place == "qkv":
            layout = _by_class(module, _LAYOUTS)(module)
            for name in layout.places:
                yield Spot(name, target, layout=layout)
        else:
            yield Spot(place, target, {"softmax": "inside", "feed_forward": "input"}.get(place, "output"))


def _by_class(module: nn.Module, table: dict[tuple[str, str], Any]) -> Any:
    """What a table says of the class of a module, or of the nearest of its bases; None if nothing."""
    for kind in type(module).__mro__:
        if (kind.__module__, kind.__qualname__) in table:
            return table[kind.__module__, kind.__qualname__]
    return None


def _check_kind(kind: object) -> None:
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of nn.Module, got {kind!r}")


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _above(path: str) -> list[str]:
    """The paths of the modules around that one, the nearest last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def _joined(path: str, child: str) -> str:
    return ".".join(part for part in (path, child) if part)
