"""Transformer-XL against loops over queries, keys and distances in NumPy, and segments against one long pass."""

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
from autodropout.reproduce.models.transformer_xl import INIT_STD
from autodropout.reproduce.models.transformer_xl import PENN_TREEBANK
from autodropout.reproduce.models.transformer_xl import RelativeAttention
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.reproduce.models.transformer_xl import shifted
from autodropout.reproduce.models.transformer_xl import sinusoids

SMALL = Size(layers=3, width=12, heads=3, inner=20)
# float64: sums of at most 2^6 products of magnitude at most 2^4 in a few layers of layer norms, which may magnify.
ROUNDING = 2.0**-36
# Frozen: of `test_losses_are_those_of_the_loops_and_stay`.
GOLDEN_LOSS = 2.48157


def naive_attention(attention: RelativeAttention, x: numpy.ndarray, memory: numpy.ndarray) -> numpy.ndarray:
    """(T, C) of one sample: every score by itself."""
    weight = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    seen = numpy.concatenate((memory, x))
    width = x.shape[1] // attention.heads
    out = numpy.zeros_like(x)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            i = len(memory) + t
            query = (weight["to_query.weight"] @ x[t])[part]
            scores = []
            for j in range(i + 1):
                key = (weight["to_key.weight"] @ seen[j])[part]
                angles = [(i - j) * 10_000.0 ** (-2 * k / x.shape[1]) for k in range(x.shape[1] // 2)]
                sinusoid = numpy.array([*map(math.sin, angles), *map(math.cos, angles)])
                position = (weight["to_position.weight"] @ sinusoid)[part]
                score = (query + weight["u"][head, 0]) @ key + (query + weight["v"][head, 0]) @ position
                scores.append(score / math.sqrt(width))
            weights = numpy.exp(numpy.array(scores) - max(scores))
            weights /= weights.sum()
            for j in range(i + 1):
                out[t, part] += weights[j] * (weight["to_value.weight"] @ seen[j])[part]
    result: numpy.ndarray = out @ weight["to_output.weight"].T
    return result


def naive_losses(model: TransformerXL, words: numpy.ndarray, targets: numpy.ndarray) -> numpy.ndarray:
    """(T,) of one text without memory, each step as the paper has it."""
    weight = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def norm(x: numpy.ndarray, name: str) -> numpy.ndarray:
        centred = x - x.mean(1, keepdims=True)
        variance = (centred**2).mean(1, keepdims=True)
        y: numpy.ndarray = centred / numpy.sqrt(variance + 1e-5) * weight[f"{name}.weight"] + weight[f"{name}.bias"]
        return y

    x = weight["embedding.weight"][words] * math.sqrt(model.size.width)
    for number, layer in enumerate(model.layers):
        at = f"layers.{number}"
        x = norm(x + naive_attention(layer.attention, x, x[:0]), f"{at}.norm_attention")
        hidden = numpy.maximum(x @ weight[f"{at}.up.weight"].T + weight[f"{at}.up.bias"], 0)
        x = norm(x + hidden @ weight[f"{at}.down.weight"].T + weight[f"{at}.down.bias"], f"{at}.norm_feed_forward")
    logits = x @ weight["embedding.weight"].T + weight["bias"]
    losses: numpy.ndarray = numpy.log(numpy.exp(logits).sum(1)) - logits[range(len(targets)), targets]
    return losses


def with_stated_weights(model: TransformerXL) -> TransformerXL:
    """In float64, the weights without any generator: 0.4 sin(1), 0.4 sin(2), ... in order of registration."""
    model.double()
    first = 1
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.4 * steps.sin().view_as(parameter))
            first += parameter.numel()
    return model


def test_losses_are_those_of_the_loops_and_stay() -> None:
    model = with_stated_weights(TransformerXL(11, SMALL))
    text = torch.arange(15) ** 2 % 11
    words, targets = text[:-1], text[1:]
    first, memories = model(words[None, :6], targets[None, :6])
    second, _ = model(words[None, 6:], targets[None, 6:], memories)
    found = torch.cat((first, second), dim=1)[0].detach().numpy()
    expected = naive_losses(model, words.numpy(), targets.numpy())
    # The sinusoids are in float32, as above; three layers of layer norms.
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-14)
    assert found.mean() == pytest.approx(GOLDEN_LOSS, abs=2.0**-14)


def test_gradients_are_differences_of_the_loss() -> None:
    """Of every weight, by a segment with memory and with the same mask at every place of every call."""
    model = with_stated_weights(TransformerXL(5, Size(layers=1, width=4, heads=2, inner=4)))
    pattern = TokenPattern(2, 1, rate=0.4)
    apply_policy(model, Policy(tuple(Site(place, 0.0, place, pattern) for place in LAYER_PLACES)))
    words, targets = torch.tensor([[0, 3, 1], [2, 2, 4]]), torch.tensor([[3, 1, 4], [2, 4, 0]])
    memories = torch.arange(16, dtype=torch.float64).cos().view(1, 2, 2, 4)
    names = [name for name, _ in model.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        losses, _ = torch.func.functional_call(
            model, dict(zip(names, weights, strict=True)), (words, targets, memories)
        )
        return losses.sum()

    with_masks = loss(*values)
    assert not torch.equal(model.eval()(words, targets, memories)[0].sum(), with_masks)
    model.train()
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("memory", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 5])
def test_attention_is_that_of_the_loops(memory: int, length: int) -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(SMALL).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, past = torch.randn(2, length, 12).double(), torch.randn(2, memory, 12).double()
    y = attention(x, past, sinusoids(memory + length, 12).double()).detach()
    for sample in range(2):
        expected = naive_attention(attention, x[sample].numpy(), past[sample].numpy())
        # The sinusoids are computed in float32: distances below 9 are off by at most 2^-21 radians.
        numpy.testing.assert_allclose(y[sample].numpy(), expected, rtol=0, atol=2.0**-16)


def test_shifted_by_its_definition() -> None:
    scores = torch.arange(2 * 3 * 7.0).view(2, 3, 7)
    found = shifted(scores)
    for t in range(3):
        for j in range(7 - 3 + t + 1):
            assert torch.equal(found[:, t, j], scores[:, t, j + 3 - 1 - t])


def test_segments_with_memory_are_one_long_pass() -> None:
    torch.manual_seed(1)
    model = TransformerXL(30, SMALL).double()
    text = torch.randint(30, (2, 13))
    words, targets = text[:, :-1], text[:, 1:]
    whole, _ = model(words, targets)
    memories, parts = None, []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        losses, memories = model(words[:, begin:end], targets[:, begin:end], memories)
        parts.append(losses)
    assert float((torch.cat(parts, dim=1) - whole).detach().abs().max()) <= ROUNDING


def test_a_memory_has_no_gradient_and_what_comes_later_no_influence() -> None:
    torch.manual_seed(1)
    model = TransformerXL(30, SMALL)
    words = torch.randint(30, (1, 6))
    losses, memories = model(words, words)
    assert not memories.requires_grad
    changed = words.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 30
    assert torch.equal(model(changed, words)[0][0, :4], losses[0, :4])
    assert not torch.equal(model(changed, words)[0][0, 4:], losses[0, 4:])


def test_an_untrained_model_knows_nothing() -> None:
    """Logits of a normalised vector and weights of standard deviation s are normal with variance s^2 C: the expected
    loss of random words is log V + s^2 C / 2, up to terms of s^4 C^2 / V. The mean of n losses has a standard deviation
    of s sqrt(C / n) if logits of different words are independent; four of them."""
    torch.manual_seed(2)
    vocabulary, size = 5000, Size(layers=2, width=64, heads=4, inner=64)
    model = TransformerXL(vocabulary, size)
    with torch.no_grad():
        losses, _ = model(torch.randint(vocabulary, (8, 64)), torch.randint(vocabulary, (8, 64)))
    variance = INIT_STD**2 * size.width
    assert abs(float(losses.mean()) - math.log(vocabulary) - variance / 2) <= 4 * math.sqrt(variance / losses.numel())


def test_the_adaptive_softmax_is_a_distribution() -> None:
    torch.manual_seed(3)
    model = TransformerXL(30, Size(2, 12, 3, 8, cutoffs=(5, 12)))
    words = torch.randint(30, (1, 4)).expand(30, 4)
    losses, _ = model(words, torch.arange(30)[:, None].expand(30, 4))
    total = losses.detach().double().neg().exp().sum(0)
    assert float((total - 1).abs().max()) <= 30 * 2.0**-20  # each probability: float32, a few operations


def test_parameters() -> None:
    with torch.device("meta"):
        model = TransformerXL(10_000, PENN_TREEBANK)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(24e6, rel=0.03)


def test_dropout_outside_the_layers_is_off_in_evaluation() -> None:
    torch.manual_seed(4)
    model = TransformerXL(30, SMALL, dropout=0.5, variational=True)
    words = torch.randint(30, (2, 6))
    assert not torch.equal(model(words, words)[0], model(words, words)[0])
    model.eval()
    assert torch.equal(model(words, words)[0], model(words, words)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Size(0, 12, 3, 8), "layers must be at least 1, got 0"),
        (lambda: Size(1, 12, 5, 8), r"width must be even and divisible by heads \(5\), got 12"),
        (lambda: TransformerXL(1, SMALL), "vocabulary must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
