"""What every search algorithm is: it proposes sequences of a space, and learns from finished ones."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .space import Choices
from .space import SearchSpace


@dataclass(frozen=True)
class Proposal:
    """`choices`: a sequence of the space. `log_prob`: its natural-log probability under the searcher, if it has one."""

    choices: Choices
    log_prob: float | None = None


@dataclass(frozen=True)
class Sample:
    """A finished trial, as a searcher learns from it.

    Args:
        number: of the trial, from 0 in the order of proposal.
        choices: what was proposed.
        log_prob: what `Proposal.log_prob` was then.
        reward: larger is better.
        age: updates of the searcher between the proposal and the update that takes this sample; 0 = fresh.
    """

    number: int
    choices: Choices
    log_prob: float | None
    reward: float
    age: int


class Searcher(ABC):
    """A search algorithm, without processes, files or clocks.

    The same calls in the same order give the same proposals and the same state, bit for bit on one machine: whatever is
    random derives from `seed`, the number of the trial or a generator that is part of the state.

    Attributes:
        space: what is searched.
        seed: an integer.
        batch_size: finished samples that one `update` takes.
        packages: distributions besides torch whose versions its proposals depend on: recorded with a search.
    """

    batch_size: int = 1
    packages: tuple[str, ...] = ()

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        self.space = space
        self.seed = seed

    @abstractmethod
    def propose(self, number: int) -> Proposal:
        """The sequence of trial `number`. Called once for each number, 0, 1, 2, ..., whatever is finished by then."""

    @abstractmethod
    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Learns from `batch_size` samples, each given once, in the order in which they finished.

        Returns:
            Figures of the update for the journal, JSON values by name; what is there once per sample is a list.
        """

    def failed(self, number: int) -> None:  # noqa: B027  # most searchers have nothing to do
        """Trial `number` will never finish."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that `propose` and `update` depend on besides the constructor's arguments: what `torch.save` can keep."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of a searcher that was made with the same arguments."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments besides the space, JSON values by name: recorded, compared when resumed."""
