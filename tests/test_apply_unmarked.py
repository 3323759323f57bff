"""`apply_policy` on Transformers that do not mark their places: `transformers`' and timm's, by the names of modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from unmarked import IDS
from unmarked import MODELS
from unmarked import PATTERN
from unmarked import SEEN
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
from autodropout.conventions import register_places
from autodropout.policy import TOKEN_PLACES
from autodropout.sites import find_sites


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
