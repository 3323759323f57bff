"""The controller: a distribution over all sequences and nothing else, whatever way it is computed."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_spaces import arms
from small_spaces import conditional
from small_spaces import every_sequence
from small_spaces import sites

from autodropout.search.controller import Controller
from autodropout.search.controller import isolated
from autodropout.search.controller import uniforms
from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace

ULP = 2.0**-52  # float64: distance of 1 from the next number


def opinionated(space: SearchSpace, seed: int = 0, dtype: torch.dtype = torch.float64) -> Controller:
    """A controller whose conditional distributions differ, and depend on the context: its heads are not zero."""
    controller = Controller(space, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        controller.head += 0.2 * torch.randn(controller.head.shape, generator=generator, dtype=dtype)
        controller.bias += 0.5 * torch.randn(controller.bias.shape, generator=generator, dtype=dtype)
    return controller


def rounding(space: SearchSpace) -> float:
    """Relative error of the probability of a sequence whose conditional distributions are rounded to float64.

    A token's probabilities add up to 1 within one rounding for each value, its subtraction and its logarithm; the
    logarithms of a sequence are added, and their sum of at most T log V + 30 (nats) is rounded T times.
    """
    tokens, values = len(space.tokens), max(len(token.values) for token in space.tokens)
    return ULP * tokens * (values + 2 + tokens * math.log(values) + 30)


@contextmanager
def threads(count: int) -> Iterator[None]:
    found = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(found)


def test_a_fresh_controller_is_exactly_uniform() -> None:
    space = conditional()
    controller = Controller(space, seed=5)
    sequences = every_sequence(space)
    with torch.no_grad():
        evaluation = controller.evaluate(sequences)
    for row, sequence in enumerate(sequences):
        for position, (token, asked) in enumerate(zip(space.tokens, space.asked(sequence), strict=True)):
            values = len(token.values) if asked else 1
            uniform = torch.zeros(values).log_softmax(0)
            assert evaluation.asked[row, position] == asked
            assert evaluation.log_probs[row, position] == uniform[0], (sequence, position)
            # The entropy sums `values` equal products, each rounded, of a probability that is rounded once more.
            error = abs(float(evaluation.entropies[row, position]) - math.log(values))
            assert error <= (values + 2) * 2.0**-23 * math.log(values), (sequence, position)


def test_a_fresh_controller_samples_the_value_that_the_uniform_number_falls_on() -> None:
    space = conditional()
    draws = uniforms(3, range(200), len(space.tokens))
    sampled, log_probs = Controller(space, seed=5, dtype=torch.float64).sample(draws)
    for sequence, row, log_prob in zip(sampled, draws.tolist(), log_probs.tolist(), strict=True):
        space.check(sequence)
        asked = space.asked(sequence)
        counts = [len(token.values) if yes else 1 for token, yes in zip(space.tokens, asked, strict=True)]
        assert sequence == tuple(int(u * count) for u, count in zip(row, counts, strict=True))
        assert abs(log_prob + sum(map(math.log, counts))) <= rounding(space)


def test_probabilities_of_all_sequences_add_up_to_1() -> None:
    for space in (conditional(), sites(1), arms(2, 1, 5)):
        probabilities = opinionated(space).log_prob(every_sequence(space)).detach().exp()
        assert probabilities.max() > 2 * probabilities.min()
        assert abs(float(probabilities.sum()) - 1) <= rounding(space)


def test_entropies_follow_the_chain_rule() -> None:
    space = conditional()
    controller = opinionated(space)
    sequences = every_sequence(space)
    log_probs = controller.log_prob(sequences).detach()
    enumerated = -(log_probs.exp() * log_probs).sum()
    chained = (log_probs.exp() * controller.entropy(sequences).detach().sum(-1)).sum()
    assert abs(float(chained - enumerated)) <= 2 * rounding(space) * float(enumerated)


def test_tokens_that_are_not_asked_are_certain_and_have_no_gradient() -> None:
    space = conditional()
    controller = opinionated(space)
    evaluation = controller.evaluate([(0, 0, 0, 0, 0, 0), (1, 1, 0, 2, 0, 0)])
    silent = ~evaluation.asked
    assert silent.tolist() == [[False, True, True, False, True, False], [False, False, True, False, True, False]]
    assert set(evaluation.log_probs[silent].tolist()) == {0.0}
    assert set(evaluation.entropies[silent].tolist()) == {0.0}
    (evaluation.log_probs[silent].sum() + evaluation.entropies[silent].sum()).backward()
    for name, parameter in controller.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_a_token_knows_all_before_it_and_nothing_after() -> None:
    space = arms(3, 3, 3, 3)
    controller = opinionated(space)
    base = controller.evaluate([(0, 0, 0, 0)]).entropies[0]
    for position in range(4):
        other = [0, 0, 0, 0]
        other[position] = 2
        changed = controller.evaluate([tuple(other)]).entropies[0]
        assert torch.equal(changed[: position + 1], base[: position + 1])
        assert (changed[position + 1 :] != base[position + 1 :]).all()


def test_sites_of_one_kind_share_a_vocabulary_yet_differ() -> None:
    space = conditional()
    controller = opinionated(space)
    assert controller.kinds == ("op", "size", "share")
    assert controller.head.shape[0] == 3 + 4 + 2
    first, second = controller.entropy([(0, 0, 0, 0, 0, 0)])[0][[0, 3]].tolist()
    assert first != second


def test_samples_invert_the_distribution_function() -> None:
    """Each uniform number lies where its choice begins and ends, by sums over the enumerated sequences."""
    space = conditional()
    controller = opinionated(space)
    probability = dict(
        zip(every_sequence(space), controller.log_prob(every_sequence(space)).exp().tolist(), strict=True)
    )

    def mass(prefix: Choices) -> float:
        return sum(p for sequence, p in probability.items() if sequence[: len(prefix)] == prefix)

    draws = uniforms(1, range(60), len(space.tokens))
    sampled, _ = controller.sample(draws)
    for sequence, row in zip(sampled, draws.tolist(), strict=True):
        for position, asked in enumerate(space.asked(sequence)):
            if asked:
                prefix, choice = sequence[:position], sequence[position]
                below = sum(mass((*prefix, earlier)) for earlier in range(choice)) / mass(prefix)
                width = mass((*prefix, choice)) / mass(prefix)
                # Sums of all probabilities, so of their errors.
                slack = len(probability) * rounding(space)
                assert below - slack <= row[position] <= below + width + slack, (sequence, position)
    assert len(set(sampled)) > 10


def test_cache_and_teacher_forcing_agree() -> None:
    """Within the rounding of one pass, measured against float64, as the two add up the same terms in another order."""
    space = sites(4)
    single = opinionated(space, dtype=torch.float32)
    double = opinionated(space)
    double.load_state_dict({name: value.double() for name, value in single.state_dict().items()})
    with isolated():
        sampled, cached = single.sample(uniforms(0, range(32), len(space.tokens)))
        forced, exact = single.log_prob(sampled).detach(), double.log_prob(sampled).detach()
        error = float((forced - exact).abs().max())
        assert 0 < error < 1e-4
        assert float((cached - exact).abs().max()) <= 4 * error
        # And in float64, where a rounding is 2^-29 times as large.
        again, cached = double.sample(uniforms(0, range(32), len(space.tokens)))
        assert float((cached - double.log_prob(again).detach()).abs().max()) <= 4 * error * 2.0**-29


def test_a_sequence_does_not_depend_on_those_sampled_with_it() -> None:
    space = sites(3)
    controller = opinionated(space)
    together, _ = controller.sample(uniforms(9, range(16), len(space.tokens)))
    for number in (0, 5, 15):
        alone, _ = controller.sample(uniforms(9, [number], len(space.tokens)))
        assert alone == [together[number]]


def test_uniform_numbers_derive_from_seed_and_number() -> None:
    assert torch.equal(uniforms(4, range(8), 5)[6], uniforms(4, [6], 5)[0])
    values = torch.cat([uniforms(4, range(50), 5).flatten(), uniforms(5, range(50), 5).flatten()])
    assert len(set(values.tolist())) == 500
    # Kolmogorov-Smirnov at alpha = 0.001: 1.95 / sqrt(n).
    ordered = values.sort().values
    steps = torch.arange(1, 501, dtype=torch.float64) / 500
    assert float(torch.maximum(steps - ordered, ordered - steps + 1 / 500).max()) < 1.95 / math.sqrt(500)


def test_state_goes_through_a_file_bit_for_bit() -> None:
    space = conditional()
    controller = opinionated(space, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(controller.state_dict(), file)
    file.seek(0)
    other = Controller(space, seed=99)
    other.load_state_dict(torch.load(file, weights_only=True))
    draws = uniforms(0, range(16), len(space.tokens))
    for name, value in controller.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.sample(draws)[0] == controller.sample(draws)[0]
    assert torch.equal(other.sample(draws)[1], controller.sample(draws)[1])


def test_seeds_differ_in_every_drawn_weight() -> None:
    one, two = Controller(conditional(), seed=-1), Controller(conditional(), seed=2**64 + 7)
    same = {name for name, value in one.state_dict().items() if torch.equal(value, two.state_dict()[name])}
    assert same == {name for name in one.state_dict() if "norm" in name or name in ("head", "bias")}


def test_pytorch_s_generator_is_neither_read_nor_changed() -> None:
    def everything() -> tuple[list[Choices], torch.Tensor]:
        controller = Controller(conditional(), seed=1)
        return controller.sample(uniforms(0, range(16), 6))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    choices, log_probs = everything()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again, same = everything()
    assert again == choices
    assert torch.equal(same, log_probs)


def test_isolated_gives_back_what_it_found() -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with threads(2), torch.autocast("cpu"):
            with isolated():
                assert torch.get_num_threads() == 1
                assert _products() in ("ieee", "highest")
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            with pytest.raises(RuntimeError, match="inside"), isolated():
                raise RuntimeError("inside")
            assert torch.get_num_threads() == 2
            assert torch.get_float32_matmul_precision() == "medium"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision(precision)


def _products() -> str:
    """How float32 is multiplied on the CPU, by the newer of the two settings that there is."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision


# Once set, the newer settings cannot be taken back in a process.
NEWER = """
import torch
from autodropout.search.controller import isolated
{setting}
matmul = torch.backends.mkldnn.matmul
before = matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
with isolated():
    assert matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before[1]
assert (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before
"""


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="older than these settings")
@pytest.mark.parametrize(
    "setting",
    [
        'torch.backends.cuda.matmul.fp32_precision = "tf32"',
        'torch.backends.fp32_precision = "tf32"',
        'torch.backends.mkldnn.matmul.fp32_precision = "bf16"',
    ],
)
def test_isolated_under_the_newer_settings_of_precision(setting: str) -> None:
    subprocess.run([sys.executable, "-c", NEWER.format(setting=setting)], check=True)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heads must divide width, got 3 for width 64"):
        Controller(conditional(), heads=3)
    with pytest.raises(ValueError, match="not asked"):
        Controller(conditional()).evaluate([(0, 1, 0, 0, 0, 0)])
