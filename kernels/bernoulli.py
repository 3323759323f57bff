"""Independent decisions: Dropout, SpatialDropout and DropPath as one op on integers (Srivastava et al. 2014, Tompson et
al. 2015, Huang et al. 2016).

    y = x * kept * scale,    kept[n, i] = word(n, i) >= floor(rate * 2^32)

The bits (our choice, frozen by golden vectors in the tests). The decisions of sample n are numbered by a logical index
i, independent of strides: the row-major index within the sample (`shared="none"`), the channel (`"map"`), or 0
(`"sample"`). Decision i is taken by word number `i mod 4` of Philox with counter

    ((i div 4) mod 2^32, (i div 4) div 2^32, n, rank)

and drops when the word is below `floor(rate * 2^32)`, compared in 64 bits: rate 1 drops everything, rate 0 nothing.

One pass reads and writes x; the mask is drawn again in backward, never saved. This route computes Philox in int64
tensors of PyTorch, on slices of samples so that its temporaries stay within a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence

import torch

from .checks import NORMALIZE
from .checks import check_activation
from .checks import check_choice
from .checks import check_fields
from .checks import check_real
from .masking import SLICE_CELLS
from .masking import boxes
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
    shared: str = "none",
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
            (SpatialDropout), `"sample"` a sample (DropPath).
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
    check_choice("shared", shared, SHARED)
    check_choice("normalize", normalize, NORMALIZE)
    least = 2 if shared == "map" else 1
    if x.dim() < least:
        raise ValueError(f"x must have at least {least} dimensions for shared={shared!r}, got shape {tuple(x.shape)}")
    if isinstance(fields, torch.Tensor):
        check_fields(fields, ("rate",))
    else:
        fields = torch.tensor([check_real("rate", fields, 0, 1)], dtype=torch.float64, device="cpu")
    seed = as_seed(seed, x.device)
    rank = as_rank(rank)
    scale = torch.ops.autodropout.bernoulli_scale(fields, seed, x.shape, shared, normalize, rank)
    return _differentiable(x, fields, seed, scale, shared, rank)


def _rate_of(fields: torch.Tensor) -> float:
    check_fields(fields, ("rate",))
    return check_real("rate", fields.item(), 0, 1)


def _dropped(
    shape: Sequence[int], rate: float, seed: torch.Tensor, shared: str, rank: int
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """The mask slice by slice: index slices into x, and a bool tensor, True = dropped, that broadcasts to that part."""
    threshold = math.floor(rate * 2**32)
    for box in boxes(shape, SLICE_CELLS if shared == "none" else 4 * SLICE_CELLS):
        samples = box[0]
        sides = [s.stop - s.start for s in box] + list(shape[len(box) :])
        if shared == "none":
            # Within a sample a box is one run of logical indices: it starts where its slices start.
            first = sum(s.start * math.prod(shape[d + 1 :]) for d, s in enumerate(box) if d > 0)
            kept_sides = sides
        elif shared == "map":
            first = box[1].start if len(box) > 1 else 0
            kept_sides = sides[:2] + [1] * (len(sides) - 2)
        else:
            first = 0
            kept_sides = sides[:1] + [1] * (len(sides) - 1)
        flat = _dropped_run(samples, first, math.prod(kept_sides[1:]), threshold, seed, rank)
        yield box, flat.reshape(kept_sides)


def _dropped_run(samples: slice, first: int, count: int, threshold: int, seed: torch.Tensor, rank: int) -> torch.Tensor:
    """Decisions first..first+count-1 of some samples: bool (samples, count), True = dropped."""
    low, high = first // 4, (first + count + 3) // 4
    call = torch.arange(low, high, device=seed.device)[None]
    sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None]
    words = philox(call & MASK32, call >> 32, sample, rank, seed)
    dropped = torch.empty((sample.shape[0], high - low, 4), dtype=torch.bool, device=seed.device)
    for j, word in enumerate(words):
        torch.lt(word, threshold, out=dropped[:, :, j])
    return dropped.flatten(1)[:, first - 4 * low :][:, :count]


def _scale(
    fields: torch.Tensor, seed: torch.Tensor, shape: Sequence[int], shared: str, normalize: str, rank: int
) -> torch.Tensor:
    rate = _rate_of(fields)
    if normalize == "mask":
        size = math.prod(shape)
        dropped = torch.zeros((), dtype=torch.int64, device=seed.device)
        for box, part in _dropped(shape, rate, seed, shared, rank):
            cells = math.prod(s.stop - s.start for s in box) * math.prod(shape[len(box) :])
            dropped += part.sum() * (cells // max(1, part.numel()))
        return scale_of_mask(size, size - dropped)
    value = 1.0 if normalize == "none" else 0.0 if rate == 1 else 1 / (1 - rate)
    return torch.full((), value, dtype=torch.float64, device=seed.device)


def _apply(
    x: torch.Tensor, fields: torch.Tensor, seed: torch.Tensor, scale: torch.Tensor, shared: str, rank: int
) -> torch.Tensor:
    rate = _rate_of(fields)
    y = torch.empty_like(x)
    for box, dropped in _dropped(x.shape, rate, seed, shared, rank):
        write_masked(y[box], x[box], scale, dropped)
    return y


register_op(
    "bernoulli_scale(Tensor fields, Tensor seed, SymInt[] shape, str shared, str normalize, SymInt rank) -> Tensor",
    _scale,
    lambda fields, seed, shape, shared, normalize, rank: seed.new_empty((), dtype=torch.float64),
)
_differentiable = register_self_adjoint(
    "bernoulli_apply(Tensor x, Tensor fields, Tensor seed, Tensor scale, str shared, SymInt rank) -> Tensor",
    _apply,
)
