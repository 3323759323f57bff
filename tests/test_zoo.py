"""Models opened by name come without weights, and nothing is downloaded for them; those of a file as it makes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum

from autodropout.zoo import open_model


# Their builders have weights of the backbone as a default.
@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "lraspp_mobilenet_v3_large", "fasterrcnn_resnet50_fpn", "ssd300_vgg16"]
)
def test_a_backbone_has_no_weights_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_args: Any, **_kwargs: Any) -> Any:
        pytest.fail("nothing must be downloaded")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", download)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model, example = open_model(f"torchvision:{name}")
    assert {tensor.is_meta for tensor in model.parameters()} == {True}
    assert isinstance(example, torch.Tensor)
    assert example.shape == (1, 3, 224, 224)


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn, zeros
from width_of_the_model import WIDTH
@dataclass
class Config:
    width: int = WIDTH
def f():
    from width_of_the_model import WIDTH as again
    return nn.BatchNorm2d(Config().width), zeros(1, again, 4, 4)
"""


def test_a_file_may_define_dataclasses_and_import_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "width_of_the_model", raising=False)
    (tmp_path / "own.py").write_text(DATACLASS, encoding="utf-8")
    (tmp_path / "width_of_the_model.py").write_text("WIDTH = 3\n", encoding="utf-8")
    before = list(sys.path)
    model, example = open_model(f"{tmp_path / 'own.py'}:f")
    assert isinstance(model, nn.BatchNorm2d)
    assert isinstance(example, torch.Tensor)
    assert example.shape[1] == model.num_features == 3
    assert sys.path == before
