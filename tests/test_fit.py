"""`Policy.fit`: a policy moved to another model, and `autodropout sites`, which shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from test_apply_unmarked import MODELS
from test_apply_unmarked import made
from torch import nn

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import load_policy
from autodropout.cli import main
from autodropout.nn import PatternSite
from autodropout.zoo import open_model

EARLY, LATE = TokenPattern(2, 2, rate=0.3), TokenPattern(3, 1, rate=0.4)
OF_RESIDUAL = Policy((Site("any", 0.0, "residual", EARLY),))
OF_LAYERS = Policy((Site("first", 0.0, "query", EARLY), Site("last", 1.0, "query", LATE), Site("k", 0.0, "key", None)))


def test_encoder_and_decoder_take_the_whole_policy_each() -> None:
    fitted = OF_LAYERS.fit(made("t5"), MODELS["t5"][1], verbose=False)
    queries = [site for site in fitted.sites if site.place == "query"]
    # Two queries in the encoder; in the decoder three layers of two attentions. A tie would go to the earlier.
    assert [site.pattern for site in queries] == [EARLY, LATE, EARLY, EARLY, EARLY, LATE, LATE, LATE]
    assert [site.name.split(".")[0] for site in queries] == ["encoder"] * 2 + ["decoder"] * 6
    assert {site.pattern for site in fitted.sites if site.place == "key"} == {None}


def t5(layers: int) -> nn.Module:
    return transformers.T5Model(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2)
    )


def test_from_two_stacks_to_two_each_takes_from_its_own() -> None:
    """Depths 0, 1/3, 2/3, 1 take from 0 and 1."""
    example = MODELS["t5"][1]
    fitted = OF_RESIDUAL.fit(t5(2), example, verbose=False)
    assert [site.name.split(".")[0] for site in fitted.sites] == ["encoder"] * 2 + ["decoder"] * 2
    patterns = (None, None, EARLY, LATE)
    policy = Policy(tuple(replace(site, pattern=pattern) for site, pattern in zip(fitted.sites, patterns, strict=True)))
    expected = [None] * 4 + [EARLY, EARLY, LATE, LATE]
    assert [site.pattern for site in policy.fit(t5(4), example, verbose=False).sites] == expected
    assert [site.pattern for site in apply_policy(t5(4), policy, example)] == expected[4:]
    # One stack alone takes from all.
    gpt2, inputs = made("gpt2"), MODELS["gpt2"][1]
    turned = Policy(tuple(replace(site, depth=site.depth / 2 + (i < 2) / 2) for i, site in enumerate(policy.sites)))
    assert [site.pattern for site in turned.fit(gpt2, inputs, verbose=False).sites] == [EARLY, None]


def test_it_is_what_apply_policy_does() -> None:
    model, example = torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64)
    policy = load_policy("hand-v0")
    fitted = policy.fit(model, example, verbose=False)
    moved = [(site.name, site.pattern) for site in apply_policy(model, policy, example)]
    again = [(site.name, site.pattern) for site in apply_policy(torchvision.models.resnet18(), fitted, example)]
    assert moved == again == [(site.name, site.pattern) for site in fitted.sites]
    assert Policy.from_json(fitted.to_json()) == fitted
    assert fitted.provenance["fitted_to"] == "ResNet"
    assert fitted.provenance["from"] == policy.provenance


def test_it_says_what_goes_where_and_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x)
            return y

    flagged = TiledPattern(0.5, residual=True)
    policy = Policy((Site("n", 0.0, pattern=flagged), Site("b", 0.0, "branch", BernoulliPattern(0.1, shared="sample"))))
    fitted = policy.fit(Branches(), torch.zeros(1, 3, 8, 8))
    assert capsys.readouterr().out.splitlines() == [
        "batch_norm",
        "  TiledPattern(size=0.5)",
        "    depth         size   rate  site",
        "     0.00        3x8x8  19.1%  norm",
        "branch: the model has no such place, left out",
        "residual: the model has no residual block of a known kind, left out",
    ]
    assert fitted.sites == (Site("norm", 0.0, pattern=TiledPattern(0.5)),)


def test_it_says_which_sites_the_example_does_not_reach(capsys: pytest.CaptureFixture[str]) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head, self.off = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x)
            return y

    pattern = BernoulliPattern(0.1)
    policy = Policy(
        (Site("norm", 0.0, pattern=pattern), Site("head", 0.5, pattern=pattern), Site("off", 1.0, pattern=None))
    )
    fitted = policy.fit(WithHead(), torch.zeros(1, 3, 8, 8))
    assert capsys.readouterr().out.splitlines()[-1] == "batch_norm: the example does not reach head, left out"
    assert fitted.sites == policy.sites[:1]
    policy.fit(WithHead())
    assert "left out" not in capsys.readouterr().out


def test_without_any_place_it_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no sites of the places query, key: Linear"):
        OF_LAYERS.fit(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        OF_LAYERS.fit(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 0.95"):
        Policy.uniform(TiledPattern(2.0)).fit(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))


def test_models_are_opened_by_name_without_weights() -> None:
    for name, kind in {
        "torchvision:resnet50": torchvision.models.ResNet,
        "timm:vit_base_patch16_224": timm.models.VisionTransformer,
        "transformers:LlamaModel": transformers.LlamaModel,
        "transformers:T5Model": transformers.T5Model,
        "transformers:ViTModel": transformers.ViTModel,
    }.items():
        model, _ = open_model(name)
        assert isinstance(model, kind)
        assert next(model.parameters()).is_meta


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "model must be one of torchvision:NAME, timm:NAME, transformers:NAME or FILE.py:FUNCTION"),
        ("torchvision:resnet51", "model must be one of torchvision.models.list_models()"),
        ("timm:resnet51", "model must be one of timm.list_models()"),
        ("transformers:pipeline", "model must be the name of a model class of transformers"),
        ("missing.py:f", "model must be in a file that exists, got missing.py"),
        ("own.py:g", "model must be a function of own.py, got 'g'"),
        ("own.py:h", "own.py:h must return (model, example), got int"),
        ("torchvision:alexnet", "model must have sites of one of the places"),
    ],
)
def test_bad_models_are_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def h():\n    return 3\n", encoding="utf-8")
    assert main(["sites", name]) == 2
    assert message in capsys.readouterr().err


def test_the_command_lists_the_sites_and_writes_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "import torch, torchvision\ndef f():\n    return torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64)\n",
        encoding="utf-8",
    )
    assert main(["sites", "own.py:f"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["batch_norm", "  depth         size  site", "   0.00     64x32x32  bn1"]
    assert len(lines) == 2 + 17
    assert main(["sites", "own.py:f", "--policy", "hand-v0", "-o", "mine.json"]) == 0
    assert "TiledPattern(" in capsys.readouterr().out
    assert [site.name for site in load_policy("mine.json").sites][:2] == ["bn1", "layer1.0.bn1"]
    assert main(["sites", "own.py:f", "-o", "mine.json"]) == 2
    assert "--output needs --policy, got mine.json without one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "shape", "policy"),
    [
        (nn.BatchNorm2d(3), (1, 3, 8, 8), Policy.uniform(TiledPattern(0.5))),
        (PatternSite("query"), (1, 5, 8), Policy((Site("q", 0.0, "query", EARLY),))),
    ],
)
def test_a_model_that_is_a_site_itself_is_refused_before_anything_is_printed(
    layer: nn.Module, shape: tuple[int, ...], policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy has no name for it."""
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=f"^model must contain its sites, not be one itself, got {kind}$"):
        policy.fit(layer, torch.zeros(shape))
    assert capsys.readouterr().out == ""
    fitted = policy.fit(nn.Sequential(layer), torch.zeros(shape), verbose=False)
    assert [site.name for site in fitted.sites] == ["0"]
