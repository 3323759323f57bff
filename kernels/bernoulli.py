"""Independent decisions that dimensions share, as one op on integers: Dropout (Srivastava et al. 2014), SpatialDropout
(Tompson et al. 2015), DropPath (Huang et al. 2016), variational dropout (Gal & Ghahramani 2016), word dropout.

    y = x * kept * scale,    kept[n, i] = word(n, i) >= floor(rate * 2^32)

The bits (our choice, frozen by golden vectors in the tests). `shared` names the dimensions of x over which one decision
holds: `"none"` is (), `"map"` all from 2 on, `"sample"` all from 1 on. The decisions of sample n are numbered by a
logical index i, independent of strides: row-major over those of the dimensions 1, 2, ... that are not shared (0 if all
are). Where dimension 0 is shared, n is 0 for all of x. Decision i is taken by word number `i mod 4` of Philox with
counter

    ((i div 4) mod 2^32, (i div 4) div 2^32, n, rank)

and drops when the word is below `floor(rate * 2^32)`, compared in 64 bits: rate 1 drops everything, rate 0 nothing.

One pass reads and writes x; the mask is drawn again in backward, never saved. On the GPU the kernels of
bernoulli_triton.py run, on the CPU the loops of bernoulli_numba.py where Numba is installed. Without it Philox is
computed in int64, for so many decisions at a time that the temporaries stay within a few megabytes, and a mask of
shared decisions multiplies x as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence

import torch

from .bernoulli_form import form_of
from .bernoulli_form import is_laid_out_as
from .checks import NORMALIZE
from .checks import check_activation
from .checks import check_choice
from .checks import check_fields
from .checks import check_real
from .compiled import has_numba
from .devices import triton_runs_on
from .masking import SLICE_CELLS
from .masking import boxes
from .masking import host_scalar
from .masking import scale_of_counts
from .masking import scale_of_mask
from .masking import write_masked
from .philox import MASK32
from .philox import philox
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .self_adjoint import register_self_adjoint

SHARED = ("none", "map", "sample")


def bernoulli_dropout(
    x: torch.Tensor,
    fields: float | torch.Tensor,
    seed: Seed = None,
    shared: str | Sequence[int] = "none",
    normalize: str = "expected",
    rank: int | None = None,
) -> torch.Tensor:
    """Drops each decision with probability `rate`, independently of all others, and scales the rest.

    Args:
        x: any shape with the batch first, at least 1 dimension, at least 2 for `shared="map"`; float64, float32,
            float16 or bfloat16.
        fields: the rate in [0, 1], a Python number or a float64 CPU tensor of shape (1,). Another value in the tensor
            recompiles nothing.
        seed: integer in [-2^63, 2^64), or a 0-d int64 tensor on x's device; None draws one from PyTorch's default
            generator of that device.
        shared: what one decision covers: `"none"` one cell (Dropout), `"map"` one channel, dimension 1, of a sample
            (SpatialDropout), `"sample"` a sample (DropPath); or the dimensions of x over which it is shared, different
            integers in [0, x.dim()) in any order. On (N, T, C), (2,) is word dropout and (1,) variational dropout; on
            (T, N, C) variational dropout is (0,).
        normalize: `"expected"` scales by 1 / (1 - rate) (0 for rate 1), `"mask"` by Size / Sum of the mask drawn (0 if
            everything is dropped), `"none"` by 1.
        rank: counter word 3 in [0, 2^32); None is the global rank under `torch.distributed`, else 0.

    Returns:
        A tensor with x's shape, dtype and memory format. The scale is a float64, rounded once to float32 (kept for
        float64 x), where the product is formed and then cast. Dropped cells are 0, whatever x holds there.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it. A rate out of range in a
            tensor is found when the op runs.
    """
    check_activation(x)
    check_choice("normalize", normalize, NORMALIZE)
    bits = _bits(_shared_dims(shared, x))
    if isinstance(fields, torch.Tensor):
        check_fields(fields, ("rate",))
    else:
        fields = torch.tensor([check_real("rate", fields, 0, 1)], dtype=torch.float64, device="cpu")
    seed = as_seed(seed, x.device)
    rank = as_rank(rank)
    scale = _scale_of(fields, seed, x.shape, bits, normalize, rank)
    return _differentiable(x, fields, seed, scale, bits, rank)


def _shared_dims(shared: object, x: torch.Tensor) -> list[int]:
    """The dimensions that share a decision, in ascending order."""
    if isinstance(shared, (tuple, list)):
        for dim in shared:
            if isinstance(dim, bool) or not isinstance(dim, int):
                raise TypeError(f"shared must hold integers, got {dim!r} of type {type(dim).__name__}")
        if x.dim() < 1:
            raise ValueError(f"x must have at least 1 dimensions, got shape {tuple(x.shape)}")
        if len(set(shared)) < len(shared) or any(not 0 <= dim < x.dim() for dim in shared):
            raise ValueError(f"shared must hold different dimensions in [0, {x.dim()}), got {shared!r}")
        return sorted(shared)
    check_choice("shared", shared, SHARED)
    least = 2 if shared == "map" else 1
    if x.dim() < least:
        raise ValueError(f"x must have at least {least} dimensions for shared={shared!r}, got shape {tuple(x.shape)}")
    return [] if shared == "none" else list(range(least, x.dim()))


def _bits(dims: Sequence[int]) -> int:
    """Dimensions as what the ops take: bit d of one integer. (For vmap a list would be a structure to look into.)"""
    return sum(1 << dim for dim in dims)


def _dims(bits: int) -> list[int]:
    return [dim for dim in range(bits.bit_length()) if bits >> dim & 1]


def _rate_of(fields: torch.Tensor) -> float:
    check_fields(fields, ("rate",))
    return check_real("rate", fields.item(), 0, 1)


def threshold_of(rate: float) -> int:
    """Words below it drop: in [0, 2^32]."""
    return math.floor(rate * 2**32)


# ---- the mask in PyTorch -------------------------------------------------------------------------------------------


def _dropped(
    shape: Sequence[int], rate: float, seed: torch.Tensor, shared: Sequence[int], rank: int
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """The mask slice by slice: index slices into x, and a bool tensor, True = dropped, that broadcasts to that part."""
    threshold = threshold_of(rate)
    drawn = [1 if dim in shared else side for dim, side in enumerate(shape)]
    for box in boxes(drawn, SLICE_CELLS):
        # Within a sample a box is one run of decisions: it starts where its slices start.
        first = sum(s.start * math.prod(drawn[d + 1 :]) for d, s in enumerate(box) if d > 0)
        sides = [s.stop - s.start for s in box] + drawn[len(box) :]
        flat = _dropped_run(box[0], first, math.prod(sides[1:]), threshold, seed, rank)
        yield tuple(slice(None) if d in shared else s for d, s in enumerate(box)), flat.reshape(sides)


def _dropped_run(samples: slice, first: int, count: int, threshold: int, seed: torch.Tensor, rank: int) -> torch.Tensor:
    """Decisions first..first+count-1 of some samples: bool (samples, count), True = dropped."""
    if seed.is_cpu and has_numba():
        from . import bernoulli_numba

        return ~bernoulli_numba.draw(samples, first, count, threshold, int(seed), rank)
    low, high = first // 4, (first + count + 3) // 4
    call = torch.arange(low, high, device=seed.device)[None]
    sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None]
    words = philox(call & MASK32, call >> 32, sample, rank, seed)
    dropped = torch.empty((sample.shape[0], high - low, 4), dtype=torch.bool, device=seed.device)
    for j, word in enumerate(words):
        torch.lt(word, threshold, out=dropped[:, :, j])
    return dropped.flatten(1)[:, first - 4 * low :][:, :count]


# ---- the op --------------------------------------------------------------------------------------------------------


def _scale(
    fields: torch.Tensor, seed: torch.Tensor, shape: Sequence[int], shared_bits: int, normalize: str, rank: int
) -> torch.Tensor:
    rate, shared = _rate_of(fields), _dims(shared_bits)
    if normalize == "mask":
        size = math.prod(shape)
        samples = 1 if 0 in shared else shape[0]
        decisions = math.prod(side for dim, side in enumerate(shape) if dim not in shared)
        if size and triton_runs_on(seed):
            from . import bernoulli_triton

            with torch.cuda.device(seed.device):  # Triton launches on the current device
                return bernoulli_triton.scale_of_mask(
                    seed, samples, decisions // samples, size, threshold_of(rate), rank
                )
        if size and seed.is_cpu and has_numba():
            from . import bernoulli_numba

            counted = bernoulli_numba.dropped_of(samples, decisions // samples, threshold_of(rate), int(seed), rank)
            scale = scale_of_counts(decisions, counted)
            return host_scalar(scale)
        dropped = torch.zeros((), dtype=torch.int64, device=seed.device)
        if size:
            for _, part in _dropped(shape, rate, seed, shared, rank):
                dropped += torch.count_nonzero(part)
            dropped *= size // decisions
        return scale_of_mask(size, size - dropped)
    value = 1.0 if normalize == "none" else 0.0 if rate == 1 else 1 / (1 - rate)
    return torch.full((), value, dtype=torch.float64, device=seed.device)


def _apply(
    x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor, scale: torch.Tensor, shared_bits: int, rank: int
) -> torch.Tensor:
    rate, shared = _rate_of(fields), _dims(shared_bits)
    if x.numel() == 0:
        return torch.empty_like(x)
    if rate == 1:
        return torch.zeros_like(x)
    if triton_runs_on(x):
        from . import bernoulli_triton

        with torch.cuda.device(x.device):
            return bernoulli_triton.apply(x, shared, threshold_of(rate), seed, scale, rank)
    y = torch.empty_like(x)
    if x.is_cpu and has_numba():
        form = form_of(x.shape, x.stride(), shared) if is_laid_out_as(x, y) else None
        if form is not None:
            from . import bernoulli_numba

            bernoulli_numba.apply(x, y, form, threshold_of(rate), int(seed), scale.item(), rank)
            return y
    for box, dropped in _dropped(x.shape, rate, seed, shared, rank):
        _write(y[box], x[box], scale, dropped)
    return y


def _write(y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, dropped: torch.Tensor) -> None:
    """The masked product of a part, in pieces that are still in the cache when they are looked at a second time."""
    for box in boxes(x.shape, 4 * SLICE_CELLS):
        of_mask = tuple(slice(None) if dropped.shape[d] == 1 else s for d, s in enumerate(box))
        write_masked(y[box], x[box], scale, dropped[of_mask])


_scale_of = register_op(
    "bernoulli_scale(Tensor fields, Tensor seed, SymInt[] shape, int shared, str normalize, SymInt rank) -> Tensor",
    _scale,
    lambda fields, seed, shape, shared, normalize, rank: seed.new_empty((), dtype=torch.float64),
)
_differentiable = register_self_adjoint(
    "bernoulli_apply(Tensor x, Tensor fields, Tensor seed, Tensor scale, int shared, SymInt rank) -> Tensor",
    _apply,
)
