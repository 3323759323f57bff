"""Models with a policy when they are copied, pickled, compiled, exported, wrapped and checkpointed."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from applied import IMAGES
from applied import MIXED
from applied import MODELS
from applied import RESIDUAL
from applied import TILED
from applied import assert_same_attributes
from applied import original
from applied import run
from applied import site_dropouts
from applied import small
from applied import snapshot
from applied import train_copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from autodropout import Policy
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout import remove_policy


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
        *((name, by_pickle) for name in MODELS),
        ("timm efficientnet_b0", copy.deepcopy),
        ("wide resnet", copy.deepcopy),
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


@pytest.mark.parametrize("name", ["wide resnet", "torchvision resnet18", "timm efficientnet_b0"])
def test_exported_model_has_no_trace_of_it(name: str) -> None:
    plain = copy.deepcopy(original(name)).eval()
    model = copy.deepcopy(plain)
    apply_policy(model, MODELS[name][1], example=IMAGES)
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
