"""Runs the epochs of a training, with a checkpoint after each, and goes on exactly from one.

Every random number of an epoch derives from (seed, epoch), so a training that was killed and continued ends in the same
weights bit for bit (on a GPU: as far as cuDNN's own kernels repeat themselves).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Protocol

import torch

from autodropout.files import write_atomically

from .augment import derive


class Part(Protocol):
    """What a checkpoint holds the state of."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


def run_epochs(
    epochs: int,
    train_epoch: Callable[[int], None],
    parts: Mapping[str, Part],
    seed: int,
    device: torch.device,
    checkpoint: Path | None,
    on_epoch: Callable[[], None],
    after_epoch: Callable[[int], None] = lambda done: None,
) -> float:
    """Runs all epochs, or those that `checkpoint` has not yet behind it.

    Args:
        epochs: how many.
        train_epoch: called with the number of an epoch, from 0. The default generators, from which masks draw, are
            seeded by (seed, epoch) before.
        parts: what carries a training from one epoch to the next, by name: model, optimizer, ...
        seed: of the masks.
        device: where the parts are.
        checkpoint: read if it exists, written after every epoch and left where it is; None: neither.
        on_epoch: called after every epoch, and once for each that the checkpoint has already behind it.
        after_epoch: called with the number of epochs done, when the checkpoint is written; what it raises ends the
            training.

    Returns:
        Seconds of `train_epoch` in all sittings.
    """
    done, seconds = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        done, seconds = state["epoch"], state["seconds"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(epochs):
        if epoch < done:
            on_epoch()
            continue
        start = time.perf_counter()
        torch.manual_seed(derive(seed, epoch, "masks"))
        train_epoch(epoch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        if checkpoint is not None:
            contents: dict[str, Any] = {"epoch": epoch + 1, "seconds": seconds}
            contents |= {name: part.state_dict() for name, part in parts.items()}
            write_atomically(checkpoint, lambda file, contents=contents: torch.save(contents, file))  # type: ignore[misc]
        on_epoch()
        after_epoch(epoch + 1)
    return seconds
