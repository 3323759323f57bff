"""`TokenPattern`: values, JSON, rates and masks; and what takes patterns takes it: function, module, policy, figure."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import dynamo_reads_patterns_lazily
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from twins import token as twin

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import load_policy
from autodropout import pattern_dropout
from autodropout.kernels import token_dropout
from autodropout.nn import PatternDropout

SEED = 2**40 + 8
EXAMPLES = [
    TokenPattern(1, rate=0.5),
    TokenPattern(4, 12, rate=0.3, share_t=True),
    TokenPattern(size=2**30 - 1, stride=2**30 - 1, rate=1, share_t=True, share_c=True),
    TokenPattern(3, 2, rate=0.0, share_c=True),
]


def test_fields_are_checked() -> None:
    for name, low, high in (("size", 1, 2**30 - 1), ("stride", 0, 2**30 - 1)):
        for value in (low, high, np.int64(high)):
            stored = getattr(TokenPattern(**({"size": 2, "rate": 0.5} | {name: value})), name)
            assert type(stored) is int
            assert stored == value
        for value in (low - 1, high + 1):
            with pytest.raises(ValueError, match=rf"^{name} must be an integer in \[{low}, {high}\], got {value}$"):
                TokenPattern(**({"size": 2, "rate": 0.5} | {name: value}))
        for wrong in (True, 1.0, "1", None):
            with pytest.raises(TypeError, match=rf"^{name} must be an integer in \[{low}, {high}\], got .* of type "):
                TokenPattern(**({"size": 2, "rate": 0.5} | {name: wrong}))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^rate must be in \[0, 1\], got "):
            TokenPattern(2, rate=wrong)
    with pytest.raises(TypeError, match=r"^rate must be in \[0, 1\], got '1' of type str$"):
        TokenPattern(2, rate="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rate"):
        TokenPattern(2)  # type: ignore[call-arg]
    for name in ("share_t", "share_c"):
        with pytest.raises(TypeError, match=rf"^{name} must be True or False, got 1 of type int$"):
            TokenPattern(2, rate=0.5, **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_is_a_value(pattern: TokenPattern) -> None:
    assert sum(pattern == other for other in EXAMPLES) == 1
    for same in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert same == pattern
        assert hash(same) == hash(pattern)
        assert torch.equal(same.fields(), pattern.fields())
    assert pattern.fields().tolist() == [pattern.size, pattern.stride, pattern.rate]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.rate = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_json_round_trip(pattern: TokenPattern) -> None:
    data = pattern.to_json()
    assert list(data) == ["op", "size", "stride", "rate", "share_t", "share_c"]
    assert data["op"] == "token"
    assert Pattern.from_json(data) == pattern


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 2}, "p.rate: missing"),
        ({"rate": 0.5}, "p.size: missing"),
        ({"size": 0, "rate": 0.5}, "p.size: must be an integer in [1, 1073741823], got 0"),
        ({"size": 2, "rate": 1.5}, "p.rate: must be in [0, 1], got 1.5"),
        ({"size": 2, "rate": 0.5, "share_t": 1}, "p.share_t: must be True or False, got 1 of type int"),
        ({"size": 2, "rate": 0.5, "layout": "NTC"}, "p.layout: unknown field, known are "),
    ],
)
def test_json_errors_begin_with_the_path_of_the_field(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is checked below
        Pattern.from_json({"op": "token", **data}, "p")
    assert str(caught.value).startswith(message)


def test_expected_rate_is_the_mean_over_all_phases() -> None:
    for tokens, size, stride in ((12, 3, 2), (12, 12, 5), (12, 11, 5), (1, 1, 3), (7, 1, 20)):
        period = size + stride
        phases = [0] if size >= tokens else range(period)
        covered = [sum((t + phase) % period < size for t in range(tokens)) / tokens for phase in phases]
        rate = TokenPattern(size, stride, rate=0.3).expected_rate(tokens)
        assert rate == pytest.approx(0.3 * sum(covered) / len(covered), rel=1e-12)
    with pytest.raises(ValueError, match=r"^tokens must be an integer in \[1, 2147483647\], got 0$"):
        EXAMPLES[0].expected_rate(0)


def test_scaled_multiplies_the_rate() -> None:
    pattern = TokenPattern(4, 12, rate=0.25, share_t=True)
    assert pattern.scaled(2) == dataclasses.replace(pattern, rate=0.5)
    assert pattern.scaled(5).rate == 1.0
    with pytest.raises(ValueError, match=r"^factor must be finite and at least 0, got -1$"):
        pattern.scaled(-1)


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_mask_is_the_one_of_the_definition(pattern: TokenPattern) -> None:
    mask = pattern.mask(2, 9, 5, SEED, rank=3)
    values = pattern.size, pattern.stride, pattern.rate
    expected = twin.dropped(2, 9, 5, *values, SEED, pattern.share_t, pattern.share_c, rank=3)
    assert torch.equal(mask, ~torch.from_numpy(expected))
    assert torch.equal(mask, pattern.mask(2, 9, 5, torch.tensor(SEED), rank=3))


# ---- what takes patterns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", EXAMPLES)
@pytest.mark.parametrize(("layout", "shape"), [("NTC", (2, 9, 6)), ("TNC", (9, 2, 6)), ("NHQK", (2, 3, 2, 9))])
def test_function_and_module_are_the_op(pattern: TokenPattern, layout: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    sharing = {"share_t": pattern.share_t, "share_c": pattern.share_c}
    fields = pattern.size, pattern.stride, pattern.rate
    for normalize in (None, "mask", "none"):
        expected = token_dropout(x, fields, SEED, layout, **sharing, normalize=normalize or "expected", rank=3)
        y = pattern_dropout(x, pattern, seed=SEED, normalize=normalize, rank=3, layout=layout)
        assert torch.equal(y, expected)
    module = PatternDropout(pattern, layout=layout)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    assert torch.equal(y, token_dropout(x, fields, None, layout, **sharing))
    assert module.eval()(x) is x
    assert pattern_dropout(x, pattern, training=False, layout=layout) is x


def test_module_checks_and_shows_its_layout() -> None:
    module = PatternDropout(EXAMPLES[1], layout="NHQK")
    assert repr(module) == ("PatternDropout(TokenPattern(size=4, stride=12, rate=0.3, share_t=True), layout='NHQK')")
    assert repr(PatternDropout(EXAMPLES[0])) == "PatternDropout(TokenPattern(size=1, rate=0.5))"
    assert copy.deepcopy(module).layout == pickle.loads(pickle.dumps(module)).layout == "NHQK"
    with pytest.raises(ValueError, match=r"^layout must be one of 'NTC', 'TNC', 'NHTD', 'NHQK', got 'NCT'$"):
        PatternDropout(EXAMPLES[0], layout="NCT")
    with pytest.raises(ValueError, match="layout must be .* got 'NCT'"):
        pattern_dropout(torch.ones(2, 3, 4), EXAMPLES[0], layout="NCT")


def test_a_pattern_of_maps_takes_no_layout() -> None:
    """It would take tokens for channels."""
    x = torch.ones(2, 3, 4)
    of_maps = [TiledPattern(0.5), BlockPattern(0.1, 1), BernoulliPattern(0.1, "map"), BernoulliPattern(0.1, "sample")]
    for pattern in of_maps:
        with pytest.raises(ValueError, match=r"^layout must be None for what takes \(N, C, ...\), got 'TNC' with "):
            pattern_dropout(x, pattern, layout="TNC")
        with pytest.raises(ValueError, match=r"^layout must be None"):
            PatternDropout(pattern, layout="TNC")
    for pattern in (BernoulliPattern(0.1), BernoulliPattern(0.1, "sample"), BernoulliPattern(0.1, (2,))):
        assert pattern_dropout(x, pattern, layout="NTC").shape == x.shape


def test_fifty_assignments_never_recompile() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = PatternDropout(EXAMPLES[1])
    model = nn.Sequential(nn.Linear(6, 6), layer)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 9, 6)
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for i in range(50):
            layer.pattern = TokenPattern(1 + i % 12, i % 5, rate=i / 50, share_t=True)
            torch.manual_seed(i)
            y = compiled(x)
            torch.manual_seed(i)
            assert torch.equal(y, model(x))
    assert counter.frame_count == 1


@dynamo_reads_patterns_lazily
def test_a_compiled_function_takes_any_pattern() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        return pattern_dropout(x.sin(), pattern, layout="NHTD").cos()

    x = torch.randn(2, 3, 9, 4)
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for i in range(5):
            pattern = TokenPattern(1 + i, i, rate=i / 5).scaled(0.5)
            torch.manual_seed(i)
            y = step(x, pattern)
            torch.manual_seed(i)
            assert torch.equal(y, pattern_dropout(x.sin(), pattern, layout="NHTD").cos())


def test_policies_hold_token_patterns(tmp_path: Path) -> None:
    policy = Policy((Site("a", 0.0, pattern=EXAMPLES[1]), Site("b", 1.0, pattern=EXAMPLES[2])))
    policy.save(tmp_path / "tokens.json")
    assert load_policy(tmp_path / "tokens.json") == policy
    assert policy.scaled(0.5).sites[0].pattern == TokenPattern(4, 12, rate=0.15, share_t=True)


def test_maps_are_refused_by_name() -> None:
    """There are no tokens on the output of a batch normalisation."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for example in (torch.randn(2, 3, 5, 6), None):
        with pytest.raises(ValueError, match=r"^pattern must be a pattern of maps at place 'batch_norm', got TokenPat"):
            apply_policy(model, Policy.uniform(EXAMPLES[0]), example)
    with pytest.raises(ValueError, match=r"^pattern must be one of maps to be used on one of 5x6 cells, got TokenPat"):
        EXAMPLES[0].expected_rate(5, 6)
    with pytest.raises(ValueError, match=r"^x must have 3 dimensions for layout 'NTC', got shape \(2, 4, 5, 6\)$"):
        PatternDropout(EXAMPLES[0])(torch.randn(2, 4, 5, 6))


def test_figure_shows_tokens_by_channels() -> None:
    pytest.importorskip("matplotlib")
    from autodropout.draw import draw_policy

    figure = draw_policy(Policy.uniform(EXAMPLES[1]), 16)
    panels = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert np.array_equal(np.stack(panels), EXAMPLES[1].mask(8, 16, 16, 0).numpy())
    shown = [text.get_text() for text in figure.texts]
    assert "token: size 4, stride 12, rate 0.3, share_t (tokens down, channels across)" in shown
    assert "expected rate 7.5%" in shown
