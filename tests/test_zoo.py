"""Models opened by name come without weights, and nothing is downloaded for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
