"""Training of translation models: loss and BLEU by hand, and a continuation that ends in the same bits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from sacrebleu.metrics import BLEU

from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import load_policy
from autodropout.reproduce.models.transformer import PAD
from autodropout.reproduce.models.transformer import Size
from autodropout.reproduce.models.transformer import Transformer
from autodropout.reproduce.parallel_corpus import Pairs
from autodropout.reproduce.parallel_corpus import ParallelCorpus
from autodropout.reproduce.transformer_methods import METHODS
from autodropout.reproduce.transformer_methods import STRENGTHS
from autodropout.reproduce.transformer_methods import Outside
from autodropout.reproduce.transformer_methods import method_policy
from autodropout.reproduce.translation_training import Prepared
from autodropout.reproduce.translation_training import TranslationRecipe
from autodropout.reproduce.translation_training import bleu
from autodropout.reproduce.translation_training import build_translator
from autodropout.reproduce.translation_training import example_input
from autodropout.reproduce.translation_training import put_policy
from autodropout.reproduce.translation_training import signature
from autodropout.reproduce.translation_training import smoothed_loss
from autodropout.reproduce.translation_training import train_translator
from autodropout.reproduce.translation_training import translated
from autodropout.reproduce.translation_training import untouched_bleu

CPU = torch.device("cpu")
SENTENCES = ("a b c d", "d c b a", "b d a c", "c a d b", "a c d b", "b a", "c d a")
LONG = "a " * 30
PAIRS = Pairs((*SENTENCES, LONG), (*(s.upper() for s in SENTENCES), "A"))
CORPUS = ParallelCorpus("letters", PAIRS, PAIRS, PAIRS, "0" * 64)
RECIPE = TranslationRecipe(
    Size(layers=2, width=12, heads=3, inner=16),
    vocabulary=270,
    epochs=3,
    batch_words=16,
    longest=10,
    learning_rate=1e-2,
    warmup=4,
    beam=2,
    penalty=0.6,
)
PREPARED = Prepared(RECIPE, CORPUS)
HAND = load_policy("hand-lm-v0")


def test_what_is_too_long_is_counted() -> None:
    assert (len(PREPARED.train), PREPARED.left_out) == (7, 1)
    with pytest.raises(ValueError, match="longest must leave some of the 8 training pairs, got 1"):
        Prepared(dataclasses.replace(RECIPE, longest=1), CORPUS)


def test_the_loss_by_hand() -> None:
    """Four words of probability 1/2, 1/4, 1/8, 1/8; the target is the second: nine tenths of log 4, and one tenth of
    the mean of all four, (1 + 2 + 3 + 3) / 4 log 2. What is padding counts nowhere."""
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]]]).log()
    found = smoothed_loss(logits, torch.tensor([[1, PAD]]))
    assert float(found) == pytest.approx((0.9 * 2 + 0.1 * 9 / 4) * math.log(2), rel=1e-6)


def test_bleu_by_hand() -> None:
    """Two sentences of 6 and 4 words; the references have 6 and 5.

    Of "the cat sat on the mat" against "the cat is on the mat": words 5 of 6, pairs "the cat", "on the", "the mat" 3 of
    5, triples "on the mat" 1 of 4, fours 0 of 3. Of "a b c d" against "a b c d e": 4 of 4, 3 of 3, 2 of 2, 1 of 1.
    Together 9/10, 6/8, 3/6, 1/4; the brevity penalty is exp(1 - 11/10).
    """
    expected = 100 * math.exp(1 - 11 / 10) * (9 / 10 * 6 / 8 * 3 / 6 * 1 / 4) ** (1 / 4)
    found = bleu(["the cat sat on the mat", "a b c d"], ["the cat is on the mat", "a b c d e"])
    assert found == pytest.approx(expected, rel=1e-12)
    assert untouched_bleu(Pairs(("a b c d",), ("a b c d",))) == pytest.approx(100)


def test_sacrebleu_says_what_it_documents() -> None:
    """The example of its README, with two references, which `bleu` has not; its other values to their digits."""
    references = [
        ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
        ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
    ]
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    found = BLEU().corpus_score(system, references)
    documented = "BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943 ratio = 0.944 hyp_len = 17 ref_len = 18)"
    assert str(found) == documented
    # 17 words, of which 14, 7 of 14, 5 of 11, 3 of 8 occur in a reference; 18 words wanted.
    assert found.score == pytest.approx(
        100 * math.exp(1 - 18 / 17) * (14 / 17 * 7 / 14 * 5 / 11 * 3 / 8) ** 0.25, rel=1e-12
    )
    assert bleu(system, references[0]) == BLEU().corpus_score(system, references[:1]).score
    assert signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def train(policy: Policy, seed: int = 0, **options: object) -> Transformer:
    model, _ = train_translator(RECIPE, policy, Outside(0.1), PREPARED, seed, CPU, **options)  # type: ignore[arg-type]
    return model


def same(one: Transformer, two: Transformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class KilledError(Exception):
    pass


def test_a_continuation_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = train(HAND)
    checkpoint = tmp_path / "state.pt"

    def kill(epoch: int, model: Transformer) -> None:
        if epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(HAND, checkpoint=checkpoint, on_model=kill)
    epochs: list[None] = []
    again = train(HAND, checkpoint=checkpoint, on_epoch=lambda: epochs.append(None))
    assert len(epochs) == RECIPE.epochs
    assert same(again, whole)
    assert not same(train(HAND, seed=1), whole)


def test_it_learns_to_translate() -> None:
    recipe = dataclasses.replace(RECIPE, size=Size(1, 32, 2, 32), epochs=150, batch_words=100, learning_rate=5e-3)
    model, _ = train_translator(recipe, Policy.uniform(None), Outside(), PREPARED, 0, CPU)
    found = translated(model, recipe, PREPARED.subwords, SENTENCES, CPU)
    assert found == [sentence.upper() for sentence in SENTENCES]
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_on_the_network(method: str) -> None:
    words = torch.tensor([[3, 4, 5, 6], [4, 5, PAD, PAD]])
    for strength in STRENGTHS[method] or (None,):
        policy, outside = method_policy(method, strength, HAND)
        model = build_translator(RECIPE, 9, outside, seed=0)
        keys = list(model.state_dict())
        put_policy(model, policy, RECIPE)
        assert list(model.state_dict()) == keys
        first, second = model(words, words), model(words, words)
        assert torch.isfinite(first).all()
        assert torch.equal(first, second) == (method == "none")
        model.eval()
        assert torch.equal(model(words, words), model(words, words))


def test_a_policy_reaches_every_attention() -> None:
    policy, outside = method_policy("dropout", 0.2, HAND)
    model = build_translator(RECIPE, 9, outside, seed=0)
    put_policy(model, policy, RECIPE)
    found = {name.removesuffix(".pattern_dropout") for name, _ in model.named_modules() if "pattern_dropout" in name}
    attentions = [f"encoder.layers.{i}.self_attention" for i in range(2)]
    attentions += [f"decoder.layers.{i}.{kind}_attention" for i in range(2) for kind in ("self", "cross")]
    forwards = [f"{side}.layers.{i}.feed_forward" for side in ("encoder", "decoder") for i in range(2)]
    assert found == {f"{at}.{place}" for at in attentions for place in ("softmax", "output")} | {
        f"{at}.{place}" for at in forwards for place in ("feed_forward", "residual")
    }


def test_a_policy_moves_by_depth_in_encoder_and_decoder_apart() -> None:
    """The sites of a place are at 0 and 1 in the encoder, at 0, 1/3, 2/3 and 1 in the decoder."""
    first, last = TokenPattern(1, rate=0.1), TokenPattern(1, rate=0.4)
    policy = Policy((Site("first", 0.0, "softmax", first), Site("last", 1.0, "softmax", last)))
    model = build_translator(RECIPE, 9, Outside(), seed=0)
    found = {site.name: site.pattern for site in apply_policy(model, policy, example_input(RECIPE))}
    assert found == {
        "encoder.layers.0.self_attention.softmax": first,
        "encoder.layers.1.self_attention.softmax": last,
        "decoder.layers.0.self_attention.softmax": first,
        "decoder.layers.0.cross_attention.softmax": first,
        "decoder.layers.1.self_attention.softmax": last,
        "decoder.layers.1.cross_attention.softmax": last,
    }
