"""The encoder-decoder Transformer against loops over queries and keys in NumPy; padding, causality, cached decoding."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout.policy import LAYER_PLACES
from autodropout.reproduce.models.transformer import BASE
from autodropout.reproduce.models.transformer import PAD
from autodropout.reproduce.models.transformer import Attention
from autodropout.reproduce.models.transformer import Past
from autodropout.reproduce.models.transformer import Size
from autodropout.reproduce.models.transformer import Transformer
from autodropout.sites import find_sites

SMALL = Size(layers=2, width=12, heads=3, inner=20)
# float64: sums of at most 2^6 products of magnitude at most 2^4 in a few layers of layer norms, which may magnify.
ROUNDING = 2.0**-36
# Sinusoids are computed in float32: those of positions below 16 are off by at most 2^-20. Four layers of layer norms.
SINUSOIDS = 2.0**-12
SOURCE = torch.tensor([[3, 7, 1, 9, 4], [5, 2, 8, PAD, PAD]])
WORDS = torch.tensor([[1, 6, 2, 3], [1, 10, 7, 5]])

Weights = dict[str, numpy.ndarray]


def naive_attention(w: Weights, at: str, x: numpy.ndarray, seen: numpy.ndarray, causal: bool) -> numpy.ndarray:
    """(T, C) of one sentence without padding: every score by itself."""
    width = x.shape[1] // 3
    out = numpy.zeros_like(x)
    for head in range(3):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            allowed = range(t + 1) if causal else range(len(seen))
            query = (w[f"{at}.to_query.weight"] @ x[t])[part]
            scores = [query @ (w[f"{at}.to_key.weight"] @ seen[j])[part] / math.sqrt(width) for j in allowed]
            total = sum(math.exp(score - max(scores)) for score in scores)
            for j, score in zip(allowed, scores, strict=True):
                value = (w[f"{at}.to_value.weight"] @ seen[j])[part]
                out[t, part] += math.exp(score - max(scores)) / total * value
    result: numpy.ndarray = out @ w[f"{at}.to_output.weight"].T
    return result


def naive_logits(model: Transformer, source: list[int], words: list[int]) -> numpy.ndarray:
    """(T, vocabulary) of one sentence without padding, step by step as the paper has it."""
    w = {name: value.detach().numpy() for name, value in model.named_parameters()}
    channels = model.size.width

    def norm(x: numpy.ndarray, name: str) -> numpy.ndarray:
        centred = x - x.mean(1, keepdims=True)
        variance = (centred**2).mean(1, keepdims=True)
        y: numpy.ndarray = centred / numpy.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
        return y

    def embedded(sentence: list[int]) -> numpy.ndarray:
        rows = []
        for position, word in enumerate(sentence):
            angles = [position * 10_000.0 ** (-2 * k / channels) for k in range(channels // 2)]
            sinusoid = numpy.array([*map(math.sin, angles), *map(math.cos, angles)])
            rows.append(w["embedding.weight"][word] * math.sqrt(channels) + sinusoid)
        return numpy.array(rows)

    def feed_forward(x: numpy.ndarray, at: str) -> numpy.ndarray:
        hidden = numpy.maximum(x @ w[f"{at}.up.weight"].T + w[f"{at}.up.bias"], 0)
        y: numpy.ndarray = hidden @ w[f"{at}.down.weight"].T + w[f"{at}.down.bias"]
        return y

    memory = embedded(source)
    for number in range(model.size.layers):
        at = f"encoder.layers.{number}"
        attended = naive_attention(w, f"{at}.self_attention", memory, memory, causal=False)
        memory = norm(memory + attended, f"{at}.norm_self")
        memory = norm(memory + feed_forward(memory, f"{at}.feed_forward"), f"{at}.norm_feed_forward")
    x = embedded(words)
    for number in range(model.size.layers):
        at = f"decoder.layers.{number}"
        x = norm(x + naive_attention(w, f"{at}.self_attention", x, x, causal=True), f"{at}.norm_self")
        x = norm(x + naive_attention(w, f"{at}.cross_attention", x, memory, causal=False), f"{at}.norm_cross")
        x = norm(x + feed_forward(x, f"{at}.feed_forward"), f"{at}.norm_feed_forward")
    logits: numpy.ndarray = x @ w["embedding.weight"].T
    return logits


def with_stated_weights(size: Size = SMALL, vocabulary: int = 11) -> Transformer:
    """In float64, the weights without any generator: 0.4 sin(1), 0.4 sin(2), ... in order of registration."""
    model = Transformer(vocabulary, size).double()
    first = 1
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.4 * steps.sin().view_as(parameter))
            first += parameter.numel()
    return model


def test_logits_are_those_of_the_loops() -> None:
    """Also of the sentence that a longer one in the batch has padded."""
    model = with_stated_weights()
    found = model(SOURCE, WORDS).detach().numpy()
    for sentence in range(2):
        source = [word for word in SOURCE[sentence].tolist() if word != PAD]
        expected = naive_logits(model, source, WORDS[sentence].tolist())
        numpy.testing.assert_allclose(found[sentence], expected, rtol=0, atol=SINUSOIDS)


def test_padding_of_either_side_has_no_influence() -> None:
    model = with_stated_weights()
    alone = model(SOURCE[1:, :3], WORDS[1:, :3])
    wide = model(torch.nn.functional.pad(SOURCE[1:, :3], (0, 6)), torch.nn.functional.pad(WORDS[1:, :3], (0, 5)))
    assert float((wide[:, :3] - alone).detach().abs().max()) <= ROUNDING
    # Whatever the embedding of the padding is.
    with torch.no_grad():
        model.embedding.weight[PAD] += 100
    changed = model(torch.nn.functional.pad(SOURCE[1:, :3], (0, 6)), WORDS[1:, :3])
    others = torch.arange(11) != PAD  # whose logits do not read that row
    assert float((changed - alone).detach()[:, :, others].abs().max()) <= ROUNDING


def test_what_comes_later_has_no_influence() -> None:
    model = with_stated_weights()
    changed = WORDS.clone()
    changed[:, 2] = 9
    before, after = model(SOURCE, WORDS), model(SOURCE, changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:], after[:, 2:]).all(-1).any()


@pytest.mark.parametrize("cuts", [(1, 2, 3), (2,), (3,)])
def test_decoding_with_the_past_is_one_pass(cuts: tuple[int, ...]) -> None:
    model = with_stated_weights()
    encoded = model.encode(SOURCE)
    past: list[Past] | None = None
    parts = []
    for begin, end in zip((0, *cuts), (*cuts, 4), strict=True):
        logits, past = model.decode(WORDS[:, begin:end], encoded, past)
        parts.append(logits)
    assert float((torch.cat(parts, dim=1) - model(SOURCE, WORDS)).detach().abs().max()) <= ROUNDING
    assert past is not None
    assert [layer.own.keys.shape for layer in past] == [(2, 3, 4, 4)] * 2
    assert [layer.source.values.shape for layer in past] == [(2, 3, 5, 4)] * 2


def test_gradients_are_differences_of_the_loss() -> None:
    """Along a random direction of every matrix, with the same mask at every place of every call."""
    model = with_stated_weights(Size(layers=1, width=4, heads=2, inner=4), vocabulary=6)
    pattern = TokenPattern(2, 1, rate=0.4)
    source, words = torch.tensor([[1, 4, 3], [2, 5, PAD]]), torch.tensor([[1, 3], [1, 2]])
    apply_policy(model, Policy(tuple(Site(place, 0.0, place, pattern) for place in LAYER_PLACES)), (source, words))
    names = [name for name, _ in model.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (source, words))
        total: torch.Tensor = logits.logsumexp(-1).sum()
        return total

    with_masks = loss(*values)
    assert not torch.equal(model.eval()(source, words).logsumexp(-1).sum(), with_masks)
    model.train()
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)  # each weight on its own would take a minute


def test_sites_are_in_order_of_the_layers() -> None:
    model = Transformer(11, SMALL)
    for place in LAYER_PLACES:
        names = [site.name for site in find_sites(model, (SOURCE, WORDS), place)]
        if place in ("feed_forward", "residual"):
            paths = [f"{side}.layers.{i}.feed_forward" for side in ("encoder", "decoder") for i in range(2)]
        else:
            paths = [f"encoder.layers.{i}.self_attention" for i in range(2)]
            paths += [f"decoder.layers.{i}.{kind}_attention" for i in range(2) for kind in ("self", "cross")]
        assert names == [f"{path}.{place}" for path in paths]
    assert len({site.name for place in LAYER_PLACES for site in find_sites(model, (SOURCE, WORDS), place)}) == 38


def test_an_untrained_model_knows_nothing() -> None:
    """What the last layer gives is normalised, |x|^2 = C, and the embeddings are normal with a variance of 1 / C: the
    logits are normal with a variance of 1, and the expected loss of random words is log V + 1/2. The words that were
    read are the exception: they are part of x, and their logits up to |x| |e|, e having a length of about 1, less than
    1.5. Of the 9 that a position can be made of, each adds less than exp(1.5 sqrt(C)) to the sum of V exp(logit).
    """
    torch.manual_seed(2)
    vocabulary, size = 5000, Size(layers=2, width=16, heads=4, inner=16)
    model = Transformer(vocabulary, size)
    words = torch.randint(1, vocabulary, (3, 200, 5))
    with torch.no_grad():
        logits = model(words[0, :, :4], words[1])
        loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[2].flatten()))
    assert model.embedding.weight.norm(dim=1).max() < 2.5
    sigma = math.sqrt(1 / words[2].numel())  # of the mean of so many logits of variance 1
    most = math.log1p(9 * math.exp(1.5 * math.sqrt(size.width)) / (vocabulary * math.exp(0.5)))
    assert -4 * sigma <= loss - math.log(vocabulary) - 0.5 <= most + 4 * sigma


def test_parameters_of_the_base_model() -> None:
    """65 million in table 3 of the paper, with a vocabulary of about 37,000: 4 C^2 an attention, 18 of them; 2 C F + F
    + C a feed-forward part, 12; 2 C a norm, 30; and the embedding."""
    with torch.device("meta"):
        model = Transformer(37_000, BASE)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 18 * 4 * 512**2 + 12 * (2 * 512 * 2048 + 2048 + 512) + 30 * 2 * 512 + 37_000 * 512
    assert count == pytest.approx(65e6, rel=0.04)


def test_dropout_outside_the_layers_is_off_in_evaluation() -> None:
    torch.manual_seed(4)
    model = Transformer(11, SMALL, dropout=0.5, variational=True)
    assert not torch.equal(model(SOURCE, WORDS), model(SOURCE, WORDS))
    model.eval()
    assert torch.equal(model(SOURCE, WORDS), model(SOURCE, WORDS))


def test_a_masked_key_gets_no_weight() -> None:
    attention = Attention(SMALL)
    x = torch.randn(1, 2, 12)
    seen = attention.keys_values(torch.randn(1, 3, 12))
    hidden = torch.tensor([[False, False, True]])
    weights = []
    attention.softmax.register_forward_hook(lambda module, args, output: weights.append(output))
    attention(x, seen, hidden)
    assert torch.equal(weights[0][..., 2], torch.zeros(1, 3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Size(0, 12, 3, 8), "layers must be at least 1, got 0"),
        (lambda: Size(1, 12, 5, 8), r"width must be even and divisible by heads \(5\), got 12"),
        (lambda: Transformer(1, SMALL), "vocabulary must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
