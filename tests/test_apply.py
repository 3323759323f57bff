"""Policies on real models: what is dropped, what is left alone, and that it can all be taken off again."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from twins import tiled_numpy as twin

from autodropout import AppliedSite
from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.apply import SiteDropout
from autodropout.nn import PatternDropout
from autodropout.reproduce.models.wide_resnet import WideBlock
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.sites import find_sites

SIGMAS = 5.0
TILED = TiledPattern(0.25, stride=0.25, repeat=2, rotate=30)
RESIDUAL = TiledPattern(0.3, stride=0.3, repeat=3, residual=True)
# Every kind of pattern, one place where nothing is dropped, and names that no model has.
MIXED = Policy(
    (
        Site("a", 0.0, pattern=TILED),
        Site("b", 0.25, pattern=BernoulliPattern(0.2)),
        Site("c", 0.5, pattern=None),
        Site("d", 0.75, pattern=BlockPattern(0.15, 2)),
        Site("e", 1.0, pattern=RESIDUAL),
    )
)
PLAIN = Policy((*MIXED.sites[:4], Site("e", 1.0, pattern=TiledPattern(0.3, stride=0.3, repeat=3))))

MODELS: dict[str, tuple[Callable[[], nn.Module], Policy]] = {
    "torchvision resnet18": (torchvision.models.resnet18, MIXED),
    "torchvision resnet50": (torchvision.models.resnet50, MIXED),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(dropout=0.0), PLAIN),
    "timm resnet18": (lambda: timm.create_model("resnet18"), MIXED),
    "timm resnet26d": (lambda: timm.create_model("resnet26d"), MIXED),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), PLAIN),
    "wide resnet": (lambda: WideResNet(16, 1), MIXED),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@functools.cache
def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_random_norms(MODELS[name][0]())


def with_random_norms(model: nn.Module) -> nn.Module:
    """No weight or bias of a normalisation is 0 (timm starts residual branches so): what is 0 then was dropped."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return with_random_norms(WideResNet(10, 1))


def run(model: nn.Module, x: torch.Tensor = IMAGES, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    y: torch.Tensor = model(x)
    return y


def train_copy(model: nn.Module, x: torch.Tensor = IMAGES, seed: int = 7) -> torch.Tensor:
    """The training output of a copy, so that the running statistics of the model stay."""
    return run(copy.deepcopy(model).train(), x, seed)


def site_dropouts(model: nn.Module) -> dict[str, SiteDropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SiteDropout)}


def record(model: nn.Module, names: list[str], x: torch.Tensor = IMAGES, passes: int = 1) -> dict[str, list[Any]]:
    """(input, output) of modules in training, as they were before anything was done to them in place."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    model = copy.deepcopy(model).train()
    for name in names:

        def hook(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name].append((args[0].detach().clone(), output.detach().clone()))

        # In front of everything else, so that a site's own dropout cannot have masked the output yet.
        model.get_submodule(name).register_forward_hook(hook, prepend=True)
    with torch.no_grad():
        for i in range(passes):
            run(model, x, seed=i)
    return seen


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Class and every attribute of every module; dictionaries copied, to see what was put into them."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        | {"__class__": type(module)}
        for name, module in model.named_modules(remove_duplicate=False)
    }


def assert_same_attributes(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, attributes in after.items():
        assert attributes.keys() == before[name].keys(), name
        for key, value in attributes.items():
            old = before[name][key]
            if isinstance(value, dict):
                assert list(value) == list(old), (name, key)
                assert all(value[k] is old[k] for k in value), (name, key)
            else:
                assert value is old or value == old, (name, key)


def standard_error(pattern: Pattern, planes: torch.Tensor) -> float:
    """Of the mean over independent planes (all patterns here are independent by channel); exact where it is known.

    Args:
        pattern: with a mask per channel.
        planes: (N, C, H, W), True where dropped.
    """
    height, width = planes.shape[2:]
    count = planes.shape[0] * planes.shape[1]
    if isinstance(pattern, TiledPattern):
        tiling = twin.Tiling(pattern.size, pattern.stride, pattern.repeat, pattern.rotate)
        return math.sqrt(twin.rate_variance(tiling, height, width) / count)
    if isinstance(pattern, BernoulliPattern):
        return math.sqrt(pattern.rate * (1 - pattern.rate) / (count * height * width))
    return planes.double().mean((2, 3)).std().item() / math.sqrt(count)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_drop_what_was_asked_for(name: str) -> None:
    """5 standard errors: two-sided alpha = 5.8e-7 a site by the normal approximation, 1.4e-4 for all 240 sites."""
    model = copy.deepcopy(original(name))
    keys = list(model.state_dict())
    applied = apply_policy(model, MODELS[name][1], example=IMAGES)
    assert list(model.state_dict()) == keys

    targets = {site.name: site for site in find_sites(original(name), IMAGES)}
    expected_off = [site for site in targets.values() if MIXED.pattern_at(site.depth) is None]
    assert len(applied) == len(targets) - len(expected_off) > len(targets) / 2
    paths = {site.name: f"{targets[site.name].target}.pattern_dropout".lstrip(".") for site in applied}
    seen = record(model, list(paths.values()))
    for site in applied:
        target = targets[site.name]
        assert (site.depth, site.map) == (target.depth, target.map)
        assert site.map is not None
        assert site.rate == site.pattern.expected_rate(*site.map[1:])
        ((before, after),) = seen[paths[site.name]]
        assert before.shape == (len(IMAGES), *site.map)
        assert before.all(), site.name  # so whatever is 0 was dropped
        dropped = after == 0
        error = abs(dropped.double().mean().item() - site.rate)
        assert error <= SIGMAS * standard_error(site.pattern, dropped) + 1e-12, site
        assert dropped.any() or site.rate == 0, site


@pytest.mark.parametrize("name", MODELS)
def test_real_models_repeat_and_evaluate_as_before(name: str) -> None:
    model = copy.deepcopy(original(name))
    with torch.no_grad():
        before = run(copy.deepcopy(model).eval())
        apply_policy(model, MODELS[name][1], example=IMAGES)
        first = train_copy(model)
        assert torch.equal(train_copy(model), first)
        assert not torch.equal(train_copy(model, seed=8), first)
        assert not torch.equal(train_copy(original(name)), first)
        assert torch.equal(run(model.eval()), before)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_are_restored(name: str) -> None:
    model = copy.deepcopy(original(name))
    attributes = snapshot(model)
    apply_policy(model, MODELS[name][1], example=IMAGES)
    assert site_dropouts(model)
    remove_policy(model)
    assert_same_attributes(model, attributes)
    with torch.no_grad():
        assert torch.equal(train_copy(model), train_copy(original(name)))
    remove_policy(model)  # nothing there: nothing happens
    apply_policy(model, MODELS[name][1], example=IMAGES)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_train(name: str) -> None:
    """Activations overwrite their input in place: the gradients must not need what was overwritten."""
    model = copy.deepcopy(original(name))
    apply_policy(model, MODELS[name][1], example=IMAGES)
    run(model.train()).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("name", "duplicate"),
    [
        ("torchvision resnet18", by_pickle),
        ("timm efficientnet_b0", copy.deepcopy),
        ("wide resnet", copy.deepcopy),
        ("wide resnet", by_pickle),
        ("wide resnet", by_torch_save),
    ],
)
def test_copies_drop_alike(name: str, duplicate: Any) -> None:
    model = copy.deepcopy(original(name))
    apply_policy(model, MODELS[name][1], example=IMAGES)
    twin_model = duplicate(model)
    with torch.no_grad():
        dropped = train_copy(model)
        assert not torch.equal(dropped, train_copy(original(name)))
        assert torch.equal(train_copy(twin_model), dropped)
        remove_policy(twin_model)
        assert not site_dropouts(twin_model)
        assert torch.equal(train_copy(twin_model), train_copy(original(name)))
        assert torch.equal(train_copy(model), dropped)  # the copy's removal is none of its business


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_keep_dropping(protocol: int) -> None:
    model = small()
    apply_policy(model, MIXED)
    copied = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(run(copied), run(model))
    assert not torch.equal(run(copied), run(small()))


def test_a_new_process_can_read_a_pickle(tmp_path: Path) -> None:
    model = small()
    apply_policy(model, MIXED)
    torch.save(model, tmp_path / "model.pt")
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import torch; model = torch.load('model.pt', weights_only=False); torch.manual_seed(7);"
        "torch.save(model(torch.load('images.pt')), 'result.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), train_copy(model))


def test_sites_keep_the_look_of_their_class() -> None:
    model = small()
    plain = copy.deepcopy(model)
    apply_policy(model, Policy.uniform(TILED))
    for name, module in plain.named_modules():
        masked = model.get_submodule(name)
        assert isinstance(masked, type(module))
        assert (type(masked).__module__, type(masked).__qualname__) == (
            type(module).__module__,
            type(module).__qualname__,
        )
    child = "    (pattern_dropout): PatternDropout(TiledPattern(size=0.25, stride=0.25, repeat=2, rotate=30.0))"
    lines = [line for line in repr(model.bn).splitlines() if "pattern_dropout" in line]
    assert lines == [child[2:]]


def test_removal_is_refused_where_classes_were_changed_since() -> None:
    model = small()
    apply_policy(model, Policy.uniform(TILED))
    torch.nn.utils.parametrize.register_parametrization(model.bn, "weight", nn.Softplus())
    attributes = snapshot(model)
    with pytest.raises(ValueError, match=r"^model must have the classes .* got ParametrizedBatchNorm2d$"):
        remove_policy(model)
    assert_same_attributes(model, attributes)
    torch.nn.utils.parametrize.remove_parametrizations(model.bn, "weight")
    remove_policy(model)
    assert type(model.bn) is nn.BatchNorm2d


def test_averaged_copy() -> None:
    model = small()
    apply_policy(model, Policy.uniform(TILED), example=IMAGES)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    assert torch.equal(train_copy(average), train_copy(model))
    assert torch.equal(run(average.eval()), run(model.eval()))
    plain = small()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(run(plain.eval()), run(average.eval()))


def test_exported_model_has_no_trace_of_it() -> None:
    plain = small().eval()
    model = copy.deepcopy(plain)
    apply_policy(model, MIXED, example=IMAGES)
    exported = torch.export.export(model, (IMAGES,))
    reference = torch.export.export(plain, (IMAGES,))
    assert [(n.op, str(n.target)) for n in exported.graph.nodes] == [
        (n.op, str(n.target)) for n in reference.graph.nodes
    ]
    assert exported.graph_module.code == reference.graph_module.code
    assert exported.state_dict.keys() == reference.state_dict.keys()
    assert not exported.constants
    assert "dropout" not in str(exported)
    assert torch.equal(exported.module()(IMAGES), run(plain))


@pytest.mark.parametrize("policy", [MIXED, Policy.uniform(RESIDUAL)], ids=["mixed", "residual"])
def test_compiles_whole_and_equals_eager(policy: Policy) -> None:
    torch.compiler.reset()
    model = small()
    apply_policy(model, policy, example=IMAGES)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        expected, got = run(eager, seed=seed), run(compiled, seed=seed)
        assert torch.equal(got, expected)
        expected.square().mean().backward()
        got.square().mean().backward()
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_patterns_of_a_compiled_model_can_be_changed() -> None:
    torch.compiler.reset()
    model = small()
    apply_policy(model, Policy.uniform(RESIDUAL), example=IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(5):
            for dropout in site_dropouts(model).values():
                dropout.pattern = TiledPattern(0.1 * i, repeat=1 + i)
            expected = train_copy(model)
            assert torch.equal(run(compiled), expected)


@pytest.mark.parametrize("example", [IMAGES, None], ids=["example", "blind"])
def test_model_may_be_compiled_in_place_before(example: torch.Tensor | None) -> None:
    """The search for sites runs the model and listens: compiled code from before does not call what listens."""
    torch.compiler.reset()
    model = small()
    eager = copy.deepcopy(model)
    model.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        run(model.eval())
    apply_policy(model.train(), MIXED, example)
    apply_policy(eager, MIXED, IMAGES)
    with torch.no_grad():
        assert torch.equal(run(model), run(eager))
        assert torch.equal(run(model.eval()), run(eager.eval()))


def test_compiled_code_of_a_plain_model_is_not_used_for_one_with_a_policy() -> None:
    """Dynamo keeps the code of a class, not of an object: a baseline and its competitor share it where guards allow."""
    torch.compiler.reset()
    plain = small()
    models = {"plain": plain}
    for name, policy in {"mixed": MIXED, "tiled": Policy.uniform(TILED)}.items():
        models[name] = copy.deepcopy(plain)
        apply_policy(models[name], policy, example=IMAGES)
    expected = {name: train_copy(model) for name, model in models.items()}
    compiled = {name: torch.compile(model, fullgraph=True, backend="aot_eager") for name, model in models.items()}
    for name in ("plain", "mixed", "tiled", "mixed", "plain", "tiled"):
        assert torch.equal(run(compiled[name]), expected[name]), name


def test_compiled_model_sees_its_policy_come_and_go() -> None:
    torch.compiler.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for policy in (None, MIXED, Policy.uniform(TILED), None, MIXED):
            remove_policy(compiled)
            run(compiled.eval())  # a graph that the search for sites must not take
            if policy is not None:
                assert apply_policy(compiled, policy, IMAGES)
            expected = train_copy(model)
            assert torch.equal(run(compiled.train()), expected), policy


def test_functional_call() -> None:
    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    got = torch.func.functional_call(model, state, (IMAGES,))
    assert torch.equal(got, train_copy(model))


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_distributed_wrappers(wrap: Any, tmp_path: Path) -> None:
    """One process, rank 0: wrapped and plain model draw the same masks, and the policy comes off a wrapped model."""
    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    plain = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = wrap(model, **({"mesh": init_device_mesh("cpu", (1,))} if wrap is fully_shard else {}))
        expected, got = run(plain), run(wrapped)
        assert torch.equal(got, expected)
        expected.square().mean().backward()
        got.square().mean().backward()
        for one, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
            grad = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
            assert torch.equal(grad, other.grad)
        remove_policy(wrapped)
        remove_policy(plain)
        assert torch.equal(run(wrapped), run(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointing_draws_the_same_masks_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)

    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    twin_model = copy.deepcopy(model)
    run(model).square().mean().backward()
    run(Checkpointed(twin_model)).square().mean().backward()
    for one, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_names_win_over_depth() -> None:
    model = small()
    names = [site.name for site in find_sites(model, IMAGES)]
    patterns: list[Pattern | None] = [BernoulliPattern(i / 10) if i % 2 else None for i in range(len(names))]
    sites = [Site(n, 1 - i / (len(names) - 1), pattern=p) for i, (n, p) in enumerate(zip(names, patterns, strict=True))]
    applied = apply_policy(model, Policy(tuple(sites)), example=IMAGES)
    assert {site.name: site.pattern for site in applied} == {n: p for n, p in zip(names, patterns, strict=True) if p}
    # One name less, and depth decides: the very opposite, because the depths were turned round.
    other = small()
    moved = apply_policy(other, Policy((Site("x", 1.0, pattern=None), *sites[1:])), example=IMAGES)
    assert [(site.name, site.pattern) for site in moved] == [
        (n, p) for n, p in zip(names, reversed(patterns), strict=True) if p
    ]


def test_ties_of_depth_go_to_the_earlier_site() -> None:
    """Three sites take from four: the middle one is as far from depth 1/3 as from 2/3, though not in floats."""
    sites = tuple(Site(f"s{i}", i / 3, pattern=BernoulliPattern(0.1 * (i + 1))) for i in range(4))
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))
    applied = apply_policy(model, Policy(sites), example=IMAGES)
    assert [site.pattern for site in applied] == [sites[0].pattern, sites[1].pattern, sites[3].pattern]


def test_result_tells_what_was_done() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(4), nn.BatchNorm2d(3))
    policy = Policy((Site("*", 0.0, pattern=TILED), Site("end", 1.0, pattern=BlockPattern(0.1, 3))))
    applied = apply_policy(model, policy, example=IMAGES)
    assert applied == [
        AppliedSite("0", 0.0, (3, 64, 64), TILED, TILED.expected_rate(64, 64)),
        AppliedSite("2", 1.0, (3, 16, 16), BlockPattern(0.1, 3), 0.1),
    ]
    remove_policy(model)
    blind = apply_policy(model, policy)
    assert [(site.map, site.rate) for site in blind] == [(None, None)] * 2
    assert [site.pattern for site in blind] == [site.pattern for site in applied]
    assert isinstance(model[0].pattern_dropout, PatternDropout)
    assert repr(model[2].pattern_dropout) == "PatternDropout(BlockPattern(rate=0.1, block_size=3))"


def test_policy_of_nothing_leaves_the_model_alone() -> None:
    model = small()
    attributes = snapshot(model)
    assert apply_policy(model, Policy.uniform(None), example=IMAGES) == []
    assert_same_attributes(model, attributes)


def test_frozen_normalisation_drops_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].eval()
    apply_policy(model, Policy.uniform(BernoulliPattern(0.5)))
    assert (run(model[0]) != 0).all()
    assert not (run(model[1]) != 0).all()


def refused(model: nn.Module, policy: Any, example: Any = IMAGES, error: type[Exception] = ValueError) -> str:
    """The message of a refusal that left the model as it was."""
    attributes = snapshot(model)
    with pytest.raises(error) as caught:
        apply_policy(model, policy, example)
    assert_same_attributes(model, attributes)
    return str(caught.value)


def test_refuses_a_second_policy() -> None:
    model = small()
    apply_policy(model, Policy.uniform(TILED))
    assert "call remove_policy first" in refused(model, Policy.uniform(TILED))


def test_refuses_a_model_without_sites() -> None:
    message = refused(nn.Sequential(nn.Conv2d(3, 3, 1)), Policy.uniform(TILED))
    assert message == "model has no sites of place 'batch_norm' that the example reaches: Sequential"


def test_refuses_the_wrong_things() -> None:
    assert refused(small(), {"sites": []}, error=TypeError) == "policy must be a Policy, got dict"
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got Policy$"):
        apply_policy(Policy.uniform(TILED), small())  # type: ignore[arg-type]


def test_refuses_a_rate_above_095_by_name_map_and_rate() -> None:
    """Half of one cell is rounded to the whole cell: the pattern drops all of a 1x1 map, and much less of others."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    message = refused(model, Policy.uniform(TiledPattern(0.5)))
    assert message.startswith(
        "pattern at site '2' (map 3x1x1) must have an expected rate of at most 0.95, got 1.0000: TiledPattern(size=0.5,"
    )
    assert len(apply_policy(model, Policy.uniform(TiledPattern(0.5)))) == 2  # without an example nobody knows

    sites = (Site("start", 0.0, pattern=TILED), Site("end", 1.0, pattern=BernoulliPattern(0.951)))
    message = refused(small(), Policy(sites))
    assert "'group3.0.bn1' (map 32x32x32)" in message  # the fourth of seven sites lies in the middle: a tie
    assert "got 0.9510" in message


def test_rate_of_095_is_allowed() -> None:
    (site,) = apply_policy(nn.Sequential(nn.BatchNorm2d(3)), Policy.uniform(BernoulliPattern(0.95)), IMAGES)
    assert site.rate == 0.95


def test_every_map_of_a_shared_site_is_checked() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).mean() + self.norm(x[:, :, :1, :1]).mean()

    pattern = TiledPattern(0.5)
    assert pattern.expected_rate(64, 64) < 0.95 < pattern.expected_rate(1, 1) == 1
    assert "(map 3x1x1)" in refused(Pyramid(), Policy.uniform(pattern))


# Residual blocks of known kinds, with 32 channels in and out or twice as many.


def torchvision_block(kind: str, same: bool) -> nn.Module:
    block = getattr(torchvision.models.resnet, kind)
    if same:
        return block(32, 32 // block.expansion)
    return block(32, 64 // block.expansion, 2, nn.Sequential(nn.Conv2d(32, 64, 1, stride=2), nn.BatchNorm2d(64)))


def timm_block(kind: str, same: bool) -> nn.Module:
    block = getattr(timm.models.resnet, kind)
    if same:
        return block(32, 32 // block.expansion)
    return block(32, 64 // block.expansion, 2, timm.models.resnet.downsample_avg(32, 64, 1, stride=2))


BLOCKS = [
    *((f"{kind} of {library}", make, kind) for kind in ("BasicBlock", "Bottleneck")
      for library, make in (("torchvision", torchvision_block), ("timm", timm_block))),
    ("WideBlock", lambda kind, same: WideBlock(32, 32 if same else 64, 1 if same else 2), "WideBlock"),
]  # fmt: skip


@pytest.mark.parametrize("same", [True, False], ids=["identity", "downsampling"])
@pytest.mark.parametrize(("make", "kind"), [block[1:] for block in BLOCKS], ids=[block[0] for block in BLOCKS])
def test_residual_masks_the_skip_tensor_just_before_the_addition(make: Any, kind: str, same: bool) -> None:
    torch.manual_seed(0)
    block = with_random_norms(make(kind, same))
    attributes = snapshot(block)
    x = torch.randn(8, 32, 12, 12)
    applied = apply_policy(block, Policy.uniform(RESIDUAL), example=x)
    last = applied[-1]
    assert [site.pattern.residual for site in applied] == [False] * (len(applied) - 1) + [True]  # type: ignore[attr-defined]
    assert len(site_dropouts(block)) == len(applied) + 1

    # The sum of branch and masked skip, put together by hand, is what the block returns.
    (skip_name,) = set(site_dropouts(block)) - {f"{site.name}.pattern_dropout" for site in applied}
    branch_end = "branch" if kind == "WideBlock" else f"{last.name}.pattern_dropout"
    seen = record(block, [skip_name, branch_end, ""], x)
    ((skip, masked),), ((_, branch),), ((_, result),) = seen[skip_name], seen[branch_end], seen[""]
    assert torch.equal(result, masked + branch if kind == "WideBlock" else (branch + masked).relu())
    if same:
        assert torch.equal(skip, x)

    # A draw of its own with the site's pattern, whose rate it delivers.
    assert skip.all()
    dropped = masked == 0
    rate = RESIDUAL.expected_rate(*skip.shape[2:])
    assert abs(dropped.double().mean().item() - rate) <= SIGMAS * standard_error(RESIDUAL, dropped)
    ((_, at_site),) = record(block, [f"{last.name}.pattern_dropout"], x)[f"{last.name}.pattern_dropout"]
    assert not torch.equal(dropped, at_site == 0)

    with torch.no_grad():
        evaluated = block.eval()(x)
        remove_policy(block)
        assert torch.equal(block(x), evaluated)
    block.train()
    assert_same_attributes(block, attributes)


@pytest.mark.parametrize("as_child", [False, True])
def test_missing_downsample_is_put_back_where_it_was(as_child: bool) -> None:
    """A None can stand among the attributes of a module or among its children."""
    block = torchvision.models.resnet.BasicBlock(8, 8)
    if as_child:
        del block.downsample
        block.register_module("downsample", None)
    attributes = snapshot(block)
    apply_policy(block, Policy.uniform(RESIDUAL))
    assert isinstance(block.downsample, PatternDropout)
    remove_policy(block)
    assert_same_attributes(block, attributes)
    assert block.downsample is None


def test_empty_downsample_masks_once() -> None:
    """An empty nn.Sequential is an identity, and runs the children that it is given by itself."""
    block = torchvision.models.resnet.BasicBlock(8, 8, downsample=nn.Sequential())
    attributes = snapshot(block)
    apply_policy(block, Policy.uniform(RESIDUAL))
    x = torch.randn(4, 8, 16, 16)
    seen = record(block, ["downsample.pattern_dropout"], x)
    assert len(seen["downsample.pattern_dropout"]) == 1
    ((before, after),) = seen["downsample.pattern_dropout"]
    assert torch.equal(before, x)
    assert (after == 0).any()
    remove_policy(block)
    assert_same_attributes(block, attributes)


def exact_policy(model: nn.Module, residual_at: str) -> Policy:
    sites = find_sites(model, IMAGES)
    return Policy(tuple(Site(s.name, s.depth, pattern=RESIDUAL if s.name == residual_at else TILED) for s in sites))


def test_residual_by_name_is_only_allowed_at_the_end_of_a_block() -> None:
    model = torchvision.models.resnet18()
    for name in ("bn1", "layer1.0.bn1"):
        message = refused(model, exact_policy(model, name))
        assert message == f"residual must be False at {name!r}, which does not end a residual block"
    apply_policy(model, exact_policy(model, "layer1.0.bn2"), example=IMAGES)
    skips = [name for name in site_dropouts(model) if not name.endswith("pattern_dropout")]
    assert skips == ["layer1.0.downsample"]


def test_residual_moves_to_the_ends_of_blocks() -> None:
    model = torchvision.models.resnet18()
    applied = apply_policy(model, Policy.uniform(RESIDUAL), example=IMAGES)
    flags = {site.name: site.pattern.residual for site in applied}  # type: ignore[attr-defined]
    assert flags == {name: name.startswith("layer") and name.endswith("bn2") for name in flags}
    assert len(site_dropouts(model)) == len(applied) + 8


@pytest.mark.parametrize("name", ["torchvision mobilenet_v2", "timm efficientnet_b0"])
@pytest.mark.parametrize("example", [IMAGES, None], ids=["example", "blind"])
def test_residual_needs_a_block_of_a_known_kind(name: str, example: torch.Tensor | None) -> None:
    model = copy.deepcopy(original(name))
    message = refused(model, Policy.uniform(RESIDUAL), example)
    assert message.startswith("residual must be False on this model: it has no residual block of a known kind")


def test_stochastic_depth_at_the_ends_of_branches() -> None:
    drop = BernoulliPattern(0.5, shared="sample")
    policy = Policy((Site("end", 1.0, place="branch", pattern=drop),))
    model = small()
    attributes = snapshot(model)
    applied = apply_policy(model, policy, example=IMAGES)
    assert [site.name for site in applied] == ["group1.0.branch", "group2.0.branch", "group3.0.branch"]
    ((before, after),) = record(model, ["group2.0.branch.pattern_dropout"])["group2.0.branch.pattern_dropout"]
    for sample, kept in zip(before, after, strict=True):
        assert torch.equal(kept, 2 * sample) or not kept.any()
    remove_policy(model)
    assert_same_attributes(model, attributes)
    assert "no sites of place 'branch'" in refused(torchvision.models.resnet18(), policy)
    bad = Policy((Site("end", 1.0, place="branch", pattern=RESIDUAL),))
    assert refused(small(), bad) == "residual must be False at sites of place 'branch', got True at 'end'"


def test_a_policy_may_have_both_places() -> None:
    drop = BernoulliPattern(0.5, shared="sample")
    policy = Policy((Site("norm", 0.0, pattern=TILED), Site("end", 0.0, place="branch", pattern=drop)))
    model = small()
    applied = apply_policy(model, policy, example=IMAGES)
    assert [site.pattern for site in applied] == [TILED] * 7 + [drop] * 3
    assert len(site_dropouts(model)) == 10
