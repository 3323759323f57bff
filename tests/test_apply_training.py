"""Models of `transformers`, timm and torchvision with a policy, trained as people train them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
import transformers
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from unmarked import MODELS
from unmarked import PATTERN
from unmarked import everywhere
from unmarked import made
from unmarked import output

from autodropout import Policy
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.masked import SiteDropout
from autodropout.policy import TOKEN_PLACES

POLICY = everywhere(PATTERN, TOKEN_PLACES)
NAMES = ("gpt2", "bert", "llama", "vit", "encoder", "swin")
BLOCKS = {"vit": "blocks", "encoder": "layers", "swin": "features.1"}
SHARDED = ("GPT2Block", "BertLayer", "LlamaDecoderLayer", "Block", "TransformerEncoderLayer", "SwinTransformerBlockV2")
RANKS = 2


def masked(name: str) -> nn.Module:
    model = made(name).train()
    if name == "llama":
        model.config.use_cache = False
    apply_policy(model, POLICY, MODELS[name][1])
    return model


def step(model: nn.Module, inputs: dict[str, Any], seed: int = 2) -> list[torch.Tensor]:
    """The output and the gradients of a step."""
    model.zero_grad()
    torch.manual_seed(seed)
    y = output(model, inputs)
    y.square().mean().backward()
    # None, eagerly, and zeros, compiled, are the same: BERT's pooler has no part in the first output.
    grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    return [y.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads)]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_draw_their_masks_again(name: str, reentrant: bool) -> None:
    model, inputs = masked(name), copy.deepcopy(MODELS[name][1])
    expected = step(model, inputs)
    if name in BLOCKS:
        checkpoint = torch.utils.checkpoint.checkpoint
        for block in model.get_submodule(BLOCKS[name]):  # type: ignore[attr-defined]
            # Reentrant checkpoints have gradients only where an input has.
            block.forward = lambda x, inner=block.forward, **_: checkpoint(
                inner, x if x.requires_grad else x.requires_grad_(), use_reentrant=reentrant
            )
    else:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its later name
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    assert all_equal(step(model, inputs), expected)
    assert not all_equal(step(model, inputs, seed=3), expected)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "vit", "swin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "llama", "encoder"))],
)
def test_compiled_whole_a_step_is_the_eager_one(name: str) -> None:
    """Where the untouched model compiles whole; AOTAutograd takes operations apart, so the last bits may differ."""
    model, inputs = masked(name), MODELS[name][1]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, expected in zip(step(compiled, inputs), step(model, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_it_drops_the_same(name: str) -> None:
    """Rotary embeddings give queries and keys in float32 beside values in bfloat16; PyTorch takes them together."""
    model, inputs = masked(name), MODELS[name][1]
    expected = step(model, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, inputs)[0]
    # Numbers around 1 after two layers in bfloat16; other masks would move them by their own size.
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_moving_averages_and_copies_train_alike(name: str) -> None:
    model, inputs = masked(name), MODELS[name][1]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    expected = step(model, inputs)
    assert all_equal(step(average.module, inputs), expected)
    assert all_equal(step(copy.deepcopy(model), inputs), expected)
    plain = made(name)
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(output(plain.eval(), inputs), output(average.module.eval(), inputs))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_checkpoint_of_transformers_has_no_trace_of_it(name: str, tmp_path: Path) -> None:
    model, inputs = masked(name), MODELS[name][1]
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(tmp_path / "masked")
    remove_policy(model)
    model.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "masked" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((tmp_path / "masked/config.json").read_text())["architectures"] == [type(model).__name__]
    loaded = type(model).from_pretrained(tmp_path / "masked").eval()
    assert not any(isinstance(module, SiteDropout) for module in loaded.modules())
    assert torch.equal(output(loaded, inputs), output(model.eval(), inputs))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen = {}
    for name in NAMES:
        inputs = {key: value[rank : rank + 1] for key, value in MODELS[name][1].items()}
        wrapped = nn.parallel.DistributedDataParallel(masked(name), find_unused_parameters=name == "bert")
        seen["ddp", name] = step(wrapped, inputs)
        sharded = masked(name)
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in [*sharded.modules()][::-1]:
            if type(module).__name__ in SHARDED:
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        seen["fsdp", name] = step(sharded, inputs)
        remove_policy(sharded)
        assert not any(isinstance(module, SiteDropout) for module in sharded.modules())
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_draw_their_own_masks_and_average(
    ranks: list[dict[Any, list[torch.Tensor]]], wrapper: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one process that plays both in turn: a mean of two is one rounding, each wrapper sums in its order."""
    model = masked(name)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    played = []
    for rank in range(RANKS):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        played.append(step(model, {key: value[rank : rank + 1] for key, value in MODELS[name][1].items()}))
    for rank, seen in enumerate(ranks):
        torch.testing.assert_close(seen[wrapper, name][0], played[rank][0])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    last = {key: value[1:] for key, value in MODELS[name][1].items()}
    assert not torch.allclose(step(model, last)[0], played[1][0])  # what a rank's own masks change
    gradients = [seen[wrapper, name][1:] for seen in ranks]
    assert all_equal(*gradients)
    for got, *each in zip(gradients[0], *(one[1:] for one in played), strict=True):
        torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
TILES = Policy.uniform(TiledPattern(0.25, stride=0.25))


def prepared(how: str) -> nn.Module:
    """A ResNet of torchvision made ready for quantisation-aware training, in PyTorch's three ways."""
    torch.manual_seed(0)
    model = torchvision.models.quantization.resnet18(num_classes=10).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "graph":
            mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
            return quantize_fx.prepare_qat_fx(model, mapping, (IMAGES,))
        if how == "fused":
            model.fuse_model(is_qat=True)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model)


@pytest.mark.parametrize("how", ["alone", "fused", "graph"])
def test_batch_norms_of_quantisation_aware_training_are_masked(how: str) -> None:
    """The observers, whose buffers have no size before the first run, see nothing of the search for sites."""
    model = prepared(how)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    applied = apply_policy(model, TILES, IMAGES)
    assert len(applied) == 17
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert list(model.state_dict()) == list(state)
    torch.manual_seed(1)
    first = model(IMAGES)
    torch.manual_seed(2)
    assert not torch.equal(model(IMAGES), first)
    first.sum().backward()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))
    remove_policy(model)
    assert not any(isinstance(module, SiteDropout) for module in model.modules())
