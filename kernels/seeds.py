"""Seeds and ranks: where the randomness of an op comes from (docs/definitions.md, section 1).

A seed is a 0-d int64 tensor on the device of the activation, so that drawing one never waits for the device and a
captured graph can be replayed with another.
"""

from __future__ import annotations

import threading

import torch

from .philox import MASK32
from .registration import register_op

Seed = torch.Tensor | int | None

SEEDS = (-(2**63), 2**63 - 1)  # what is drawn is at least the first and less than the second
CPU = torch.device("cpu")

_HAS_DISTRIBUTED = torch.distributed.is_available()


def as_seed(seed: Seed, device: torch.device) -> torch.Tensor:
    """`seed` as a 0-d int64 tensor on `device`.

    Args:
        seed: None draws one from PyTorch's default generator of the device, so that `torch.manual_seed` decides; an
            integer in [-2^63, 2^64) is taken modulo 2^64; a 0-d int64 tensor on `device` is used as it is.

    Raises:
        TypeError: seed is none of these.
        ValueError: an integer out of range, or a tensor of another shape or on another device.
    """
    if seed is None:
        if not torch.compiler.is_compiling():
            return _draw_seed(device=device)
        drawn: torch.Tensor = torch.ops.autodropout.draw_seed(device=device)
        return drawn
    check_seed(seed, device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def as_number(seed: Seed) -> int:
    """The same seed as a number, for an activation of the CPU and eager code at which nothing looks on (unwatched.py).

    What is drawn is drawn into a tensor that is there. That takes 0.03 ms less once other work has emptied the cache.
    """
    if seed is None:
        if _OF_THREAD.seed is None:  # not at import, which may be under a mode that makes other tensors
            _OF_THREAD.seed = torch.empty((), dtype=torch.int64, device=CPU)
        return int(_OF_THREAD.seed.random_(*SEEDS))
    check_seed(seed, CPU)
    return int(seed)


def check_seed(seed: torch.Tensor | int, device: torch.device) -> None:
    """Refuses what `as_seed` refuses, and reads no value of a tensor."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"seed must be a 0-d tensor, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the device of x, {device}, got {seed.device}")
        return
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be None, an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")


class _OfThread(threading.local):
    seed: torch.Tensor | None = None


_OF_THREAD = _OfThread()


def as_rank(rank: int | None) -> int:
    """Counter word 3: `rank`, or where it is None the global rank under torch.distributed, else 0.

    Raises:
        TypeError: rank is no int.
        ValueError: rank outside [0, 2^32).
    """
    if rank is None:
        return torch.distributed.get_rank() if _HAS_DISTRIBUTED and torch.distributed.is_initialized() else 0
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be None or an int, got {type(rank).__name__}")
    if not 0 <= rank <= MASK32:
        raise ValueError(f"rank must be in [0, 2^32), got {rank}")
    return rank


def _draw_seed(*, device: torch.device) -> torch.Tensor:
    return torch.randint(*SEEDS, (), dtype=torch.int64, device=device)


# An op of its own: Inductor replaces `randint` by a generator of its own, and eager and compiled code would differ.
# The order of several draws is Inductor's, unless `reorder_for_peak_memory` is off (seen in 2.15).
# The device by keyword: where compiled code draws again for a checkpoint, torch 2.6 looks for it there alone.
register_op(
    "draw_seed(*, Device device) -> Tensor",
    _draw_seed,
    lambda *, device: torch.empty((), dtype=torch.int64, device=device),
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _never_merge_draws() -> None:
    """Tell PyTorch's common subexpression elimination that two draws are two.

    Torch 2.14 sees that from the tag. Before (seen in 2.6) it goes by a list of its own, and two layers of a compiled
    model would get the same seed.
    """
    from torch._functorch import compile_utils

    random_ops = getattr(compile_utils, "rand_ops", None)
    if isinstance(random_ops, list) and torch.ops.autodropout.draw_seed not in random_ops:
        random_ops.append(torch.ops.autodropout.draw_seed)


# Not where it is not needed: there the import loads sympy and takes a quarter of a second.
if torch.torch_version.TorchVersion(torch.__version__) < "2.14":
    _never_merge_draws()
