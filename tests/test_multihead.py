"""`nn.MultiheadAttention` with patterns inside: against PyTorch's function, and against the masks put on by hand."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from unmarked import PATTERN
from unmarked import everywhere

from autodropout import BernoulliPattern
from autodropout import Pattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout import remove_policy
from autodropout.multihead import Inside
from autodropout.multihead import multi_head_attention
from autodropout.policy import TOKEN_PLACES
from autodropout.sites import find_sites

INSIDE = ("query", "key", "value", "softmax")
NOTHING = TokenPattern(1, rate=0.0)
SAMPLES, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 4


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.train()


def inputs(module: nn.MultiheadAttention, same: bool, batched: bool = True) -> tuple[torch.Tensor, ...]:
    """Query, key and value; one tensor three times, or three."""
    torch.manual_seed(1)
    sizes = [(QUERIES, WIDTH)] if same else [(QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim)]
    tensors = [torch.randn(SAMPLES, *size) for size in sizes]
    if not batched:
        tensors = [x[0] for x in tensors]
    elif not module.batch_first:
        tensors = [x.transpose(0, 1) for x in tensors]
    return (*tensors, *tensors, *tensors) if same else tuple(tensors)


def masks(kind: str, keys: int) -> dict[str, Any]:
    """No row without a key that is seen."""
    seen = torch.rand(QUERIES, keys) < 0.6
    seen[:, 0] = True
    padding = torch.zeros(SAMPLES, keys, dtype=torch.bool)
    padding[1, -2:] = True
    by_head = torch.randn(SAMPLES * HEADS, QUERIES, keys)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": ~seen},
        "both": {"attn_mask": ~seen, "key_padding_mask": padding},
        "added, by head": {"attn_mask": by_head},
        "causal": {"attn_mask": torch.ones(QUERIES, keys, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "boolean", "both", "added, by head", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
)
def test_a_pattern_of_rate_0_leaves_it_what_it_is(options: dict[str, Any], kind: str, need_weights: bool) -> None:
    """Written out against PyTorch's function, forward and backward."""
    module = attention(**options)
    for same in (True, False) if module.kdim == WIDTH else (False,):
        x = [tensor.requires_grad_() for tensor in inputs(module, same)]
        arguments = {**masks(kind, QUERIES if same else KEYS), "need_weights": need_weights}
        plain, masked = copy.deepcopy(module), copy.deepcopy(module)
        example = (*inputs(module, same),)
        applied = apply_policy(masked, everywhere(NOTHING, INSIDE), example)
        assert [site.name for site in applied] == [f":{place}" for place in INSIDE]
        expected, got = plain(*x, **arguments), masked(*x, **arguments)
        torch.testing.assert_close(got, expected)
        grads = [
            torch.autograd.grad(y[0].square().sum(), [x[0], *m.parameters()])
            for y, m in ((got, masked), (expected, plain))
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_without_a_batch_and_with_weights_by_head() -> None:
    module = attention()
    x = inputs(module, same=False, batched=False)
    options: list[dict[str, Any]] = [{}, {"average_attn_weights": False}, {"need_weights": False}]
    expected = [module(*x, **option) for option in options]
    apply_policy(module, everywhere(NOTHING, INSIDE), inputs(module, same=False))
    torch.testing.assert_close([module(*x, **option) for option in options], expected)


def test_keys_that_were_projected_before() -> None:
    module = attention()
    q, k, v = inputs(module, same=False)
    static = torch.randn(SAMPLES * HEADS, KEYS, WIDTH // HEADS)
    arguments = [q, k, v, WIDTH, HEADS, module.in_proj_weight, module.in_proj_bias, None, None, True, 0.0]
    arguments += [module.out_proj.weight, module.out_proj.bias]
    inside = Inside(lambda place, x: x, lambda scores: scores.softmax(-1), F.scaled_dot_product_attention)
    for options in ({"static_k": static}, {"static_k": static, "static_v": static}):
        expected = F.multi_head_attention_forward(*arguments, **options)
        torch.testing.assert_close(multi_head_attention(inside, *arguments, **options), expected)
    with pytest.raises(ValueError, match="query must have 8 channels, got 16"):
        multi_head_attention(inside, q, k, v, 8, *arguments[4:])
    for name, shape in (("attn_mask", (QUERIES, KEYS)), ("key_padding_mask", (SAMPLES, KEYS))):
        with pytest.raises(TypeError, match=f"{name} must be bool or floating, got torch.int64"):
            multi_head_attention(inside, *arguments, **{name: torch.zeros(shape, dtype=torch.int64)})


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one row": ({"attn_mask": torch.zeros(1, KEYS)}, ValueError, r"attn_mask must have shape .*, got \(1, 7\)"),
    "one head": (
        {"attn_mask": torch.zeros(1, QUERIES, KEYS)},
        ValueError,
        r"attn_mask .* \(12, 5, 7\), got \(1, 5, 7\)",
    ),
    "one sample": (
        {"key_padding_mask": torch.zeros(1, KEYS)},
        ValueError,
        r"key_padding_mask must have shape \(3, 7\), got \(1, 7\)",
    ),
    "no mask": ({"is_causal": True}, ValueError, "attn_mask must be the causal mask where is_causal is True, got None"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_that_pytorch_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str, need_weights: bool
) -> None:
    module = attention()
    x = inputs(module, same=False)
    with pytest.raises((RuntimeError, AssertionError)):
        module(*x, need_weights=need_weights, **arguments)
    apply_policy(module, everywhere(PATTERN, ("softmax",)), x)
    with pytest.raises(error, match=message):
        module(*x, need_weights=need_weights, **arguments)


@pytest.mark.parametrize("need_weights", [False, True])
def test_under_autocast(need_weights: bool) -> None:
    """As far from float32 as PyTorch's function under autocast is, or twice that: it rounds at other steps."""
    module = attention(batch_first=True)
    x = inputs(module, same=True)
    arguments = {**masks("both", QUERIES), "need_weights": need_weights}
    expected = module(*x, **arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        own = module(*x, **arguments)[0]
        apply_policy(module, everywhere(NOTHING, INSIDE), x)
        y = module(*x, **arguments)[0]
    assert y.dtype == own.dtype
    assert (y - expected).abs().max() <= 2 * (own - expected).abs().max()


PATTERNS = [
    PATTERN,
    TokenPattern(3, 1, rate=0.5, share_c=True),
    BernoulliPattern(0.4),
    BernoulliPattern(0.5, shared="sample"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("batch_first", "same"), itertools.product([False, True], [False, True]))
@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("need_weights", [False, True])
def test_each_place_is_masked_and_no_other(
    place: str, batch_first: bool, same: bool, need_weights: bool, pattern: Pattern
) -> None:
    """Against the products written out, samples first whatever the module's order."""
    module = attention(batch_first=batch_first)
    x = inputs(module, same)
    plain = module(*x)[0]
    apply_policy(module, everywhere(pattern, (place,)), x)
    torch.manual_seed(4)
    y, weights = module(*x, need_weights=need_weights)
    matrices, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    made = {}
    torch.manual_seed(4)
    for part, tensor, matrix, bias in zip(INSIDE[:3], x, matrices, biases, strict=True):
        made[part] = F.linear(tensor if batch_first else tensor.transpose(0, 1), matrix, bias)
        if part == place:
            made[part] = pattern_dropout(made[part], pattern)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in made.values())
    used = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
    if place == "softmax":
        used = pattern_dropout(used, pattern, layout="NHQK")
    expected = module.out_proj((used @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y if batch_first else y.transpose(0, 1), expected)
    if need_weights:
        torch.testing.assert_close(weights, used.mean(1))
    assert (y - plain).abs().max() > 0.01


def test_the_lengths_of_queries_and_keys_are_known() -> None:
    module = attention(add_zero_attn=True)
    sites = {place: find_sites(module, inputs(module, same=False), place) for place in (*INSIDE, "output")}
    assert {place: site.lengths for place, (site,) in sites.items()} == {
        "query": (QUERIES,),
        "key": (KEYS,),
        "value": (KEYS,),
        "softmax": (KEYS + 1,),
        "output": (QUERIES,),
    }


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_an_encoder_is_left_to_it(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation is bitwise what it was, by the same function; the contracts of a policy hold."""
    model = encoder()
    x = torch.randn(SAMPLES, QUERIES, WIDTH)
    padding = torch.zeros(SAMPLES, QUERIES, dtype=torch.bool)
    padding[1, -2:] = True
    example = {"src": x, **({"src_key_padding_mask": padding} if padded else {})}
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    calls = []
    own = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or own(*args))
    with torch.no_grad():
        before = model.eval()(**example)
        applied = apply_policy(model.train(), everywhere(PATTERN, TOKEN_PLACES), example)
        assert len(applied) == 2 * 6
        calls.clear()
        assert torch.equal(model.eval()(**example), before)
        assert len(calls) == 2
    assert list(model.state_dict()) == keys
    model.train()
    assert not torch.equal(model(**example), model(**example))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(5)
        there = twin(**example)
        torch.manual_seed(5)
        assert torch.equal(model(**example), there)
    remove_policy(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model.eval()(**example), before)


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_compiles_whole(masked: bool) -> None:
    """With a mask it is said that it is causal: to find out, PyTorch's encoder looks at values, policy or not."""
    model = encoder().train()
    x = torch.randn(SAMPLES, QUERIES, WIDTH)
    arguments = {"mask": nn.Transformer.generate_square_subsequent_mask(QUERIES), "is_causal": True} if masked else {}
    apply_policy(model, everywhere(PATTERN, TOKEN_PLACES), {"src": x, **arguments})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    eager = model(x, **arguments)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x, **arguments), eager)


def test_attentions_to_other_sequences_have_places() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True).train()
    example = (torch.randn(2, KEYS, WIDTH), torch.randn(2, QUERIES, WIDTH))
    sites = find_sites(model, example, "key")
    assert [(site.name, site.lengths) for site in sites] == [
        ("encoder.layers.0.self_attn:key", (KEYS,)),
        ("decoder.layers.0.self_attn:key", (QUERIES,)),
        ("decoder.layers.0.multihead_attn:key", (KEYS,)),
    ]


def test_projections_that_are_applied_by_a_function() -> None:
    """torchvision's Swin gives the weights of its matrices to a function, and masks come into it."""
    torch.manual_seed(0)
    model = torchvision.models.swin_t(num_classes=4)
    block = model.features[1][0].attn  # type: ignore[index, union-attr]
    x = torch.randn(2, 7, 7, 96)
    plain = block(x)
    applied = apply_policy(block.train(), everywhere(PATTERN, ("key", "output")), x)
    assert [site.name for site in applied] == [":key", ":output"]
    kept: dict[str, torch.Tensor] = {}
    for place in ("key", "output"):
        getattr(block, f"pattern_dropout_{place}").register_forward_hook(
            lambda _module, args, y, place=place: kept.update({place: (args[0].detach(), y.detach())})
        )
    torch.manual_seed(2)
    y = block(x)
    windows = x.view(2, 49, 96)
    before, after = kept["key"]
    torch.testing.assert_close(before, F.linear(windows, block.qkv.weight[96:192], block.qkv.bias[96:192]))
    torch.manual_seed(2)
    assert torch.equal(after, pattern_dropout(before, PATTERN))
    assert torch.equal(y.flatten(1, 2), kept["output"][1])
    assert not torch.equal(y, plain)
    assert torch.equal(block.eval()(x), plain)
    torch._dynamo.reset()
    block.train()
    torch.manual_seed(2)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), y)


class Pretending(nn.MultiheadAttention):
    """Another computation while it trains than while it is looked at."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (query, None) if self.training else super().forward(query, *args, **kwargs)


def test_what_does_not_happen_while_training_is_refused() -> None:
    module = Pretending(WIDTH, HEADS)
    apply_policy(module, everywhere(PATTERN, ("key",)), inputs(module, same=True))
    with pytest.raises(RuntimeError, match="Pretending must project by .* for a pattern on 'key', but did not"):
        module.train()(*inputs(module, same=True))
