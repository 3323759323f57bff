"""`pattern_dropout`: the right op with the right arguments, nothing in evaluation, no graph break, no recompilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import dynamo_reads_patterns_lazily

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import pattern_dropout
from autodropout.kernels import bernoulli_dropout
from autodropout.kernels import block_dropout
from autodropout.kernels import tiled_dropout
from autodropout.nn import PatternDropout

SEED = 2**40 + 8
PATTERNS: list[Pattern] = [
    TiledPattern(size=0.25, stride=0.3, repeat=3, rotate=30),
    TiledPattern(size=0.4, shear_x=0.5, share_c=True),
    BernoulliPattern(0.3),
    BernoulliPattern(0.3, shared="map"),
    BernoulliPattern(0.3, shared="sample"),
    BlockPattern(0.2, block_size=3),
    BlockPattern(0.2, block_size=2, share_c=True),
]


def activation(*shape: int) -> torch.Tensor:
    """Standard normal numbers, none of them 0."""
    return torch.randn(*(shape or (4, 3, 7, 9)), generator=torch.Generator().manual_seed(5))


def call_op(x: torch.Tensor, pattern: Pattern, **arguments: Any) -> torch.Tensor:
    """The op called by hand."""
    if isinstance(pattern, TiledPattern):
        return tiled_dropout(x, pattern.atlas(x.shape[2], x.shape[3]), share_c=pattern.share_c, **arguments)
    if isinstance(pattern, BernoulliPattern):
        return bernoulli_dropout(x, pattern.rate, shared=pattern.shared, **arguments)
    assert isinstance(pattern, BlockPattern)
    return block_dropout(x, (pattern.rate, pattern.block_size), share_c=pattern.share_c, **arguments)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("normalize", ["mask", "expected", "none"])
def test_is_the_op_of_the_pattern(pattern: Pattern, normalize: str) -> None:
    x = activation()
    y = pattern_dropout(x, pattern, seed=SEED, normalize=normalize, rank=3)
    assert torch.equal(y, call_op(x, pattern, seed=SEED, normalize=normalize, rank=3))
    assert torch.equal(y != 0, pattern.mask(*x.shape, SEED, rank=3))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_default_scale_is_that_of_the_pattern(pattern: Pattern) -> None:
    x = activation()
    default = "mask" if isinstance(pattern, TiledPattern) else "expected"
    other = "expected" if isinstance(pattern, TiledPattern) else "mask"
    y = pattern_dropout(x, pattern, seed=SEED)
    assert torch.equal(y, pattern_dropout(x, pattern, seed=SEED, normalize=default))
    assert not torch.equal(y, pattern_dropout(x, pattern, seed=SEED, normalize=other))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_evaluation_returns_the_very_tensor(pattern: Pattern) -> None:
    x = activation()
    before = torch.get_rng_state()
    assert pattern_dropout(x, pattern, training=False) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_may_be_a_tensor_and_is_drawn_when_left_out() -> None:
    x, pattern = activation(), PATTERNS[0]
    assert torch.equal(pattern_dropout(x, pattern, seed=SEED), pattern_dropout(x, pattern, seed=torch.tensor(SEED)))
    torch.manual_seed(1)
    first, second = pattern_dropout(x, pattern), pattern_dropout(x, pattern)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(pattern_dropout(x, pattern), first)


def test_rank_enters_the_mask() -> None:
    x, pattern = activation(), PATTERNS[0]
    y = pattern_dropout(x, pattern, seed=SEED)
    assert torch.equal(y, pattern_dropout(x, pattern, seed=SEED, rank=0))
    assert not torch.equal(y, pattern_dropout(x, pattern, seed=SEED, rank=1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_gradient_is_masked_and_scaled_alike(pattern: Pattern) -> None:
    x = activation().requires_grad_()
    y = pattern_dropout(x, pattern, seed=SEED)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, pattern_dropout(torch.ones_like(x), pattern, seed=SEED))


def test_residual_changes_nothing_here() -> None:
    x = activation()
    y = pattern_dropout(x, TiledPattern(0.25, residual=True), seed=SEED)
    assert torch.equal(y, pattern_dropout(x, TiledPattern(0.25), seed=SEED))


def test_bernoulli_takes_tokens() -> None:
    x = activation(4, 11, 6)
    y = pattern_dropout(x, BernoulliPattern(0.5), seed=SEED)
    assert y.shape == x.shape
    assert torch.equal(y[y != 0], 2 * x[y != 0])


@pytest.mark.parametrize("training", [True, False])
def test_refuses_what_is_no_pattern(training: bool) -> None:
    with pytest.raises(TypeError, match=r"^pattern must be a Pattern, got 0\.1 of type float$"):
        pattern_dropout(activation(), 0.1, training=training)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layout": ({"layout": "banana"}, ValueError, "layout must be one of 'NTC', 'TNC', 'NHTD', 'NHQK', got 'banana'"),
    "layout type": ({"layout": 3}, TypeError, "layout must be one of .*, got 3 of type int"),
    "normalize": ({"normalize": "mean"}, ValueError, "normalize must be .*'mean'"),
    "normalize type": ({"normalize": 5}, TypeError, "normalize must be .*, got 5 of type int"),
    "seed": ({"seed": "x"}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got str"),
    "rank": ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
}


@pytest.mark.parametrize("pattern", [*PATTERNS, TokenPattern(2, rate=0.5)], ids=repr)
@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("training", [True, False])
def test_arguments_are_checked_in_evaluation_too(
    pattern: Pattern, arguments: dict[str, Any], error: type[Exception], message: str, training: bool
) -> None:
    x = activation(4, 11, 6) if isinstance(pattern, TokenPattern) else activation()
    with pytest.raises(error, match=f"^{message}"):
        pattern_dropout(x, pattern, training=training, **arguments)


def test_training_is_a_flag() -> None:
    for training in ("no", 1, None):
        with pytest.raises(TypeError, match=f"^training must be True or False, got {training!r} of type "):
            pattern_dropout(activation(), PATTERNS[0], training=training)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_all_arguments_compile_whole(training: bool) -> None:
    def call(x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        return pattern_dropout(x, pattern, training, seed=SEED, normalize="none", rank=2, layout="TNC")

    torch._dynamo.reset()
    x = activation(4, 11, 6)
    for pattern in (BernoulliPattern(0.5), TokenPattern(2, rate=0.5)):
        y = torch.compile(call, backend="aot_eager", fullgraph=True)(x, pattern)
        assert torch.equal(y, call(x, pattern))


def test_passes_on_the_complaints_of_the_op() -> None:
    with pytest.raises(ValueError, match=r"^normalize must be .*'mean'"):
        pattern_dropout(activation(), PATTERNS[0], normalize="mean")
    with pytest.raises(ValueError, match=r"^seed must be in \[-2\^63, 2\^64\)"):
        pattern_dropout(activation(), PATTERNS[0], seed=2**64)


def many(pattern: Pattern, count: int) -> list[Pattern]:
    """`count` patterns like this one, all different; whole numbers and zeros among their fields."""
    if isinstance(pattern, TiledPattern):
        return [TiledPattern(i / 100, i % 3 / 4, 1 + i % 4, 7.5 * i, share_c=pattern.share_c) for i in range(count)]
    if isinstance(pattern, BernoulliPattern):
        return [BernoulliPattern(i / count, pattern.shared) for i in range(count)]
    assert isinstance(pattern, BlockPattern)
    return [BlockPattern(i / count * 0.9, 1 + i % 9, pattern.share_c) for i in range(count)]


@dynamo_reads_patterns_lazily
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_compiles_whole_and_once_for_ten_patterns(pattern: Pattern) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        return pattern_dropout(x.sin(), pattern).cos()

    x = activation().requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for i, other in enumerate(many(pattern, 10)):
            torch.manual_seed(i)
            y = step(x, other)
            (grad,) = torch.autograd.grad(y.sum(), x)
            torch.manual_seed(i)
            eager = pattern_dropout(x.sin(), other).cos()
            assert torch.equal(y, eager)
            assert torch.equal(grad, torch.autograd.grad(eager.sum(), x)[0])


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_made_in_inference_mode_it_trains(pattern: Pattern) -> None:
    """Atlases are kept by a cache, the numbers of a pattern by its module: both are saved for backward later."""
    x = activation(2, 3, 5, 11).requires_grad_()  # a map of no other test
    with torch.inference_mode():
        if isinstance(pattern, TiledPattern):
            pattern.expected_rate(5, 11)
        module = PatternDropout(pattern)
        changed = PatternDropout(BernoulliPattern(0.5))
        changed.pattern = pattern
    for drops in (lambda x: call_op(x, pattern, seed=SEED), module, changed):
        torch.manual_seed(2)  # with which every pattern drops something: "sample" keeps both with probability 0.49
        (gradient,) = torch.autograd.grad(drops(x).sum(), x)
        assert bool((gradient == 0).any())


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_vmap_of_an_empty_batch(pattern: Pattern) -> None:
    x = torch.empty(2, 3, 0, 7, 9)
    y = torch.func.vmap(lambda x: call_op(x, pattern, seed=torch.tensor(SEED)), in_dims=2)(x)
    assert y.shape == (0, 2, 3, 7, 9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_tensors_that_are_not_strided_are_refused(pattern: Pattern) -> None:
    with pytest.raises(TypeError, match=r"^x must be a strided tensor, got torch.sparse_coo$"):
        pattern_dropout(activation().to_sparse(), pattern)
    with pytest.raises(TypeError, match=r"^x must be a strided tensor, got a nested one$"):
        pattern_dropout(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), pattern)


def test_the_ops_of_the_document_run() -> None:
    page = (Path(__file__).parent.parent / "docs/kernels.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["out"].shape == names["q"].shape
    assert names["weights"].shape == (2, 4, 128, 128)
