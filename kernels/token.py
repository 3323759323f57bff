"""Token pattern dropout: spans of consecutive tokens, `stride` tokens apart (Pham & Le 2021, for Transformers).

    y = x * kept * scale,    dropped = covered(n, t) and word(n, t, c) < floor(rate * 2^32)

The bits (our choice, as in docs/token.md). x has samples n, tokens t and channels c, which `layout` finds in it.

- `period = size + stride`; the phase of sample n is `(w0 * period) >> 32`, w0 being word 0 of Philox with counter
  (0, 0, n, rank), and 0 where `size >= T`. Token t is covered when `(t + phase) mod period < size`, and lies in span
  `(t + phase) div period`.
- The word of a covered element is number `cell_c mod 4` of Philox with counter (cell_c div 4, 1 + cell_t, n, rank);
  `cell_t` is the span with `share_t`, else t; `cell_c` is 0 with `share_c`, else c.

Bytes moved per element: one read and one write of the activation, forward and backward, which are the same op: the mask
is drawn again, never saved. On the GPU the kernels of token_triton.py run, on the CPU the loops of token_numba.py where
Numba is installed. Here words are drawn for what is covered only, once for what shares them, on slices of tokens so
that temporaries stay within a few megabytes.
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
from .checks import check_flag
from .checks import check_real
from .compiled import has_numba
from .devices import triton_runs_on
from .masking import SLICE_CELLS
from .masking import boxes
from .masking import host_scalar
from .masking import scale_of_counts
from .masking import scale_of_mask
from .masking import write_masked
from .philox import below
from .philox import philox
from .registration import register_op
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .self_adjoint import register_self_adjoint

FIELDS = ("size", "stride", "rate")
MAX_SPAN = 2**30 - 1  # of size and of stride: a period then is an int32

# Where (n, t, a, b) are among the dimensions of x, the channel being a * B + b; None is a dimension of 1.
LAYOUTS: dict[str, tuple[int, int, int | None, int]] = {
    "NTC": (0, 1, None, 2),
    "TNC": (1, 0, None, 2),
    "NHTD": (0, 2, 1, 3),
    "NHQK": (0, 3, 1, 2),
}


def token_dropout(
    x: torch.Tensor,
    fields: tuple[int, int, float] | torch.Tensor,
    seed: Seed = None,
    layout: str = "NTC",
    share_t: bool = False,
    share_c: bool = False,
    normalize: str = "expected",
    rank: int | None = None,
) -> torch.Tensor:
    """Drops elements of spans of tokens with probability `rate`, and scales the rest.

    Args:
        x: float64, float32, float16 or bfloat16, of the shape that `layout` spells.
        fields: (size, stride, rate), Python numbers or a float64 CPU tensor of shape (3,): the tokens of a span, a
            whole number in [1, 2^30); the tokens between two spans, in [0, 2^30); the probability in [0, 1]. Other
            values in the tensor recompile nothing.
        seed: integer in [-2^63, 2^64), or a 0-d int64 tensor on x's device; None draws one from PyTorch's default
            generator of that device.
        layout: `"NTC"` or `"TNC"`: samples, tokens, channels. `"NHTD"`: samples, heads, tokens, channels of a head
            (queries, keys, values); a channel is head * D + d. `"NHQK"`: samples, heads, queries, keys (attention
            weights); a token is a key, a channel head * Q + query.
        share_t: one decision for all tokens of a span, instead of one for each.
        share_c: one decision for all channels of a token, instead of one for each.
        normalize: `"expected"` scales by 1 / (1 - rate * coverage), coverage = size / (size + stride), or 1 if
            size >= T (0 if that divides by zero); `"mask"` by Size / Sum of the mask drawn (0 if everything is
            dropped); `"none"` by 1.
        rank: counter word 3 in [0, 2^32); None is the global rank under `torch.distributed`, else 0.

    Returns:
        A tensor with x's shape, dtype and memory format. The scale is a float64, rounded once to float32 (kept for
        float64 x), where the product is formed and then cast. Dropped elements are 0, whatever x holds there.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it. A number out of range in a
            tensor is found when the op runs.
    """
    check_activation(x)
    check_choice("layout", layout, tuple(LAYOUTS))
    check_choice("normalize", normalize, NORMALIZE)
    check_flag("share_t", share_t)
    check_flag("share_c", share_c)
    if x.dim() != len(layout):
        raise ValueError(f"x must have {len(layout)} dimensions for layout {layout!r}, got shape {tuple(x.shape)}")
    if isinstance(fields, torch.Tensor):
        check_fields(fields, FIELDS)
    elif not isinstance(fields, Sequence) or len(fields) != len(FIELDS):
        raise TypeError(f"fields must be (size, stride, rate) or a float64 CPU tensor of shape (3,), got {fields!r}")
    else:
        fields = torch.tensor(check_values(*fields), dtype=torch.float64, device="cpu")
    seed = as_seed(seed, x.device)
    rank = as_rank(rank)
    scale = scale_of(fields, seed, *sides_of(x.shape, layout), share_t, share_c, normalize, rank)
    return _differentiable(x, fields, seed, scale, layout, share_t, share_c, rank)


def check_values(size: object, stride: object, rate: object) -> tuple[float, float, float]:
    """The three fields as floats; TypeError or ValueError if one is out of its range or no whole number."""
    values = check_real("size", size, 1, MAX_SPAN), check_real("stride", stride, 0, MAX_SPAN)
    for name, value in zip(FIELDS, values, strict=False):
        if value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value}")
    return *values, check_real("rate", rate, 0, 1)


def sides_of(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    """(N, T, C): samples, tokens and channels of an activation of this shape."""
    n, t, a, b = LAYOUTS[layout]
    return shape[n], shape[t], shape[b] if a is None else shape[a] * shape[b]


def by_token(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view of x with dimensions (n, t, a, b), the channel being a * B + b."""
    n, t, a, b = LAYOUTS[layout]
    return x.permute(n, t, b).unsqueeze(2) if a is None else x.permute(n, t, a, b)


# ---- fields --------------------------------------------------------------------------------------------------------


def read_fields(fields: torch.Tensor) -> tuple[int, int, int]:
    """(size, period, threshold): tokens of a span, tokens from span to span, and below what a word drops."""
    check_fields(fields, FIELDS)
    size, stride, rate = check_values(*fields.tolist())
    return int(size), int(size + stride), math.floor(rate * 2**32)


def fixed_scale(fields: torch.Tensor, tokens: int, normalize: str) -> float:
    """The scale that depends on no mask: of `"expected"` or `"none"`."""
    if normalize == "none":
        return 1.0
    size, period, _ = read_fields(fields)
    kept = 1 - fields.tolist()[2] * expected_coverage(size, period, tokens)
    return 1 / kept if kept else 0.0


def expected_coverage(size: int, period: int, tokens: int) -> float:
    """The expected share of covered tokens in a sequence: the phase is uniform, so that each is covered alike."""
    return 1.0 if size >= tokens else size / period


# ---- decisions -----------------------------------------------------------------------------------------------------


def _spans(
    samples: slice, tokens: slice, T: int, size: int, period: int, seed: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some samples x tokens: whether they are covered, bool, and in which span they lie, int64."""
    sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None]
    place = torch.arange(tokens.start, tokens.stop, device=seed.device)[None]
    phase = below(philox(0, 0, sample, rank, seed)[0], period) if size < T else torch.zeros_like(sample)
    place = place + phase
    return place % period < size, place // period


def _dropped_tokens(N: int, T: int, fields: torch.Tensor, seed: torch.Tensor, share_t: bool, rank: int) -> torch.Tensor:
    """One decision for all channels: bool (N, T), True = dropped."""
    size, period, threshold = read_fields(fields)
    dropped = torch.empty((N, T), dtype=torch.bool, device=seed.device)
    for box in boxes((N, T), SLICE_CELLS):
        samples, tokens = _both(box, T)
        covered, span = _spans(samples, tokens, T, size, period, seed, rank)
        token = torch.arange(tokens.start, tokens.stop, device=seed.device)[None]
        sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None]
        word = philox(0, 1 + (span if share_t else token), sample, rank, seed)[0]
        torch.logical_and(covered, word < threshold, out=dropped[samples, tokens])
    return dropped


def _dropped(
    N: int,
    T: int,
    C: int,
    fields: torch.Tensor,
    seed: torch.Tensor,
    share_t: bool,
    rank: int,
    listed: bool | None = None,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """A decision for every channel, slice by slice: samples, tokens, and their mask, bool (s, t, C), True = dropped.

    On the CPU the covered tokens are listed, and with `share_t` their spans: words are drawn for these only. Elsewhere
    that would wait for the device, so every token draws its own. (`listed` says which, for tests.)
    """
    size, period, threshold = read_fields(fields)
    if listed is None:
        listed = seed.is_cpu
    for box in boxes((N, T), max(1, SLICE_CELLS // C)):
        samples, tokens = _both(box, T)
        covered, span = _spans(samples, tokens, T, size, period, seed, rank)
        sample = torch.arange(samples.start, samples.stop, device=seed.device)[:, None].expand_as(span)
        cell = span if share_t else torch.arange(tokens.start, tokens.stop, device=seed.device).expand_as(span)
        if not listed:
            drawn = _dropped_rows(sample.reshape(-1), cell.reshape(-1), C, threshold, seed, rank)
            yield samples, tokens, drawn.view(*span.shape, C).logical_and_(covered[..., None])
            continue
        mask = torch.zeros((*span.shape, C), dtype=torch.bool, device=seed.device)
        place = covered.reshape(-1).nonzero().squeeze(1)
        sample, cell = sample.reshape(-1)[place], cell.reshape(-1)[place]
        if len(place) == 0 or threshold == 0:
            yield samples, tokens, mask
            continue
        if share_t:
            # The tokens of a span follow each other, so that a change of either number begins the next.
            first = torch.ones_like(place, dtype=torch.bool)
            first[1:] = (cell[1:] != cell[:-1]) | (sample[1:] != sample[:-1])
            which = first.cumsum(0) - 1
            drawn = _dropped_rows(sample[first], cell[first], C, threshold, seed, rank).index_select(0, which)
        else:
            drawn = _dropped_rows(sample, cell, C, threshold, seed, rank)
        mask.view(-1, C).index_copy_(0, place, drawn)
        yield samples, tokens, mask


def _dropped_rows(
    sample: torch.Tensor, cell: torch.Tensor, C: int, threshold: int, seed: torch.Tensor, rank: int
) -> torch.Tensor:
    """The decisions of all channels for each pair of a sample and a cell_t: bool (pairs, C), True = dropped."""
    call = torch.arange((C + 3) // 4, device=seed.device)[None]
    words = philox(call, 1 + cell[:, None], sample[:, None], rank, seed)
    dropped = torch.empty((len(cell), call.shape[1], 4), dtype=torch.bool, device=seed.device)
    for j, word in enumerate(words):
        torch.lt(word, threshold, out=dropped[:, :, j])
    return dropped.flatten(1)[:, :C]


def _both(box: tuple[slice, ...], T: int) -> tuple[slice, slice]:
    """The slices of samples and of tokens; a box of whole samples leaves the latter out."""
    return box[0], box[1] if len(box) > 1 else slice(0, T)


# ---- implementations -----------------------------------------------------------------------------------------------


def _scale(
    fields: torch.Tensor,
    seed: torch.Tensor,
    N: int,
    T: int,
    C: int,
    share_t: bool,
    share_c: bool,
    normalize: str,
    rank: int,
) -> torch.Tensor:
    read_fields(fields)  # also where nothing is read from them, so that bad ones are always refused
    if normalize != "mask" or N * T * C == 0:
        return torch.full((), fixed_scale(fields, T, normalize), dtype=torch.float64, device=seed.device)
    if triton_runs_on(seed):
        from . import token_draw_triton

        with torch.cuda.device(seed.device):  # Triton launches on the current device
            return token_draw_triton.scale_of_mask(fields, seed, N, T, C, share_t, share_c, rank)
    if seed.is_cpu and has_numba():
        from . import token_numba

        pattern = token_numba.pattern(N, T, *read_fields(fields), share_t, int(seed), rank)
        scale = scale_of_counts(N * T * C, token_numba.count_dropped(pattern, C, share_c))
        return host_scalar(scale)
    if share_c:
        dropped = _dropped_tokens(N, T, fields, seed, share_t, rank).sum() * C
    else:
        dropped = torch.zeros((), dtype=torch.int64, device=seed.device)
        for _, _, part in _dropped(N, T, C, fields, seed, share_t, rank):
            dropped += part.sum()
    return scale_of_mask(N * T * C, N * T * C - dropped)


def _apply(
    x: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    layout: str,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> torch.Tensor:
    read_fields(fields)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if triton_runs_on(x):
        from . import token_triton

        with torch.cuda.device(x.device):
            token_triton.apply(by_token(x, layout), by_token(y, layout), fields, seed, scale, share_t, share_c, rank)
        return y
    N, T, C = sides_of(x.shape, layout)
    by_token_x, by_token_y = by_token(x, layout), by_token(y, layout)
    if x.is_cpu and has_numba():
        from . import token_numba

        if order := token_numba.order(by_token_x):
            pattern = token_numba.pattern(N, T, *read_fields(fields), share_t, int(seed), rank)
            token_numba.apply(by_token_x, by_token_y, order, pattern, scale.item(), share_c)
            return y
    if share_c:
        dropped = _dropped_tokens(N, T, fields, seed, share_t, rank)
        n, t, _, _ = LAYOUTS[layout]
        sides = [1] * x.dim()
        sides[n], sides[t] = N, T
        write_masked(y, x, scale, (dropped if n < t else dropped.T).reshape(sides))
        return y
    for samples, tokens, mask in _dropped(N, T, C, fields, seed, share_t, rank):
        part = by_token_x[samples, tokens]
        write_masked(by_token_y[samples, tokens], part, scale, mask.view(part.shape))
    return y


# ---- registration --------------------------------------------------------------------------------------------------

scale_of = register_op(
    "token_scale(Tensor fields, Tensor seed, SymInt n, SymInt t, SymInt c, bool share_t, bool share_c, str normalize, "
    "SymInt rank) -> Tensor",
    _scale,
    lambda fields, seed, *others: seed.new_empty((), dtype=torch.float64),
)
_differentiable = register_self_adjoint(
    "token_apply(Tensor x, Tensor fields, Tensor seed, Tensor scale, str layout, bool share_t, bool share_c, "
    "SymInt rank) -> Tensor",
    _apply,
)
