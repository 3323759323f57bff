"""One function for all patterns: it picks the op, the op does the work."""

from __future__ import annotations

import torch

from .kernels import bernoulli_dropout
from .kernels import block_dropout
from .kernels import tiled_dropout
from .kernels import token_dropout
from .kernels.seeds import as_rank
from .kernels.seeds import check_seed
from .patterns import BernoulliPattern
from .patterns import BlockPattern
from .patterns import Pattern
from .patterns import TiledPattern
from .patterns import TokenPattern
from .patterns.checks import choice
from .patterns.checks import flag

NORMALIZE = ("mask", "expected", "none")
LAYOUTS = ("NTC", "TNC", "NHTD", "NHQK")


def pattern_dropout(
    x: torch.Tensor,
    pattern: Pattern,
    training: bool = True,
    seed: int | torch.Tensor | None = None,
    normalize: str | None = None,
    rank: int | None = None,
    layout: str | None = None,
) -> torch.Tensor:
    """Drops what `pattern` says and scales the rest.

    Works inside `torch.compile(fullgraph=True)`; another pattern of the same kind (and sharing) does not recompile. The
    `residual` flag of a tiled pattern means nothing here: it speaks of a second tensor, see `apply_policy`.

    Args:
        x: activation (N, C, H, W), any shape with the batch first for a `BernoulliPattern` that the op allows, or one
            of `layout` for a `TokenPattern`; float64, float32, float16 or bfloat16.
        pattern: what is dropped together.
        training: False returns x itself.
        seed: integer in [-2^63, 2^64), or a 0-d int64 tensor on x's device; None draws one from PyTorch's default
            generator of that device.
        normalize: `"mask"` divides by the kept share of the mask drawn, `"expected"` by the expected one, `"none"`
            scales nothing; None is the pattern's default (`"mask"`, the paper's, for tiled ones, else `"expected"`).
        rank: enters the random numbers so that ranks draw different masks; None is the global rank under
            `torch.distributed`, 0 otherwise.
        layout: where a `TokenPattern` finds samples, tokens and channels in x: `"NTC"` (also None), `"TNC"`, `"NHTD"`
            (queries, keys or values by head) or `"NHQK"` (attention weights, a token being a key). A `BernoulliPattern`
            whose decisions are no channel's may have it, too; None for all that find channels in dimension 1.

    Returns:
        A tensor with x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {pattern!r} of type {type(pattern).__name__}")
    layout = layout_of(pattern, layout)
    if not flag("training", training):
        # What the op would refuse is refused here, too: a mistake does not wait for the first step of training.
        if normalize is not None:
            choice("normalize", normalize, NORMALIZE)
        if seed is not None:
            check_seed(seed, x.device)
        if rank is not None:
            as_rank(rank)
        return x
    return dispatch(
        x,
        pattern.op,
        pattern.fields(),
        sharing(pattern),
        pattern.default_normalize if normalize is None else normalize,
        seed,
        rank,
        layout,
    )


def layout_of(pattern: Pattern, layout: str | None) -> str:
    """The layout asked for, "NTC" for None.

    Raises:
        TypeError: it is no string.
        ValueError: it is none that there is; one was asked for, and the pattern would take tokens for channels, or for
            samples.
    """
    if layout is None:
        return "NTC"
    layout = choice("layout", layout, LAYOUTS)
    if isinstance(pattern, BernoulliPattern):
        of_maps = pattern.shared == "map" or (pattern.shared == "sample" and layout == "TNC")
    else:
        of_maps = not isinstance(pattern, TokenPattern)
    if of_maps:
        raise ValueError(f"layout must be None for what takes (N, C, ...), got {layout!r} with {pattern!r}")
    return layout


def sharing(pattern: Pattern) -> str | bool | tuple[int, ...]:
    """What of a pattern a compiled graph is specialised on: what a decision is shared by; "t", "c", "tc" for tokens."""
    if isinstance(pattern, BernoulliPattern):
        return pattern.shared
    if isinstance(pattern, (TiledPattern, BlockPattern)):
        return pattern.share_c
    if isinstance(pattern, TokenPattern):
        return ("t" if pattern.share_t else "") + ("c" if pattern.share_c else "")
    raise TypeError(f"pattern must be a TiledPattern, BernoulliPattern, BlockPattern or TokenPattern, got {pattern!r}")


def dispatch(
    x: torch.Tensor,
    op: str,
    fields: torch.Tensor,
    shared: str | bool | tuple[int, ...],
    normalize: str,
    seed: int | torch.Tensor | None = None,
    rank: int | None = None,
    layout: str = "NTC",
) -> torch.Tensor:
    """Calls the op named `op` with a pattern taken apart: `fields` as of `Pattern.fields`, `shared` as of `sharing`."""
    if op == "tiled":
        y: torch.Tensor = tiled_dropout(x, fields, seed, share_c=bool(shared), normalize=normalize, rank=rank)
    elif op == "block":
        y = block_dropout(x, fields, seed, share_c=bool(shared), normalize=normalize, rank=rank)
    elif op == "token":
        share_t, share_c = "t" in str(shared), "c" in str(shared)
        y = token_dropout(x, fields, seed, layout, share_t, share_c, normalize, rank)
    else:
        dims = shared if isinstance(shared, tuple) else str(shared)
        y = bernoulli_dropout(x, fields, seed, shared=dims, normalize=normalize, rank=rank)
    return y
