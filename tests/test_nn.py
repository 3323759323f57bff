"""Modules: identity in evaluation, nothing in the state, copies, no recompilation, the peers' names."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm.layers
import torch
import torchvision
from test_functional import PATTERNS
from test_functional import activation
from test_functional import many
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout.nn import DropBlock2d
from autodropout.nn import Dropout
from autodropout.nn import DropPath
from autodropout.nn import PatternDropout
from autodropout.nn import PatternSite
from autodropout.nn import SoftmaxSite
from autodropout.nn import SpatialDropout1d
from autodropout.nn import SpatialDropout2d
from autodropout.nn import SpatialDropout3d
from autodropout.nn import VariationalDropout
from autodropout.nn import WordDropout

NAMED: list[PatternDropout] = [Dropout(0.3), SpatialDropout2d(0.3), DropPath(0.3), DropBlock2d(0.2, 3)]


def draw(module: nn.Module, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    y: torch.Tensor = module(x)
    return y


def draw_functional(x: torch.Tensor, pattern: Pattern, normalize: str | None = None, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return pattern_dropout(x, pattern, normalize=normalize)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("normalize", [None, "mask", "expected", "none"])
def test_is_the_function(pattern: Pattern, normalize: str | None) -> None:
    x = activation()
    assert torch.equal(draw(PatternDropout(pattern, normalize), x), draw_functional(x, pattern, normalize))


@pytest.mark.parametrize("module", [PatternDropout(PATTERNS[0]), *NAMED], ids=repr)
def test_evaluation_returns_the_very_tensor(module: PatternDropout) -> None:
    x = activation()
    module = copy.deepcopy(module).eval()
    before = torch.get_rng_state()
    assert module(x) is x
    assert torch.equal(torch.get_rng_state(), before)
    assert module.train()(x) is not x


@pytest.mark.parametrize("module", [PatternDropout(PATTERNS[0]), *NAMED], ids=repr)
def test_has_no_state(module: PatternDropout) -> None:
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    assert module.state_dict() == {}


def test_pattern_can_be_set_at_any_time() -> None:
    x = activation()
    module = PatternDropout(PATTERNS[0])
    for pattern in PATTERNS:
        module.pattern = pattern
        assert module.pattern is pattern
        assert torch.equal(draw(module, x), draw_functional(x, pattern))


def test_refuses_bad_arguments_and_keeps_what_it_had() -> None:
    module = PatternDropout(PATTERNS[0])
    with pytest.raises(TypeError, match=r"^pattern must be a Pattern, got 'tiled' of type str$"):
        module.pattern = "tiled"  # type: ignore[assignment]
    assert module.pattern is PATTERNS[0]
    with pytest.raises(TypeError, match=r"^pattern must be a Pattern, got None"):
        PatternDropout(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^normalize must be one of 'mask', 'expected', 'none', got 'mean'$"):
        PatternDropout(PATTERNS[0], normalize="mean")


def test_normalize_and_layout_can_be_set_and_are_checked() -> None:
    module = PatternDropout(TokenPattern(2, rate=0.5), layout="NTC")
    x = activation(4, 11, 6)
    for name, allowed in (("normalize", "'mask', 'expected', 'none'"), ("layout", "'NTC', 'TNC', 'NHTD', 'NHQK'")):
        before = getattr(module, name)
        with pytest.raises(ValueError, match=f"^{name} must be one of {allowed}, got 'banana'$"):
            setattr(module, name, "banana")
        with pytest.raises(TypeError, match=f"^{name} must be one of {allowed}, got 3 of type int$"):
            setattr(module, name, 3)
        assert getattr(module, name) == before
    module.normalize, module.layout = "none", "TNC"
    torch.manual_seed(3)
    expected = pattern_dropout(x, module.pattern, normalize="none", layout="TNC")
    for same in (module, copy.deepcopy(module), by_pickle(module)):
        assert torch.equal(draw(same, x), expected)
    module.pattern = BernoulliPattern(0.5)
    with pytest.raises(ValueError, match="^layout must be None for what takes"):
        module.pattern = BernoulliPattern(0.5, "map")
    module.layout = None  # type: ignore[assignment]
    module.pattern = BernoulliPattern(0.5, "map")
    with pytest.raises(ValueError, match="^layout must be None for what takes"):
        module.layout = "NTC"
    assert module.layout == "NTC"
    module.pattern = TiledPattern(0.2)


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        ("TNC", BernoulliPattern(0.5, "sample")),
        ("TNC", BernoulliPattern(0.5, "map")),
        ("NTC", BernoulliPattern(0.5, "map")),
        ("NTC", TiledPattern(0.2)),
        ("NHQK", BlockPattern(0.1, 3)),
    ],
)
def test_a_layout_refuses_the_same_patterns_later(layout: str, pattern: Pattern) -> None:
    """It would take tokens for channels or samples. Refused ones leave the module as it was, and so do copies."""
    own = TokenPattern(2, rate=0.5)
    module = PatternDropout(own, layout=layout)
    x = torch.ones(2, 3, 8, 8) if layout == "NHQK" else torch.ones(2, 3, 8)
    y = draw(module, x)
    with pytest.raises(ValueError, match="layout must be None for what takes"):
        PatternDropout(pattern, layout=layout)
    for copied in (module, copy.deepcopy(module), by_pickle(module)):
        with pytest.raises(ValueError, match=f"layout must be None .*, got '{layout}' with {type(pattern).__name__}"):
            copied.pattern = pattern
        assert copied.pattern == own
        assert torch.equal(draw(copied, x), y)
        copied.pattern = BernoulliPattern(1.0)
        assert not draw(copied, x).any()


def by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: nn.Module) -> Any:
    """As a model saved on one device and loaded for another, here for the one that has no memory at all."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, map_location="meta", weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, by_pickle, by_torch_save])
@pytest.mark.parametrize("module", [PatternDropout(PATTERNS[0], "none"), *NAMED], ids=repr)
def test_copies_drop_alike_and_are_independent(module: PatternDropout, duplicate: Any) -> None:
    x = activation()
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert twin.pattern == module.pattern
    y = draw(module, x)
    assert torch.equal(draw(twin, x), y)
    twin.pattern = BernoulliPattern(1.0)
    assert not draw(twin, x).any()
    assert torch.equal(draw(module, x), y)


def test_moves_with_its_model_and_keeps_its_numbers() -> None:
    module = PatternDropout(PATTERNS[0])
    x = activation()
    y = draw(module, x)
    assert torch.equal(draw(module.half().to("meta").to_empty(device="cpu"), x), y)


@pytest.mark.parametrize("pattern", [*PATTERNS, BernoulliPattern(0.3, shared=(1, 3))], ids=repr)
def test_fifty_assignments_never_recompile(pattern: Pattern) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = PatternDropout(pattern)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = activation()
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for i, other in enumerate(many(pattern, 50)):
            layer.pattern = other
            y = draw(compiled, x, seed=i)
            y.sum().backward()
            assert torch.equal(y, draw(model, x, seed=i))
    assert counter.frame_count == 1


def test_training_and_evaluation_are_the_only_graphs() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = PatternDropout(PATTERNS[0])
    compiled = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1), layer), fullgraph=True, backend=counter)
    x = activation()
    for i, other in enumerate(many(PATTERNS[0], 10)):
        layer.pattern = other
        compiled.train(i % 2 == 0)
        draw(compiled, x)
    assert counter.frame_count == 2


def test_inductor_draws_the_eager_mask() -> None:
    torch.compiler.reset()
    layer = PatternDropout(PATTERNS[0])
    compiled = torch.compile(layer, fullgraph=True)
    x = activation()
    for other in many(PATTERNS[0], 3):
        layer.pattern = other
        assert torch.equal(draw(compiled, x), draw(layer, x))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            PatternDropout(TiledPattern(0.25, stride=0.5, repeat=3)),
            "PatternDropout(TiledPattern(size=0.25, stride=0.5, repeat=3))",
        ),
        (
            PatternDropout(BernoulliPattern(0.1, "map"), normalize="mask"),
            "PatternDropout(BernoulliPattern(rate=0.1, shared='map'), normalize='mask')",
        ),
        (PatternDropout(BlockPattern(0.1, 7)), "PatternDropout(BlockPattern(rate=0.1, block_size=7))"),
        (
            PatternDropout(BernoulliPattern(0.1, shared=(2, 1))),
            "PatternDropout(BernoulliPattern(rate=0.1, shared=(1, 2)))",
        ),
        (
            PatternDropout(TokenPattern(2, rate=0.5), layout="NTC"),
            "PatternDropout(TokenPattern(size=2, rate=0.5), layout='NTC')",
        ),
        (
            PatternDropout(TokenPattern(2, rate=0.5), "none", "TNC"),
            "PatternDropout(TokenPattern(size=2, rate=0.5), normalize='none', layout='TNC')",
        ),
        (PatternSite("query", "NHTD"), "PatternSite('query', layout='NHTD')"),
        (SoftmaxSite(), "SoftmaxSite()"),
        (Dropout(), "Dropout(p=0.5)"),
        (SpatialDropout1d(), "SpatialDropout1d(p=0.5)"),
        (SpatialDropout2d(), "SpatialDropout2d(p=0.5)"),
        (SpatialDropout3d(0.1), "SpatialDropout3d(p=0.1)"),
        (WordDropout(0.1), "WordDropout(p=0.1)"),
        (VariationalDropout(0.1), "VariationalDropout(p=0.1)"),
        (DropPath(0.1), "DropPath(drop_prob=0.1)"),
        (DropPath(0.1, scale_by_keep=False), "DropPath(drop_prob=0.1, scale_by_keep=False)"),
        (DropBlock2d(p=0.1, block_size=7), "DropBlock2d(p=0.1, block_size=7)"),
    ],
)
def test_repr(module: nn.Module, text: str) -> None:
    assert repr(module) == text


@pytest.mark.parametrize(
    ("module", "pattern", "text"),
    [
        (Dropout(0.1), TiledPattern(0.3), "Dropout(TiledPattern(size=0.3))"),
        (Dropout(0.1), BlockPattern(0.2, 3), "Dropout(BlockPattern(rate=0.2, block_size=3))"),
        (Dropout(0.1), BernoulliPattern(0.1, "map"), "Dropout(BernoulliPattern(rate=0.1, shared='map'))"),
        (Dropout(0.1), BernoulliPattern(0.2), "Dropout(p=0.2)"),
        (SpatialDropout2d(0.1), BernoulliPattern(0.1), "SpatialDropout2d(BernoulliPattern(rate=0.1))"),
        (WordDropout(0.1), BernoulliPattern(0.1, (1,)), "WordDropout(BernoulliPattern(rate=0.1, shared=(1,)))"),
        (DropPath(0.1), TiledPattern(0.3), "DropPath(TiledPattern(size=0.3), normalize='expected')"),
        (
            DropPath(0.1, scale_by_keep=False),
            BernoulliPattern(0.1, "map"),
            "DropPath(BernoulliPattern(rate=0.1, shared='map'), normalize='none')",
        ),
        (DropPath(0.1), BernoulliPattern(0.2, "sample"), "DropPath(drop_prob=0.2)"),
        (
            DropBlock2d(0.1, 7),
            BlockPattern(0.1, 7, share_c=True),
            "DropBlock2d(BlockPattern(rate=0.1, block_size=7, share_c=True))",
        ),
        (DropBlock2d(0.1, 7), BernoulliPattern(0.1), "DropBlock2d(BernoulliPattern(rate=0.1))"),
        (DropBlock2d(0.1, 7), BlockPattern(0.2, 3), "DropBlock2d(p=0.2, block_size=3)"),
    ],
)
def test_repr_of_a_pattern_set_later(module: PatternDropout, pattern: Pattern, text: str) -> None:
    """The short form only where the class and its arguments would say all of it."""
    module.pattern = pattern
    assert repr(module) == text


@pytest.mark.parametrize(
    ("module", "normalize", "text"),
    [
        (Dropout(0.1), "mask", "Dropout(BernoulliPattern(rate=0.1), normalize='mask')"),
        (DropBlock2d(0.1, 7), "none", "DropBlock2d(BlockPattern(rate=0.1, block_size=7), normalize='none')"),
        (DropPath(0.1), "mask", "DropPath(BernoulliPattern(rate=0.1, shared='sample'), normalize='mask')"),
        (DropPath(0.1), None, "DropPath(BernoulliPattern(rate=0.1, shared='sample'))"),
        (DropPath(0.1), "none", "DropPath(drop_prob=0.1, scale_by_keep=False)"),
    ],
)
def test_repr_of_another_scale_set_later(module: PatternDropout, normalize: str | None, text: str) -> None:
    module.normalize = normalize
    assert repr(module) == text


@pytest.mark.parametrize(
    ("module", "name", "high"),
    [
        (Dropout(0.1), "p", 1),
        (SpatialDropout2d(0.1), "p", 1),
        (DropPath(0.1), "drop_prob", 1),
        (DropBlock2d(0.1, 3), "p", 0.95),
    ],
)
def test_a_probability_can_be_set_at_any_time(module: PatternDropout, name: str, high: float) -> None:
    x, kind = activation(), type(module.pattern)
    setattr(module, name, 0.3)
    assert getattr(module, name) == 0.3
    assert type(module.pattern) is kind
    assert torch.equal(draw(module, x), draw_functional(x, module.pattern, module.normalize))
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, {high}\], got 1\.5$"):
        setattr(module, name, 1.5)
    with pytest.raises(TypeError, match=rf"^{name} must be in \[0, {high}\], got '0\.2' of type str$"):
        setattr(module, name, "0.2")
    assert getattr(module, name) == 0.3
    module.pattern = TiledPattern(0.3)
    with pytest.raises(TypeError, match=f"^{name} needs a BernoulliPattern or a BlockPattern"):
        setattr(module, name, 0.2)


@pytest.mark.parametrize(
    ("module", "name"), [(Dropout(0.1), "p"), (DropPath(0.1), "drop_prob"), (DropBlock2d(0.1, 3), "p")]
)
def test_a_probability_needs_a_pattern_that_has_one(module: PatternDropout, name: str) -> None:
    for pattern in (BernoulliPattern(0.2, "map"), BlockPattern(0.2, 3)):
        module.pattern = pattern
        assert getattr(module, name) == 0.2
    module.pattern = TiledPattern(0.3)
    message = rf"^{name} needs a BernoulliPattern or a BlockPattern, got TiledPattern\(size=0.3, "
    with pytest.raises(TypeError, match=message):
        getattr(module, name)


def shares(y: torch.Tensor) -> tuple[int, ...]:
    """The dimensions along which zeros never change."""
    kept = y != 0
    return tuple(d for d in range(y.dim()) if torch.equal(kept, kept.narrow(d, 0, 1).expand_as(kept)))


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Dropout(), nn.Dropout(), (8, 6, 5)),
        (Dropout(), nn.Dropout(), (16, 3, 4, 5)),
        (SpatialDropout1d(), nn.Dropout1d(), (8, 16, 5)),
        (SpatialDropout2d(), nn.Dropout2d(), (8, 16, 5, 6)),
        (SpatialDropout3d(), nn.Dropout3d(), (8, 16, 3, 5, 6)),
        (WordDropout(), nn.Dropout1d(), (8, 16, 5)),
        (VariationalDropout(), lambda x: nn.Dropout1d()(x.transpose(1, 2)).transpose(1, 2), (8, 5, 16)),
        (DropPath(0.5), timm.layers.DropPath(0.5), (64, 3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_drops_what_the_peer_drops(ours: nn.Module, theirs: Any, shape: tuple[int, ...]) -> None:
    """The same cells share a decision, both outcomes occur, and what is kept is doubled."""
    x = activation(*shape)
    y, peer = draw(ours, x), draw(theirs, x)
    assert shares(y) == shares(peer)
    for z in (y, peer):
        assert 0 < int((z != 0).sum()) < x.numel()
        assert torch.equal(z[z != 0], 2 * x[z != 0])


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (SpatialDropout1d(), (2, 3, 4, 5), r"^x must be \(N, C, L\), got shape \(2, 3, 4, 5\)$"),
        (SpatialDropout2d(), (3, 4, 5), r"^x must be \(N, C, H, W\), got shape \(3, 4, 5\)$"),
        (SpatialDropout3d(), (3, 4, 5), r"^x must be \(N, C, D, H, W\), got shape"),
        (WordDropout(), (3, 4), r"^x must be \(N, T, C\), got shape \(3, 4\)$"),
        (VariationalDropout(), (3, 4), r"^x must be \(N, T, C\), got shape \(3, 4\)$"),
    ],
)
def test_refuses_another_number_of_dimensions(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(torch.ones(shape))


@pytest.mark.parametrize("shape", [(64, 3, 4, 5), (64, 7, 6)])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_drops_samples(shape: tuple[int, ...], scale_by_keep: bool) -> None:
    x = activation(*shape)
    y = draw(DropPath(drop_prob=0.75, scale_by_keep=scale_by_keep), x)
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert 0 < kept.any(1).sum() < 64
    assert torch.equal(y[y != 0], (4 if scale_by_keep else 1) * x[y != 0])


def test_drop_path_of_nothing_is_timms_default() -> None:
    x = activation()
    assert torch.equal(draw(DropPath(), x), x)


def test_drop_block_is_its_pattern() -> None:
    x = activation()
    assert torch.equal(draw(DropBlock2d(p=0.2, block_size=3), x), draw_functional(x, BlockPattern(0.2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatialDropout2d(1.5), r"^p must be in \[0, 1\], got 1\.5$"),
        (lambda: WordDropout(-1), r"^p must be in \[0, 1\], got -1$"),
        (lambda: DropPath(-0.1), r"^drop_prob must be in \[0, 1\], got -0\.1$"),
        (lambda: DropBlock2d(0.96, 7), r"^p must be in \[0, 0\.95\], got 0\.96$"),
        (lambda: DropBlock2d(0.1, 0), r"^block_size must be .* got 0$"),
    ],
)
def test_named_modules_name_their_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("module", [PatternDropout(TiledPattern(0.5)), SpatialDropout2d(0.5)], ids=repr)
def test_fx_keeps_the_module_as_one_step(module: nn.Module) -> None:
    """The graph follows the training flag, copies too, and has no state that the model has not."""
    x = activation()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    graph = torch.fx.symbolic_trace(model)
    assert list(graph.state_dict()) == list(model.state_dict())
    for traced in (graph, copy.deepcopy(graph), by_pickle(graph)):
        for training in (True, False):
            assert torch.equal(draw(traced.train(training), x), draw(model.train(training), x))
    assert not torch.equal(draw(graph.train(), x), graph.eval()(x))


@pytest.mark.parametrize("residual", [False, True])
def test_features_are_extracted_from_a_model_with_a_policy(residual: bool) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = torchvision.models.resnet18(num_classes=4)
    apply_policy(model, Policy.uniform(TiledPattern(0.3, residual=residual)), x)
    features = create_feature_extractor(model, ["layer4"])
    expected: list[torch.Tensor] = []
    model.layer4.register_forward_hook(lambda _module, _args, y: expected.append(y))
    for training in (True, False):
        expected.clear()
        draw(model.train(training), x)
        assert torch.equal(draw(features.train(training), x)["layer4"], expected[0])  # type: ignore[call-overload]
