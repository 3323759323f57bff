"""`apply_policy` on Transformers that do not mark their places: `transformers`' and timm's, by the names of modules."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.oneformer.modeling_oneformer import OneFormerTransformerDecoderFFNLayer
from unmarked import IDS
from unmarked import MODELS
from unmarked import PATTERN
from unmarked import SEEN
from unmarked import SMALL
from unmarked import WORDS
from unmarked import everywhere
from unmarked import made
from unmarked import output

from autodropout import BernoulliPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import load_policy
from autodropout import pattern_dropout
from autodropout import remove_policy
from autodropout.apply import SiteDropout
from autodropout.conventions import _REGISTERED
from autodropout.conventions import find_spots
from autodropout.conventions import register_places
from autodropout.policy import TOKEN_PLACES
from autodropout.sites import find_sites
from autodropout.sites import layout_at
from autodropout.sites import sites_by_place


@pytest.mark.parametrize("name", MODELS)
def test_the_contracts_of_a_network_of_maps_hold(name: str) -> None:
    model, inputs = made(name), MODELS[name][1]
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    before = output(model.eval(), inputs)
    applied = apply_policy(model.train(), everywhere(PATTERN), inputs)
    assert {site.rate for site in applied} == {0.5 * 2 / 3}
    assert len(applied) == sum(isinstance(module, SiteDropout) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert not torch.equal(output(model, inputs), output(model, inputs))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(5)
        there = output(twin, inputs)
        torch.manual_seed(5)
        assert torch.equal(output(model, inputs), there)
    assert torch.equal(output(model.eval(), inputs), before)
    remove_policy(model)
    assert [type(module) for module in model.modules()] == classes
    model.train()
    assert torch.equal(output(model, inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_policy_of_the_language_model_fits(name: str) -> None:
    model, inputs = made(name), MODELS[name][1]
    applied = apply_policy(model, load_policy("hand-lm-v0"), inputs)
    assert {site.name.split(":")[1] for site in applied} <= set(TOKEN_PLACES)
    assert {site.name.split(":")[1] for site in applied} >= {"query", "softmax", "residual"}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_in_evaluation_the_model_s_own_attention_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(name), MODELS[name][1]
    apply_policy(model, everywhere(PATTERN), inputs)
    calls = []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    )
    output(model.eval(), inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_compiled_whole_it_drops_what_it_drops_eagerly(name: str) -> None:
    """One matrix for three places, and the two ways to the weights."""
    model, inputs = made(name), MODELS[name][1]
    del getattr(model, "h" if name == "gpt2" else "blocks")[1:]
    apply_policy(model.train(), everywhere(PATTERN, ("key", "softmax", "feed_forward")), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    eager = output(model, inputs)
    torch.manual_seed(3)
    there = output(compiled, inputs)
    torch.testing.assert_close(there, eager)


PLACES_OF_MATRICES = {
    ("gpt2", "query"): ("h.0.attn.c_attn", 0, 3),
    ("gpt2", "key"): ("h.0.attn.c_attn", 1, 3),
    ("gpt2", "value"): ("h.0.attn.c_attn", 2, 3),
    ("gpt2", "output"): ("h.0.attn.c_proj", 0, 1),
    ("gpt2", "residual"): ("h.0.mlp.c_proj", 0, 1),
    ("bert", "query"): ("encoder.layer.0.attention.self.query", 0, 1),
    ("bert", "key"): ("encoder.layer.0.attention.self.key", 0, 1),
    ("bert", "value"): ("encoder.layer.0.attention.self.value", 0, 1),
    ("bert", "output"): ("encoder.layer.0.attention.output.dense", 0, 1),
    ("bert", "residual"): ("encoder.layer.0.output.dense", 0, 1),
    ("vit", "query"): ("blocks.0.attn.qkv", 0, 3),
    ("vit", "key"): ("blocks.0.attn.qkv", 1, 3),
    ("vit", "value"): ("blocks.0.attn.qkv", 2, 3),
}


@pytest.mark.parametrize(("name", "place"), PLACES_OF_MATRICES)
def test_projections_are_masked_part_by_part(name: str, place: str) -> None:
    model = made(name).train()
    path, part, parts = PLACES_OF_MATRICES[name, place]
    module = model.get_submodule(path)
    x = torch.randn(2, 7, int(next(iter(dict(module.named_parameters()).values())).shape[0 if name == "gpt2" else 1]))
    plain = module(x)
    apply_policy(model, everywhere(PATTERN, (place,)), MODELS[name][1])
    torch.manual_seed(8)
    y = module(x).chunk(parts, -1)
    torch.manual_seed(8)
    expected = [*plain.chunk(parts, -1)]
    expected[part] = pattern_dropout(expected[part], PATTERN)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    assert (y[part] == 0).any()


def test_the_hidden_layer_is_what_goes_into_the_second_matrix() -> None:
    model = made("bert").train()
    module = model.get_submodule("encoder.layer.0.output.dense")
    assert isinstance(module, nn.Linear)
    x = torch.randn(2, 7, 64)
    apply_policy(model, everywhere(PATTERN, ("feed_forward",)), MODELS["bert"][1])
    torch.manual_seed(8)
    y = module(x)
    torch.manual_seed(8)
    assert torch.equal(y, F.linear(pattern_dropout(x, PATTERN), module.weight, module.bias))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", [PATTERN, TokenPattern(3, 1, rate=0.5, share_t=True), BernoulliPattern(0.4)])
def test_the_weights_of_an_attention_are_masked(attention: str, masked: bool, pattern: Pattern) -> None:
    """BERT's against the product written out, with a mask of padding, whether it is PyTorch's function or a softmax."""
    model = made("bert", attention).train()
    module = model.get_submodule("encoder.layer.0.attention.self")
    x = torch.randn(2, 7, 32)
    bias = torch.where(SEEN.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None] if masked else None
    apply_policy(model, everywhere(pattern, ("softmax",)), MODELS["bert"][1])
    torch.manual_seed(4)
    y = module(x, bias)[0]
    q, k, v = (getattr(module, name)(x).view(2, 7, 4, 8).transpose(1, 2) for name in ("query", "key", "value"))
    scores = q @ k.mT / 8**0.5
    weights = (scores if bias is None else scores + bias).softmax(-1)
    torch.manual_seed(4)
    expected = (pattern_dropout(weights, pattern, layout="NHQK") @ v).transpose(1, 2).reshape(2, 7, 32)
    torch.testing.assert_close(y, expected)
    assert (expected - (weights @ v).transpose(1, 2).reshape(2, 7, 32)).abs().max() > 0.01


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (4, 6, 8), (2, 3, 4, 6, 8)])
def test_attention_of_any_rank_and_with_boolean_masks(shape: tuple[int, ...], causal: bool) -> None:
    """Rate 0 leaves the function what it is: of no heads and of windows, with queries that see nothing."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None)

    module = Attention().train()
    x = torch.randn(shape)
    mask = torch.rand(6, 6) < 0.5
    mask[2] = False
    expected = module(x), module(x, mask)
    apply_policy(module, everywhere(TokenPattern(1, rate=0.0), ("softmax",)), x)
    torch.testing.assert_close(module(x), expected[0])
    torch.testing.assert_close(module(x, mask), expected[1])
    assert (module(x, mask)[..., 2, :] == 0).all()


def test_encoder_and_decoder_have_depths_of_their_own() -> None:
    sites = find_sites(made("t5"), MODELS["t5"][1], "residual")
    assert [(site.name.split(".")[0], site.depth) for site in sites] == [
        ("encoder", 0.0),
        ("encoder", 1.0),
        ("decoder", 0.0),
        ("decoder", 0.5),
        ("decoder", 1.0),
    ]
    queries = find_sites(made("t5"), MODELS["t5"][1], "query")
    assert [site.depth for site in queries] == [0.0, 1.0, *(i / 5 for i in range(6))]


def time_first_layer(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """In PyTorch's layout, which is the default: 7 tokens of 3 samples; of a decoder 5, and 7 of what it attends to."""
    source, target = torch.randn(7, 3, 16), torch.randn(5, 3, 16)
    if name == "encoder":
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0), (source,)
    if name == "decoder":
        return nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0), (target, source)
    if name == "nested":
        return Nested(), (source,)
    return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0), (source, target)


class Nested(nn.Module):
    """CLIP's layer: the feed-forward part is a module beside the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(16, 32), gelu=nn.GELU(), c_proj=nn.Linear(32, 16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x, x, x)[0]
        y: torch.Tensor = x + self.mlp(x)
        return y


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("encoder", {"linear2": 7}),
        ("decoder", {"linear2": 5}),
        ("nested", {"mlp.c_proj": 7}),
        ("both", {"encoder.layers.0.linear2": 7, "decoder.layers.0.linear2": 5}),
    ],
)
def test_where_time_comes_first_in_a_layer_it_does_in_its_feed_forward_part(name: str, lengths: dict[str, int]) -> None:
    model, inputs = time_first_layer(name)
    places = ("residual", "feed_forward")
    applied = apply_policy(model.train(), everywhere(PATTERN, places), inputs)
    assert {site.name: site.length for site in applied} == {
        f"{path}:{place}": length for path, length in lengths.items() for place in places
    }
    for path, length in lengths.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        x = torch.randn(length, 3, 32)
        torch.manual_seed(8)
        y = module(x)
        torch.manual_seed(8)
        x = pattern_dropout(x, PATTERN, layout="TNC")
        assert torch.equal(y, pattern_dropout(F.linear(x, module.weight, module.bias), PATTERN, layout="TNC"))
    remove_policy(model)
    with pytest.raises(ValueError, match="shared must be 'none' where the layout is 'TNC', got 'sample' at '.*:resid"):
        apply_policy(model, everywhere(BernoulliPattern(0.5, "sample"), ("residual",)), inputs)


def test_where_samples_come_first_in_a_layer_they_do_in_its_feed_forward_part() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    (site,) = find_sites(layer, torch.randn(3, 7, 16), "residual")
    assert site.lengths == (7,)


def fsmt() -> nn.Module:
    sizes = {"d_model": 16, "src_vocab_size": 60, "tgt_vocab_size": 60, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.FSMTModel(
        transformers.FSMTConfig(langs=["a", "b"], encoder_layers=1, decoder_layers=1, **sizes, **heads)
    )


def longformer() -> nn.Module:
    return transformers.LongformerModel(transformers.LongformerConfig(**SMALL, attention_window=4))


def led() -> nn.Module:
    sizes = {"d_model": 16, "vocab_size": 60, "max_encoder_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.LEDModel(
        transformers.LEDConfig(attention_window=4, encoder_layers=1, decoder_layers=1, **sizes, **heads)
    )


def layouts(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[tuple[int, str]]]:
    """By place: tokens and layout of each site."""
    found = sites_by_place(model, inputs, ("query", "key", "output", "residual"))
    return {
        place: [(site.lengths[0], layout_at(site.spot, model.get_submodule(site.target))) for site in sites]
        for place, sites in found.items()
    }


def test_layouts_of_classes_whose_matrices_see_time_first() -> None:
    """8 tokens, of a decoder 5, of 2 samples."""
    words = {"input_ids": torch.arange(16).view(2, 8) + 3}
    texts = {**words, "decoder_input_ids": words["input_ids"][:, :5]}
    assert layouts(fsmt(), texts) == {
        "query": [(8, "TNC"), (5, "TNC"), (5, "TNC")],
        "key": [(8, "TNC"), (5, "TNC"), (8, "TNC")],
        "output": [(8, "TNC"), (5, "TNC"), (5, "TNC")],
        "residual": [(8, "TNC"), (5, "TNC")],
    }
    assert layouts(longformer(), words) == {
        "query": [(8, "TNC"), (8, "TNC")],
        "key": [(8, "TNC"), (8, "TNC")],
        "output": [(8, "NTC"), (8, "NTC")],
        "residual": [(8, "NTC"), (8, "NTC")],
    }
    assert layouts(led(), texts) == {
        "query": [(8, "TNC"), (5, "NTC"), (5, "NTC")],
        "key": [(8, "TNC"), (5, "NTC"), (8, "NTC")],
        "output": [(5, "NTC"), (5, "NTC")],
        "residual": [(8, "NTC"), (5, "NTC")],
    }
    spots = list(find_spots(OneFormerTransformerDecoderFFNLayer(16, 32)))  # as its decoder calls it, see there
    assert [(spot.place, spot.time_first) for spot in spots] == [("feed_forward", True), ("residual", True)]


# Of timm: sites of "batch_norm", and the tokens at "residual" and at "query".
MATRICES_OF_OTHER_THINGS = {
    "coatnet_rmlp_nano_rw_224": (22, [], []),  # a table of relative positions, in attention by convolutions
    "maxvit_rmlp_pico_rw_256": (34, [4096] * 4 + [1024] * 4 + [256] * 10 + [64] * 4, [64] * 22),  # in one by matrices
    "mixer_s32_224": (0, [49] * 8, []),  # tokens as channels
}


@pytest.mark.parametrize("name", MATRICES_OF_OTHER_THINGS)
def test_what_has_no_tokens_is_no_feed_forward_part(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    image = torch.zeros(1, *model.default_cfg["input_size"], device="meta")
    found = sites_by_place(model, image, ("batch_norm", "residual", "feed_forward", "query"))
    tokens = {place: [site.lengths[0] for site in sites] for place, sites in found.items() if place != "batch_norm"}
    norms, residual, query = MATRICES_OF_OTHER_THINGS[name]
    assert (len(found["batch_norm"]), tokens) == (
        norms,
        {"residual": residual, "feed_forward": residual, "query": query},
    )


def test_two_matrices_inside_an_attention_are_no_feed_forward_part_of_the_layer() -> None:
    """A table of biases by distance, (T, T, heads), whatever the name of the module that makes it."""

    class Biased(CheckpointsItself):
        def __init__(self) -> None:
            super().__init__(reentrant=False)
            self.biases = nn.Sequential(OrderedDict(fc1=nn.Linear(1, 4), fc2=nn.Linear(4, 2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.biases(torch.zeros(6, 6, 1)).sum()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Biased()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc2(self.fc1(self.attention(x)))
            return y

    assert [site.name for site in find_sites(Layer(), torch.zeros(2, 6, 8), "residual")] == ["fc2:residual"]


def test_it_takes_an_example_to_know_the_places() -> None:
    with pytest.raises(ValueError, match="example must be given, got None: the places of BertModel"):
        apply_policy(made("bert"), everywhere(PATTERN))


def test_a_matrix_of_unknown_order_is_not_taken_for_thirds() -> None:
    """As the names of GPT-NeoX, Bloom and Falcon are, in a class that is none of theirs."""
    model = nn.ModuleDict({"query_key_value": nn.Linear(8, 24), "dense": nn.Linear(8, 8)})
    model.forward = lambda x: model["dense"](model["query_key_value"](x)[..., :8])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="model has no sites of place 'query' that the example reaches: ModuleDict"):
        apply_policy(model, everywhere(PATTERN, ("query",)), torch.zeros(2, 3, 8))


def test_attention_by_other_means_is_refused_while_training() -> None:
    """A model whose attention is changed after the policy came."""
    model = made("gpt2").train()
    apply_policy(model, everywhere(PATTERN, ("softmax",)), WORDS)

    def other(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("other", other)
    model.config._attn_implementation = "other"
    with pytest.raises(RuntimeError, match="GPT2Attention must compute its attention by scaled_dot_product_attention"):
        model(IDS)


class Odd(nn.Module):
    """An attention with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(8, 24)
        self.finish = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.make(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y: torch.Tensor = self.finish((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return y


def test_places_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodropout.conventions._REGISTERED", dict(_REGISTERED))
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="no sites of place 'query'"):
        apply_policy(Odd(), everywhere(PATTERN, ("query",)), x)
    register_places(Odd, qkv="make", softmax="", output="finish")
    applied = apply_policy(Odd(), everywhere(PATTERN, ("query", "key", "value", "softmax", "output")), x)
    assert [site.name for site in applied] == ["make:query", "make:key", "make:value", ":softmax", "finish:output"]
    with pytest.raises(TypeError, match="kind must be a subclass of nn.Module, got 3"):
        register_places(3, query="q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="place must be one of .*, got 'colour'"):
        register_places(Odd, colour="make")
    with pytest.raises(TypeError, match="query must be the path of a module, got 3"):
        register_places(Odd, query=3)  # type: ignore[arg-type]


class Rounded(nn.Module):
    """What quantisation-aware training puts around a matrix: its weights in steps."""

    def __init__(self, matrix: nn.Linear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix.weight.mul(64).round().div(64), self.matrix.bias)


def test_averaged_and_wrapped_models_are_left_in_peace() -> None:
    """A moving average of the weights; and matrices in a wrapper, which is then the place."""
    model = made("bert")
    apply_policy(model.train(), everywhere(PATTERN, TOKEN_PLACES), MODELS["bert"][1])
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(output(average.module.eval(), WORDS), output(model.eval(), WORDS))
    remove_policy(model)

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and not isinstance(module, Rounded):
                setattr(module, name, Rounded(child))
    before = output(model, WORDS)
    assert len(apply_policy(model.train(), everywhere(PATTERN, TOKEN_PLACES), WORDS)) == 12
    assert not torch.equal(output(model, WORDS), output(model, WORDS))
    assert torch.equal(output(model.eval(), WORDS), before)


class CheckpointsItself(nn.Module):
    """An attention by four projections, of which a checkpoint computes the inner part."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        inner = F.scaled_dot_product_attention
        y = checkpoint(inner, q, k, v, use_reentrant=self.reentrant) if self.training else inner(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def test_an_attention_that_checkpoints_a_part_of_itself_is_refused() -> None:
    """Its recomputation would not find the pattern, and its gradients would be others."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(CheckpointsItself(reentrant=True))
    apply_policy(model, Policy((Site("weights", 0.0, "softmax", TokenPattern(2, 2, rate=0.5)),)), x)
    with pytest.raises(RuntimeError, match="must not checkpoint a part of itself"):
        model(x)
    with torch.no_grad():  # nothing to compute again
        model(x)
