"""One matrix for query, key and value, in the orders that classes of timm and `transformers` have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from unmarked import IDS
from unmarked import PATTERN
from unmarked import everywhere

from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout.conventions import _LAYOUTS
from autodropout.conventions import _REGISTERED
from autodropout.conventions import register_places
from autodropout.masked import SiteDropout
from autodropout.qkv_layouts import KNOWN
from autodropout.qkv_layouts import QkvLayout

PARTS = ("query", "key", "value")
HIDDEN, HEADS, LAYERS = 32, 4, 1
SIZES = {
    "vocab_size": 100,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {"vocab_size": 100, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
FALCON = {**SIZES, "alibi": False}
NEW_FALCON = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
WORDS = {"input_ids": IDS + 3}
IMAGE = {"x": torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)}
LARGE_IMAGE = {"x": torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)}


def of_transformers(name: str, attention: str = "sdpa", **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(transformers, f"{name}Model")
        model: nn.Module = kind._from_config(kind.config_class(**sizes), attn_implementation=attention)
        return model

    return make


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options)


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_seq_len=64, vocab_size=100)
    config.attn_config.clip_qkv = 8.0
    config.attn_config.kv_n_heads, config.attn_config.rope_theta = 2, 10_000.0
    config.ffn_config.ffn_hidden_size = 64
    config.ffn_config.hidden_size = HIDDEN
    model: nn.Module = transformers.DbrxModel(config)
    return model


# The model, what it is called with, the path of a matrix of its first attention.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "GPT-NeoX": (of_transformers("GPTNeoX", **SIZES), WORDS, "layers.0.attention.query_key_value"),
    "Bloom": (
        of_transformers("Bloom", "eager", vocab_size=100, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
        WORDS,
        "h.0.self_attention.query_key_value",
    ),
    "GPT-NeoX, Japanese": (
        of_transformers("GPTNeoXJapanese", "eager", **SIZES),
        WORDS,
        "layers.0.attention.query_key_value",
    ),
    "Persimmon": (of_transformers("Persimmon", **SIZES), WORDS, "layers.0.self_attn.query_key_value"),
    "Falcon": (of_transformers("Falcon", **FALCON, multi_query=False), WORDS, "h.0.self_attention.query_key_value"),
    "Falcon, one key": (of_transformers("Falcon", **FALCON), WORDS, "h.0.self_attention.query_key_value"),
    "Falcon, two keys": (of_transformers("Falcon", **NEW_FALCON), WORDS, "h.0.self_attention.query_key_value"),
    "Falcon, positions by distance": (
        of_transformers("Falcon", **{**FALCON, "alibi": True}, multi_query=False),
        WORDS,
        "h.0.self_attention.query_key_value",
    ),
    "Phi-3": (of_transformers("Phi3", **SIZES, num_key_value_heads=2), WORDS, "layers.0.self_attn.qkv_proj"),
    "BigCode, one key": (of_transformers("GPTBigCode", **GPT_SIZES), WORDS, "h.0.attn.c_attn"),
    "BigCode": (of_transformers("GPTBigCode", **GPT_SIZES, multi_query=False), WORDS, "h.0.attn.c_attn"),
    "CodeGen": (of_transformers("CodeGen", **GPT_SIZES, rotary_dim=4), WORDS, "h.0.attn.qkv_proj"),
    "DBRX": (dbrx, WORDS, "blocks.0.norm_attn_norm.attn.Wqkv"),
    "GPT-2": (of_transformers("GPT2", **GPT_SIZES), WORDS, "h.0.attn.c_attn"),
    "ModernBERT": (of_transformers("ModernBert", **SIZES), WORDS, "layers.0.attn.Wqkv"),
    "ViT": (of_timm("vit_tiny_patch16_224", img_size=64, depth=1), IMAGE, "blocks.0.attn.qkv"),
    "LeViT": (of_timm("levit_128s", img_size=64), IMAGE, "stages.0.blocks.0.attn.qkv"),
    "LeViT, smaller maps": (of_timm("levit_128s", img_size=64), IMAGE, "stages.1.downsample.attn_downsample.kv"),
    "TinyViT": (of_timm("tiny_vit_5m_224"), IMAGE, "stages.1.blocks.0.attn.qkv"),
    "EfficientFormer": (of_timm("efficientformer_l1"), LARGE_IMAGE, "stages.3.blocks.4.token_mixer.qkv"),
    "Global context ViT": (of_timm("gcvit_xxtiny"), LARGE_IMAGE, "stages.0.blocks.1.attn.qkv"),
    "MaxViT": (
        of_timm("maxvit_rmlp_pico_rw_256"),
        {"x": torch.linspace(-1, 1, 3 * 256 * 256).view(1, 3, 256, 256)},
        "stages.0.blocks.0.attn_block.attn.qkv",
    ),
    "PVT": (of_timm("pvt_v2_b0"), IMAGE, "stages.0.blocks.0.attn.kv"),
}


class Inputs(TorchFunctionMode):
    """Keeps query, key and value of every attention, whether it is PyTorch's function or two products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, ...]] = []
        self.first: tuple[torch.Tensor, ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            names = {**dict(zip(PARTS, args, strict=False)), **(kwargs or {})}
            self.seen.append(tuple(names[place] for place in PARTS))
        elif getattr(func, "__name__", "") in ("matmul", "__matmul__", "bmm") and args[0].dim() == 4:
            if self.first is None:
                self.first = args[:2]
            else:
                self.seen.append((*self.first, args[1]))
                self.first = None
        return func(*args, **(kwargs or {}))


OF_THREE_DIMENSIONS = ("Bloom", "GPT-NeoX, Japanese")  # their products of matrices


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_THREE_DIMENSIONS])
def test_each_part_is_what_attention_is_made_of(name: str) -> None:
    """By gradients: the query of the attention depends on all channels of the part that is called so, on no others."""
    torch.manual_seed(0)
    make, inputs, path = MODELS[name]
    model = make().eval()
    module = model.get_submodule(path)
    applied = apply_policy(model, everywhere(PATTERN, PARTS), inputs)
    dropouts = [child for child in module.children() if isinstance(child, SiteDropout)]
    assert any(site.name.startswith(path) for site in applied)
    layout = dropouts[0].layout_of_parts
    assert isinstance(layout, QkvLayout)
    assert {dropout.place for dropout in dropouts} == set(layout.places)

    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, y: torch.Tensor) -> torch.Tensor:
        kept.append(torch.randn_like(y).requires_grad_())
        return kept[-1]

    module.register_forward_hook(keep)
    mode = Inputs()
    with mode:
        model(**inputs)
    (output,) = kept
    found: set[str] = set()
    for attention in mode.seen:
        for place, tensor in zip(PARTS, attention, strict=True):
            weighted = (tensor * torch.rand_like(tensor)).sum()
            (gradient,) = torch.autograd.grad(weighted, output, retain_graph=True, allow_unused=True)
            if gradient is None:
                continue
            found.add(place)
            for other, part in zip(layout.places, layout.split(gradient), strict=True):
                touched = (part != 0).flatten(0, -2).any(0)
                assert touched.all() if other == place else not touched.any(), (place, other)
        if found:  # what comes later depends on all of it
            break
    assert found == set(layout.places)


BY_HAND = ("GPT-NeoX", "GPT-NeoX, Japanese", "Bloom", "Falcon, two keys", "Phi-3", "CodeGen", "LeViT")


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("place", PARTS)
def test_one_part_is_masked_and_the_others_are_left_alone(name: str, place: str) -> None:
    """To the bit, with the mask of the part alone."""
    torch.manual_seed(0)
    make, inputs, path = MODELS[name]
    model = make()
    module = model.get_submodule(path).eval()  # LeViT's has a batch normalisation
    x = torch.randn(2, 7, int(next(module.parameters()).shape[1]))
    plain = module(x)
    apply_policy(model, everywhere(PATTERN, (place,)), inputs)
    getattr(module, f"pattern_dropout_{place}").train()
    torch.manual_seed(8)
    y = dict(zip(PARTS, by_hand(name, module(x)), strict=True))
    expected = dict(zip(PARTS, by_hand(name, plain), strict=True))
    torch.manual_seed(8)
    expected[place] = pattern_dropout(expected[place], PATTERN)
    assert all(torch.equal(y[part], expected[part]) for part in PARTS)
    assert (y[place] == 0).any()
    assert torch.equal(module.eval()(x), plain)


def by_hand(name: str, y: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value as (N, T, heads * channels), from the code of the models, with indices written out."""
    channels = torch.arange(y.shape[-1])
    if name in ("GPT-NeoX", "GPT-NeoX, Japanese", "Bloom"):  # 4 heads: 8 channels of query, of key, of value
        return [y[..., (channels % 24) // 8 == part] for part in range(3)]
    if name == "CodeGen":  # 4 shards of query, value, key, 8 channels each
        return [y[..., (channels % 24) // 8 == part] for part in (0, 2, 1)]
    if name == "Falcon, two keys":  # for each of 2 keys: 2 heads of queries, the key, the value
        return [y[..., (channels % 32) < 16], y[..., (channels % 32) // 8 == 2], y[..., (channels % 32) // 8 == 3]]
    if name == "Phi-3":  # 4 heads of queries, 2 of keys, 2 of values
        return [y[..., :32], y[..., 32:48], y[..., 48:]]
    assert name == "LeViT"  # of each of 4 heads 16 channels of query, 16 of key, 32 of value
    return [y[..., (channels % 64) < 16], y[..., (channels % 64) // 16 == 1], y[..., (channels % 64) >= 32]]


def test_phi_4_has_the_order_of_phi_3() -> None:
    """The whole model sees and hears; its attention to words alone is small."""
    kind = transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAttention
    config = transformers.Phi4MultimodalConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    matrix, layout = KNOWN[kind.__module__, kind.__qualname__]
    y = torch.randn(2, 7, getattr(kind(config, 0), matrix).out_features)
    for got, expected in zip(layout(kind(config, 0)).split(y), by_hand("Phi-3", y), strict=True):
        assert torch.equal(got, expected)


def test_join_is_the_inverse_of_split() -> None:
    y = torch.randn(2, 3, 48)
    for layout in (
        QkvLayout(),
        QkvLayout(groups=4),
        QkvLayout((4, 1, 1), 2),
        QkvLayout((1, 3), places=("key", "value")),
    ):
        assert torch.equal(layout.join(layout.split(y)), y)


class HeadsFirst(nn.Module):
    """An attention of one's own whose matrix has the heads first."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.make = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.make(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_layout_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are dropped whole leave nothing, if they are really the values."""
    monkeypatch.setattr("autodropout.conventions._REGISTERED", dict(_REGISTERED))
    monkeypatch.setattr("autodropout.conventions._LAYOUTS", dict(_LAYOUTS))
    register_places(HeadsFirst, layout=lambda module: QkvLayout(groups=module.heads), qkv="make", softmax="")
    model, x = HeadsFirst().train(), torch.randn(2, 5, 8)
    assert len(apply_policy(model, everywhere(PATTERN, (*PARTS, "softmax")), x)) == 4
    model.make.pattern_dropout_value.pattern = TokenPattern(1, rate=1.0)  # type: ignore[union-attr, assignment]
    assert not model(x).any()
    with pytest.raises(TypeError, match="layout must be a function from the module to a QkvLayout, got 3"):
        register_places(HeadsFirst, layout=3, qkv="make")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout must be None without a path of 'qkv'"):
        register_places(HeadsFirst, layout=lambda module: QkvLayout(), softmax="")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"shares": (1, 0, 1)}, r"shares must be whole numbers from 1, got \(1, 0, 1\)"),
        ({"shares": (1, 1)}, "places must be some of 'query', 'key', 'value', each once"),
        ({"places": ("query", "key", "softmax")}, "places must be some of .* got .*'softmax'"),
    ],
)
def test_bad_layouts_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QkvLayout(**arguments)
    with pytest.raises(ValueError, match=r"channels must be a multiple of 2 \* \(1, 1, 1\), got 9"):
        QkvLayout(groups=2).split(torch.zeros(9))


def test_a_matrix_that_convolves_has_no_tokens() -> None:
    with pytest.raises(ValueError, match="model has no sites of place 'query'"):
        apply_policy(timm.create_model("levit_conv_128s", img_size=64), everywhere(PATTERN, ("query",)), IMAGE["x"])
