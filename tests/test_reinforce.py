"""The controller as a searcher: its gradient is that of the expected reward, and the same calls give the same bits."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reinforce_cases import play
from reinforce_cases import reward_of
from reinforce_cases import samples_of
from small_spaces import arms
from small_spaces import conditional
from small_spaces import every_sequence
from small_spaces import sites

from autodropout.search.controller import Controller
from autodropout.search.core import Search
from autodropout.search.reinforce import ControllerSearcher
from autodropout.search.reinforce import loss
from autodropout.search.searcher import Sample
from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace

# An entry of a gradient is a sum over at most 2^8 sequences of what some 2^5 operations in a row have rounded by 2^-53.
GRADIENT_ROUNDING = 2.0**-40


def small(space: SearchSpace, seed: int = 0) -> Controller:
    """Few weights, all of them away from zero, in float64."""
    controller = Controller(space, seed, layers=1, width=8, heads=2, dtype=torch.float64)
    shake(controller, seed)
    return controller


def shake(controller: Controller, seed: int = 0, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (controller.head, controller.bias):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def gradient(controller: Controller, value: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(value, list(controller.parameters()))
    return torch.cat([part.flatten() for part in found])


# --- the loss and its gradient ---


def test_gradient_of_the_loss_is_its_finite_difference() -> None:
    space = conditional()
    controller = small(space)
    sequences = every_sequence(space)[::9]
    generator = torch.Generator().manual_seed(0)
    shape = (len(sequences), len(space.tokens))
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    advantages = torch.randn(len(sequences), generator=generator, dtype=torch.float64)

    def value() -> torch.Tensor:
        evaluation = controller.evaluate(sequences)
        return loss(evaluation.log_probs, evaluation.entropies, weights, advantages, 0.3)

    found = gradient(controller, value())
    start = torch.nn.utils.parameters_to_vector(controller.parameters()).detach()

    def at(direction: torch.Tensor, step: float) -> float:
        torch.nn.utils.vector_to_parameters(start + step * direction, controller.parameters())
        with torch.no_grad():
            return float(value())

    for _ in range(5):
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        wide, narrow = ((at(direction, h) - at(direction, -h)) / (2 * h) for h in (2e-3, 1e-3))
        # Central differences err by c h^2 + O(h^4): three parts of the wide one's are gone in the narrow one.
        assert abs(wide - narrow) < 1e-4
        assert abs((4 * narrow - wide) / 3 - float(found @ direction)) <= abs(wide - narrow) / 30 + 1e-11


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_expected_gradient_is_that_of_the_enumerated_expected_reward(baseline: float) -> None:
    """Over all sequences, weighted by the probability with which the behaviour policy samples each: fresh and stale."""
    space = conditional()
    controller = small(space)
    sequences = every_sequence(space)
    rewards = torch.tensor([reward_of(sequence) for sequence in sequences], dtype=torch.float64)
    exact = gradient(controller, -(controller.log_prob(sequences).exp() * rewards).sum())
    for behaviour in (controller, small(space, seed=7)):
        evaluation = controller.evaluate(sequences)
        now = evaluation.log_probs.detach().sum(-1)
        then = behaviour.log_prob(sequences).detach()
        if behaviour is not controller:
            assert float((now - then).abs().max()) > 0.5  # truly stale
        # `loss` is a mean over samples: the mean over all sequences of what occurs `count * probability` times.
        occurs = len(sequences) * then.exp()
        weights = (occurs * (now - then).exp())[:, None].expand(-1, len(space.tokens))
        expected = gradient(
            controller, loss(evaluation.log_probs, evaluation.entropies, weights, rewards - baseline, 0.0)
        )
        assert float(exact.norm()) > 0.1
        assert float((expected - exact).abs().max()) <= GRADIENT_ROUNDING * float(exact.norm())


def test_without_weights_stale_samples_give_another_gradient() -> None:
    space = conditional()
    controller, behaviour = small(space), small(space, seed=7)
    sequences = every_sequence(space)
    rewards = torch.tensor([reward_of(sequence) for sequence in sequences], dtype=torch.float64)
    exact = gradient(controller, -(controller.log_prob(sequences).exp() * rewards).sum())
    evaluation = controller.evaluate(sequences)
    weights = (len(sequences) * behaviour.log_prob(sequences).detach().exp())[:, None]
    biased = gradient(controller, loss(evaluation.log_probs, evaluation.entropies, weights, rewards, 0.0))
    assert float((biased - exact).norm()) > 0.1 * float(exact.norm())


@pytest.mark.parametrize("elite_coefficient", [0.0, 0.7])
@pytest.mark.parametrize("stale", [0.3, 5.0])
@pytest.mark.parametrize("importance_weights", [True, False])
def test_an_update_takes_the_gradient_of_its_figures(
    importance_weights: bool, stale: float, elite_coefficient: float
) -> None:
    """Adam's first moment after one step is a tenth of the gradient: against advantages and weights computed here."""
    space = conditional()
    searcher = ControllerSearcher(
        space,
        batch_size=4,
        gradient_clip=1e9,
        entropy_coefficient=0.2,
        weight_clip=1.5,
        importance_weights=importance_weights,
        epochs=1,
        elites=3,
        elite_coefficient=elite_coefficient,
    )
    searcher.updates = 4  # with this batch 20 results, at least 6 for each elite
    searcher.controller.double()
    shake(searcher.controller)
    sequences = every_sequence(space)[3:40:10]
    now = searcher.controller.log_prob(sequences).detach().tolist()
    rewards = [1.0, 4.0, 2.0, 3.0]
    ages = [0, 2, 1, 0]
    recorded = [now[0] + 0.25, now[1] + stale, now[2] - 0.6, now[3] - 9.0]
    weights = [1.0, math.exp(-stale), math.exp(0.6), 1.0] if importance_weights else [1.0] * 4
    scale = math.sqrt((1.5**2 + 1.5**2 + 0.5**2 + 0.5**2) / 4)

    evaluation = searcher.controller.evaluate(sequences)
    expected = -0.2 * evaluation.entropies.sum() / 4
    for row in range(4):
        advantage = (rewards[row] - 2.5) / scale
        expected = expected - min(max(weights[row], 1 / 1.5), 1.5) * advantage * evaluation.log_probs[row].sum() / 4
    # Of the best three, those above the baseline of 2.5.
    expected = expected - elite_coefficient * (evaluation.log_probs[1].sum() + evaluation.log_probs[3].sum()) / 2
    exact = gradient(searcher.controller, expected)

    figures = searcher.update(samples_of(sequences, rewards, ages, recorded))
    moments = searcher.optimizer.state_dict()["state"]
    found = torch.cat([moments[index]["exp_avg"].flatten() for index in range(len(moments))]) * 10
    assert float((found - exact).abs().max()) <= GRADIENT_ROUNDING * float(exact.norm())
    assert figures["gradient_norm"] == pytest.approx(float(exact.norm()), rel=GRADIENT_ROUNDING)
    assert figures["loss"] == pytest.approx(float(expected.detach()), rel=GRADIENT_ROUNDING)
    assert figures["weights"] == pytest.approx(weights, rel=GRADIENT_ROUNDING)
    assert [figures["weights"][0], figures["weights"][3]] == [1.0, 1.0]
    assert figures["clipped"] == (0.0 if not importance_weights else 0.25 if stale < 0.4 else 0.5)
    assert figures["baseline"] == 2.5
    assert figures["elites"] == (2 if elite_coefficient else 0)
    assert figures["advantage_std"] == pytest.approx(scale, rel=1e-15)
    entropies = evaluation.entropies.detach()
    assert figures["entropy"] == pytest.approx(float(entropies.sum(-1).mean()), rel=1e-15)
    for kind in ("op", "size", "share"):
        asked = [
            float(entropies[row, position])
            for row, sequence in enumerate(sequences)
            for position, yes in enumerate(space.asked(sequence))
            if yes and space.tokens[position].kind == kind
        ]
        assert figures["entropy_by_kind"][kind] == pytest.approx(sum(asked) / len(asked), rel=1e-14)
    assert json.loads(json.dumps(figures)) == figures


# --- weights, baseline, scale, clips ---


def test_weights_are_exactly_1_when_all_samples_are_fresh() -> None:
    search = Search(ControllerSearcher(sites(2), seed=1, batch_size=4))
    seen = play(search, reward_of, trials=20)
    updates = [entry[0] for entry in seen if len(entry) == 1 and entry[0] is not None]
    assert len(updates) == 5
    for update in updates:
        assert update.ages == (0, 0, 0, 0)
        assert update.figures["weights"] == [1.0, 1.0, 1.0, 1.0]
        assert update.figures["clipped"] == 0.0


def test_weights_of_stale_samples_are_the_ratios_of_recorded_probabilities() -> None:
    searcher = ControllerSearcher(sites(2), seed=1, batch_size=4, epochs=1, weight_clip=1.2)
    search = Search(searcher)
    trials = {trial.number: trial for trial in (search.ask() for _ in range(12))}
    for number in range(12):
        batch = range(number - 3, number + 1) if number % 4 == 3 else []
        before = searcher.controller.log_prob([trials[late].choices for late in batch]).tolist() if batch else []
        update = search.tell(number, reward_of(trials[number].choices))
        if update is not None:
            age = number // 4
            assert update.ages == (age,) * 4
            ratios = [math.exp(now - trials[late].log_prob) for now, late in zip(before, update.trials, strict=True)]
            assert update.figures["weights"] == (pytest.approx(ratios, rel=1e-12) if age else [1.0] * 4)
            assert update.figures["clipped"] == sum(not 1 / 1.2 <= ratio <= 1.2 for ratio in ratios) / 4
    assert max(ratios) > 1.2
    assert min(ratios) < 1 / 1.2


def test_baseline_and_scale_are_moving_averages() -> None:
    space = arms(3)
    searcher = ControllerSearcher(space, batch_size=2, baseline_decay=0.75)
    batches = [(1.0, 3.0), (5.0, 7.0), (-2.0, 2.0)]
    # By hand. Baselines in use: 2, then .75 * 2 + .25 * 2 = 2, then .75 * 2 + .25 * 6 = 3.
    # Mean squares about them: 1; (9 + 25) / 2 = 17; (25 + 1) / 2 = 13. Averages: 1; .75 + 4.25 = 5; 3.75 + 3.25 = 7.
    for rewards, baseline, variance in zip(batches, (2.0, 2.0, 3.0), (1.0, 5.0, 7.0), strict=True):
        figures = searcher.update(samples_of([(0,), (1,)], rewards, (0, 0), (0.0, 0.0)))
        assert figures["baseline"] == baseline
        assert figures["advantage_std"] == math.sqrt(variance)


def test_normalised_advantages_forget_the_unit_of_the_reward() -> None:
    space = sites(1)

    def final(factor: float, normalize: bool) -> torch.Tensor:
        searcher = ControllerSearcher(space, batch_size=4, normalize_advantages=normalize, gradient_clip=1e9)
        play(Search(searcher), lambda choices: factor * reward_of(choices), trials=16)
        return searcher.controller.head.detach().clone()

    # A power of two changes no bit of a mantissa.
    assert torch.equal(final(1.0, True), final(256.0, True))
    assert not torch.equal(final(1.0, False), final(256.0, False))


def test_equal_rewards_teach_nothing() -> None:
    searcher = ControllerSearcher(sites(1), batch_size=4, entropy_coefficient=0.0)
    before = searcher.state_dict()["controller"]
    play(Search(searcher), lambda _: 93.0, trials=12)
    for name, value in searcher.controller.state_dict().items():
        assert torch.equal(value, before[name]), name


def taught(rewards: Sequence[float], updates: int = 3) -> bool:
    """Whether updates with the same rewards change any weight, where nothing but rewards can."""
    searcher = ControllerSearcher(sites(1), batch_size=len(rewards), entropy_coefficient=0.0, elites=1)
    before = searcher.state_dict()["controller"]
    for update in range(updates):
        proposals = [searcher.propose(update * len(rewards) + i).choices for i in range(len(rewards))]
        searcher.update(samples_of(proposals, rewards, [0] * len(rewards), [0.0] * len(rewards)))
    return any(not torch.equal(value, before[name]) for name, value in searcher.controller.state_dict().items())


@pytest.mark.parametrize(("size", "reward"), [(10, 0.9123), (12, 0.1), (12, -2.7), (20, 0.9123)])
def test_equal_rewards_whose_mean_is_rounded_teach_nothing(size: int, reward: float) -> None:
    """The mean of twelve times 0.1 is not 0.1: nor an advantage, nor a reason to imitate."""
    assert not taught([reward] * size)


def test_rewards_that_differ_by_rounding_teach_nothing() -> None:
    assert not taught([0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2])
    assert taught([0.3, 0.3 + 1e-13, 0.3, 0.3 + 1e-13])


def test_what_is_rounding_for_one_batch_counts_in_another() -> None:
    """Equal rewards away from the baseline are all equally good or bad."""
    searcher = ControllerSearcher(arms(2), batch_size=2)
    for rewards, scale in (((0.1, 0.1), 0.0), ((0.3, 0.3), math.sqrt(0.2 * 0.2**2))):
        figures = searcher.update(samples_of([(0,), (1,)], rewards, (0, 0), (0.0, 0.0)))
        assert figures["advantage_std"] == pytest.approx(scale, rel=1e-14)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    searchers = [ControllerSearcher(sites(1), batch_size=4, gradient_clip=clip, epochs=1) for clip in (1e9, 0.01)]
    norms = []
    for searcher in searchers:
        proposals = [searcher.propose(number).choices for number in range(4)]
        rewards = [reward_of(choices) for choices in proposals]
        figures = searcher.update(samples_of(proposals, rewards, (0,) * 4, (0.0,) * 4))
        moments = searcher.optimizer.state_dict()["state"].values()
        norms.append((figures["gradient_norm"], 10 * math.hypot(*(float(m["exp_avg"].norm()) for m in moments))))
    (reported, taken), (still_reported, clipped) = norms
    assert reported == still_reported
    assert reported > 0.01
    assert taken == pytest.approx(reported, rel=1e-5)  # float32
    assert clipped == pytest.approx(0.01, rel=1e-4)  # PyTorch adds 1e-6 to the norm


def imitated(searcher: ControllerSearcher, first: int, rewards: tuple[float, float]) -> int:
    """An update with these rewards for arms `first` and `first + 1`; how many elites it imitated."""
    samples = [Sample(first + i, (first + i,), 0.0, reward, 0) for i, reward in enumerate(rewards)]
    count = searcher.update(samples)["elites"]
    assert isinstance(count, int)
    return count


def test_the_elites_are_the_best_of_all_results_above_the_baseline() -> None:
    searcher = ControllerSearcher(arms(8), batch_size=2, baseline_decay=0.5, elites=3)
    searcher.updates = 8  # this batch is the ninth: six results for each elite
    # By hand. Baselines in use: 2, then 2, then (2 + 6) / 2 = 4.
    assert imitated(searcher, 0, (1.0, 3.0)) == 1
    assert imitated(searcher, 2, (9.0, 3.0)) == 3
    assert searcher.best == [(9.0, 2, (2,)), (3.0, 3, (3,)), (3.0, 1, (1,))]  # of equal ones the younger
    assert imitated(searcher, 4, (3.0, 5.0)) == 2
    assert searcher.best == [(9.0, 2, (2,)), (5.0, 5, (5,)), (3.0, 4, (4,))]


def test_elites_wait_for_six_results_each() -> None:
    searcher = ControllerSearcher(arms(8), batch_size=2, elites=1)
    counts = [imitated(searcher, first, (1.0, 3.0)) for first in (0, 2, 4)]
    assert counts == [0, 0, 1]


# --- what it does ---


@pytest.mark.parametrize("better", [0, 1])
def test_one_update_raises_the_probability_of_the_better_arm(better: int) -> None:
    searcher = ControllerSearcher(arms(2), batch_size=4, entropy_coefficient=0.0)
    sequences = [(0,), (1,), (1,), (0,)]
    rewards = [float(choice == better) for (choice,) in sequences]
    searcher.update(samples_of(sequences, rewards, (0,) * 4, (math.log(0.5),) * 4))
    assert float(searcher.controller.log_prob([(better,)]).detach()) > math.log(0.5)


def test_the_entropy_bonus_alone_flattens() -> None:
    space = conditional()
    searcher = ControllerSearcher(space, batch_size=8, entropy_coefficient=0.1)
    shake(searcher.controller, by=0.1)
    seen = play(Search(searcher), lambda _: 1.0, trials=8 * 15)
    updates = [entry[0].figures for entry in seen if len(entry) == 1 and entry[0] is not None]
    first, last = (updates[index]["entropy_by_kind"]["op"] for index in (0, -1))
    assert first < 0.9 * math.log(3)
    assert last > 0.99 * math.log(3)


def test_the_entropy_bonus_halves() -> None:
    """Equal rewards: what is left of the loss is -beta times the entropy."""
    searcher = ControllerSearcher(arms(5), batch_size=2, entropy_coefficient=0.4, entropy_half_life=2.0)
    for update in range(5):
        figures = searcher.update(samples_of([(0,), (1,)], (1.0, 1.0), (0, 0), (0.0, 0.0)))
        beta = 0.4 * 0.5 ** (update / 2)
        assert figures["loss"] == pytest.approx(-beta * figures["entropy"], rel=1e-6)  # float32


def test_more_epochs_go_further_until_the_ratios_leave_the_clip() -> None:
    sequences, rewards = [(0,), (1,), (1,), (0,)], [1.0, 0.0, 0.0, 1.0]

    def probability(**settings: Any) -> float:
        searcher = ControllerSearcher(arms(2), batch_size=4, entropy_coefficient=0.0, **settings)
        searcher.update(samples_of(sequences, rewards, (0,) * 4, (math.log(0.5),) * 4))
        return float(searcher.controller.log_prob([(0,)]).detach().exp())

    once = probability(epochs=1)
    assert once == probability(epochs=1, ratio_clip=0.0)
    assert probability(epochs=3) > once
    # Beyond the clip after the first step: the second has no gradient, and Adam's moment only decays.
    plain: dict[str, Any] = {"batch_size": 4, "entropy_coefficient": 0.0, "elite_coefficient": 0.0}
    searcher = ControllerSearcher(arms(2), **plain, epochs=2, ratio_clip=0.0)
    other = ControllerSearcher(arms(2), **plain, epochs=1)
    for one in (searcher, other):
        one.update(samples_of(sequences, rewards, (0,) * 4, (math.log(0.5),) * 4))
    twice, first = (one.optimizer.state_dict()["state"] for one in (searcher, other))
    assert first.keys() == twice.keys()
    for index, moments in first.items():
        assert torch.allclose(twice[index]["exp_avg"], 0.9 * moments["exp_avg"], rtol=2.0**-22, atol=0.0)


def test_imitating_the_best_raises_their_likelihood() -> None:
    """Sixteen tokens of two values, of which a batch of four says little about any."""

    def likelihood(**settings: Any) -> float:
        searcher = ControllerSearcher(arms(*[2] * 16), seed=0, batch_size=4, elites=4, **settings)
        play(Search(searcher), lambda choices: float(sum(choices)), trials=40)
        return float(searcher.controller.log_prob([elite.choices for elite in searcher.best]).mean().detach())

    assert likelihood() > likelihood(elite_coefficient=0.0)


def test_it_finds_a_planted_optimum() -> None:
    """256 sequences, a reward for each right token, noise with the standard deviation of one of them: 200 trials."""
    optimum = (2, 0, 3, 1)
    noise = random.Random(0)

    def reward(choices: Choices) -> float:
        return sum(choice == right for choice, right in zip(choices, optimum, strict=True)) + noise.gauss(0, 1)

    searcher = ControllerSearcher(arms(4, 4, 4, 4), seed=0)
    start = float(searcher.controller.log_prob([optimum]).detach().exp())
    play(Search(searcher), reward, trials=200)
    assert start == pytest.approx(1 / 256, rel=1e-5)  # float32
    assert float(searcher.controller.log_prob([optimum]).detach().exp()) > 0.5
