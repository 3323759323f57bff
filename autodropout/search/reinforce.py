"""The controller as a searcher: REINFORCE on finished samples, however stale they are, and imitation of the best."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor

from ..patterns.checks import flag
from ..patterns.checks import integer
from ..patterns.checks import real
from .controller import Controller
from .controller import Evaluation
from .controller import isolated
from .controller import uniforms
from .searcher import Proposal
from .searcher import Sample
from .searcher import Searcher
from .space import Choices
from .space import SearchSpace

BLOCK = 16  # proposals that are sampled together: numbers [16 k, 16 k + 16)
SELECTION = 6  # results for each elite, at least, before the elites are imitated
ROUNDING = 2.0**-48  # of a reward or a baseline, relative: what rewards that should be equal may differ by
TINY = 1e-12  # the least that a learning rate, a half-life or a clip may be


def loss(
    log_probs: Tensor, entropies: Tensor, weights: Tensor, advantages: Tensor, entropy_coefficient: float
) -> Tensor:
    """`-mean(w_i * A_i * log P(r_i)) - beta * mean(H_i)`, to be minimised: good samples and entropy rise.

    Of the entropy only the conditional distributions along the samples are differentiated, not which samples there are.

    Args:
        log_probs: (M, T) of the tokens of each sample, with gradient; their sum is log P(r_i).
        entropies: (M, T) of the distributions that they come from, with gradient; their sum is H_i.
        weights: (M, T), without gradient: w_i, the same for all tokens of a sample in a first epoch.
        advantages: (M,), without gradient.
        entropy_coefficient: beta.
    """
    gain = (weights * advantages[:, None] * log_probs).sum(-1).mean()
    return -gain - entropy_coefficient * entropies.sum(-1).mean()


class Elite(NamedTuple):
    """A result among the best: its reward, the number of its trial and the choices."""

    reward: float
    number: int
    choices: Choices


class ControllerSearcher(Searcher):
    """The paper's searcher: a controller that proposes, and learns from the rewards by policy gradient.

    An update minimises `-mean(w_i * A_i * log P(r_i; theta)) - beta * mean(H_i)` over `batch_size` finished samples
    (`loss`), plus `-gamma * mean(log P(e_j; theta))` over the elites. The paper gives REINFORCE, a moving-average
    baseline and the importance weights; the rest is ours:

    - *Advantage* `A_i = (reward_i - baseline) / scale`. The baseline is an exponential moving average of the means of
      the batches, the first mean to begin with. An update uses the baseline from *before* its batch, so that the
      estimate is unbiased: no sample is compared with itself, the first update excepted. The scale is the root of the
      like average of `mean((reward - baseline)^2)`, *with* the batch: it is one positive factor for all samples, so it
      does not turn the gradient, and it keeps a single reward, of a training that diverged for example, from becoming
      an advantage of more than `sqrt(batch_size / (1 - baseline_decay))`. With it metrics of any unit need the same
      settings. A metric that can be worse by many powers of ten (a perplexity) is better searched as its logarithm:
      such a reward dominates the averages for a while, and hides the differences between the others.
    - *Importance weight* `w_i = P(r_i; theta now) / P(r_i; theta when sampled)`, clipped to `[1/c, c]`. From below,
      too, which gives up some of the correction: over long sequences most ratios are close to 0, and with them
      nearly all that stale samples have to teach. A sample of age 0 was drawn from the controller as it is now, so its
      probability then is the one computed now, and its weight is exactly 1.
    - *Entropy* `H_i`: the sum of the entropies of the distributions along the sample, in nats. Its coefficient halves
      every `entropy_half_life` updates.
    - *Elites* e_j: the best `elites` results so far, of those above the baseline; of equal ones the younger. Their
      likelihood is raised (priority queue training, Abolafia et al. 2018, arXiv 1801.03526): a batch teaches once, but
      its best samples go on teaching. Not before there are `SELECTION` results for each elite, because the best of few
      are the lucky ones, and what is imitated is proposed and so selected again. `elite_coefficient=0` leaves the
      paper's gradient.
    - *Step*: Adam on the gradient, whose norm is clipped. With `epochs` more than 1 a batch is used again: the weight
      of each token is multiplied by its ratio P(now) / P(at the start of the update), and a token whose ratio is beyond
      `1 + ratio_clip` (below `1 - ratio_clip`) in the direction of its advantage no longer pulls (PPO's rule). In the
      first epoch all ratios are 1, so that `epochs=1` is plain REINFORCE.

    The defaults are for budgets of 200 and 400 trials, chosen on made-up tasks of 24 tokens with noise of 1.5 and
    effects of about 1 a token. One epoch on each batch of 16 learned in 400 trials what three learned in 200; batches
    of 8 with one epoch came close, at the price of more updates. Clipping the ratios of tokens learned faster than
    clipping those of sequences. Entropy coefficients from 0 to 0.1 and baseline decays from 0.5 to 0.95 differed
    little. With 64 workers, weights clipped from above alone learned more slowly than weights clipped on both sides.

    Proposals derive from `seed`, the number of the trial and the state after the last update, whatever was asked
    before. All is computed on one CPU thread, see `controller.isolated`.

    Args:
        space: what is searched.
        seed: of the initial weights and of the proposals.
        batch_size: samples of an update.
        learning_rate: of Adam.
        entropy_coefficient: beta of the first update; 0: no bonus.
        entropy_half_life: updates in which beta halves; None: it stays.
        baseline_decay: of baseline and scale, in [0, 1]; 0: the last batch alone, 1: the first one for ever.
        normalize_advantages: whether advantages are divided by the scale.
        importance_weights: False: every weight is 1, as if no sample were stale.
        weight_clip: c, the largest weight, at least 1.
        gradient_clip: largest norm of the gradient.
        epochs: steps on each batch.
        ratio_clip: of the ratios of tokens; without effect for one epoch.
        elites: how many of the best results are imitated, at most.
        elite_coefficient: gamma; 0: none is imitated.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, by name.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        *,
        batch_size: int = 16,
        learning_rate: float = 3e-3,
        entropy_coefficient: float = 0.05,
        entropy_half_life: float | None = None,
        baseline_decay: float = 0.8,
        normalize_advantages: bool = True,
        importance_weights: bool = True,
        weight_clip: float = 2.0,
        gradient_clip: float = 1.0,
        epochs: int = 3,
        ratio_clip: float = 0.2,
        elites: int = 16,
        elite_coefficient: float = 1.0,
    ) -> None:
        super().__init__(space, integer("seed", seed, -(2**63), 2**64 - 1))
        self.batch_size = integer("batch_size", batch_size, 1, 2**20)
        self.learning_rate = real("learning_rate", learning_rate, TINY)
        self.entropy_coefficient = real("entropy_coefficient", entropy_coefficient, 0)
        self.entropy_half_life = (
            None if entropy_half_life is None else real("entropy_half_life", entropy_half_life, TINY)
        )
        self.baseline_decay = real("baseline_decay", baseline_decay, 0, 1)
        self.normalize_advantages = flag("normalize_advantages", normalize_advantages)
        self.importance_weights = flag("importance_weights", importance_weights)
        self.weight_clip = real("weight_clip", weight_clip, 1)
        self.gradient_clip = real("gradient_clip", gradient_clip, TINY)
        self.epochs = integer("epochs", epochs, 1, 1000)
        self.ratio_clip = real("ratio_clip", ratio_clip, 0)
        self.elites = integer("elites", elites, 1, 2**20)
        self.elite_coefficient = real("elite_coefficient", elite_coefficient, 0)

        with isolated():
            self.controller = Controller(space, self.seed)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=self.learning_rate)
        self.updates = 0
        self.baseline: float | None = None
        self.variance = 0.0
        self.best: list[Elite] = []  # the best first
        self._block: dict[int, Proposal] = {}  # follows from the state: not part of it

    def propose(self, number: int) -> Proposal:
        # Always a whole block, at the same place: the last bits of a product depend on the size of the batch.
        if number not in self._block:
            numbers = range(number - number % BLOCK, number - number % BLOCK + BLOCK)
            with isolated():
                choices, log_probs = self.controller.sample(uniforms(self.seed, numbers, self.controller.length))
            proposals = map(Proposal, choices, log_probs.tolist())
            self._block = dict(zip(numbers, proposals, strict=True))
        return self._block[number]

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Learns from `batch_size` samples.

        Returns:
            Of the first epoch: `weights` (one a sample, before they are clipped), `clipped` (share of them beyond the
            clip), `baseline` (the one used), `advantage_std` (the scale, in units of the reward), `entropy` (nats, mean
            over the samples), `entropy_by_kind` (mean over the tokens that were asked; kinds that were not are left
            out), `elites` (how many were imitated), `loss`, `gradient_norm` (before it is clipped).

        Raises:
            ValueError: another number of samples, or a stale one without its log-probability.
        """
        if len(samples) != self.batch_size:
            raise ValueError(f"samples must be {self.batch_size}, the batch size, got {len(samples)}")
        choices = [sample.choices for sample in samples]
        self._block = {}
        with isolated(), torch.enable_grad():
            start = self.controller.evaluate(choices)
            weights = self._weights(samples, start.log_probs)
            baseline, advantages = self._advantages(samples)
            clipped = weights.clamp(1 / self.weight_clip, self.weight_clip)
            elites = self._elites(samples, baseline)
            figures = self._step(start, start, clipped, advantages, elites)
            for _ in range(1, self.epochs):
                self._step(self.controller.evaluate(choices), start, clipped, advantages, elites)
        self.updates += 1
        return {
            "weights": weights.tolist(),
            "clipped": float((weights != clipped).double().mean()),
            "baseline": baseline,
            "advantage_std": self.variance**0.5,
            "entropy": float(start.entropies.detach().sum(-1).mean()),
            "entropy_by_kind": self._entropy_by_kind(start),
            "elites": len(elites),
            **figures,
        }

    def _advantages(self, samples: Sequence[Sample]) -> tuple[float, Tensor]:
        """The baseline and the advantages (M,) against it; then moves the averages on."""
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64, device="cpu")
        mean = float(rewards.mean())
        first = self.baseline is None
        baseline = mean if self.baseline is None else self.baseline
        advantages = rewards - baseline
        # Ties: divided by their own scale, the last bits of a mean would be as good as any difference.
        if all(_equal(sample.reward, baseline) for sample in samples):
            advantages = torch.zeros_like(advantages)
        keep = 0.0 if first else self.baseline_decay
        self.variance = keep * self.variance + (1 - keep) * float(advantages.square().mean())
        self.baseline = baseline + (1 - self.baseline_decay) * (mean - baseline)
        if self.normalize_advantages and self.variance > 0:
            advantages = advantages / self.variance**0.5
        return baseline, advantages

    def _weights(self, samples: Sequence[Sample], log_probs: Tensor) -> Tensor:
        """(M,) importance weights, before they are clipped; `log_probs`: (M, T), of the tokens now."""
        if not self.importance_weights:
            return torch.ones(len(samples), dtype=torch.float64, device="cpu")
        now = log_probs.detach().double().sum(-1)
        ratios = []
        for sample, log_prob in zip(samples, now, strict=True):
            if sample.age > 0 and sample.log_prob is None:
                raise ValueError(
                    f"samples must have a log_prob, got None for trial {sample.number} of age {sample.age}"
                )
            ratios.append(log_prob - (log_prob if sample.age == 0 else sample.log_prob))
        return torch.stack(ratios).exp()

    def _elites(self, samples: Sequence[Sample], baseline: float) -> list[Choices]:
        """Keeps the best results so far; returns the choices of those that are imitated."""
        new = [Elite(sample.reward, sample.number, sample.choices) for sample in samples]
        self.best = sorted([*self.best, *new], reverse=True)[: self.elites]
        if self.elite_coefficient == 0 or (self.updates + 1) * self.batch_size < SELECTION * self.elites:
            return []
        return [elite.choices for elite in self.best if elite.reward > baseline and not _equal(elite.reward, baseline)]

    def _step(
        self,
        now: Evaluation,
        start: Evaluation,
        weights: Tensor,
        advantages: Tensor,
        elites: Sequence[Choices],
    ) -> dict[str, float]:
        """One step of Adam; `start`: the evaluation at the beginning of the update."""
        ratios = (now.log_probs - start.log_probs).detach().double().exp()
        rises = advantages[:, None] > 0
        pulls = torch.where(rises, ratios <= 1 + self.ratio_clip, ratios >= 1 - self.ratio_clip)
        beta = self.entropy_coefficient
        if self.entropy_half_life is not None:
            beta *= 0.5 ** (self.updates / self.entropy_half_life)
        value = loss(now.log_probs, now.entropies, weights[:, None] * ratios * pulls, advantages, beta)
        if elites:
            value = value - self.elite_coefficient * self.controller.log_prob(elites).mean()
        self.optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.controller.parameters(), self.gradient_clip)
        self.optimizer.step()
        return {"loss": float(value.detach()), "gradient_norm": float(norm)}

    def _entropy_by_kind(self, evaluation: Evaluation) -> dict[str, float]:
        tokens = self.space.tokens
        result = {}
        for kind in self.controller.kinds:
            columns = [position for position, token in enumerate(tokens) if token.kind == kind]
            asked = evaluation.asked[:, columns]
            if asked.any():
                result[kind] = float(evaluation.entropies.detach()[:, columns][asked].mean())
        return result

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "controller": dict(self.controller.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "updates": self.updates,
                "baseline": self.baseline,
                "variance": self.variance,
                "best": [[reward, number, list(choices)] for reward, number, choices in self.best],
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.baseline = state["baseline"]
        self.variance = state["variance"]
        self.best = [Elite(reward, number, tuple(choices)) for reward, number, choices in state["best"]]
        self._block = {}

    def settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "entropy_coefficient": self.entropy_coefficient,
            "entropy_half_life": self.entropy_half_life,
            "baseline_decay": self.baseline_decay,
            "normalize_advantages": self.normalize_advantages,
            "importance_weights": self.importance_weights,
            "weight_clip": self.weight_clip,
            "gradient_clip": self.gradient_clip,
            "epochs": self.epochs,
            "ratio_clip": self.ratio_clip,
            "elites": self.elites,
            "elite_coefficient": self.elite_coefficient,
        }


def _equal(reward: float, baseline: float) -> bool:
    """But for rounding."""
    return math.isclose(reward, baseline, rel_tol=ROUNDING)
