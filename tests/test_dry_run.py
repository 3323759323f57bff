"""What a dry run says: operations and memory against hand-made counts, and the parameters of the published networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodropout.reproduce import table1_imagenet
from autodropout.reproduce import table2_cifar
from autodropout.reproduce import table3_language_model
from autodropout.reproduce import table4_translation
from autodropout.reproduce.dry_run import Cost
from autodropout.reproduce.dry_run import cost_lines
from autodropout.reproduce.dry_run import cost_of
from autodropout.reproduce.models.imagenet import NETWORKS
from autodropout.reproduce.models.imagenet import build_network
from autodropout.reproduce.models.transformer_xl import PENN_TREEBANK
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.reproduce.uda_cost import UdaCost
from autodropout.reproduce.uda_cost import uda_cost
from autodropout.reproduce.uda_cost import uda_models_lines


def cost(model: nn.Module, *shape: int) -> Cost:
    """With an input that needs no gradient, as images do."""
    model.to("meta")
    return cost_of(lambda: (model, lambda: model(torch.empty(*shape)).sum()))


def test_a_linear_layer() -> None:
    found = cost(nn.Linear(3, 5), 7, 3)
    assert found.parameters == 3 * 5 + 5
    # Forward and the gradient of the weights; the input needs none. It is all that is kept.
    assert found.flops == 2 * (2 * 7 * 3 * 5)
    assert (found.saved_numbers, found.saved_bytes) == (7 * 3, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_cost_the_same_forward_and_for_each_gradient(groups: int) -> None:
    first = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
    second = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    forward = 2 * 2 * (36 * 4 * 4 // groups * 9), 2 * 2 * (9 * 8 * 4 // groups * 9)  # 2 images of 6x6
    # The first has no gradient of its input.
    assert cost(nn.Sequential(first, second), 2, 4, 6, 6).flops == 2 * forward[0] + 3 * forward[1]


def test_a_transposed_convolution() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False))
    forward = 2 * 2 * (25 * 3 * 4), 2 * 2 * (25 * 4 * 6 // 2 * 4)
    assert cost(layers, 2, 3, 5, 5).flops == 2 * forward[0] + 3 * forward[1]


def test_what_autograd_keeps_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sigmoid(x * self.weight)  # keeps x, and its result
            return F.max_pool1d((h * h)[None], 5)[0]  # keeps the result again, its square, and an int64 index

    found = cost(Twice(), 4, 5)
    assert found.saved_numbers == 3 * 4 * 5
    assert found.saved_bytes == 8 * 4
    assert found.activation_bytes(2) == 2 * 3 * 4 * 5 + 8 * 4


def test_lines() -> None:
    found = Cost(parameters=2**28, flops=10**12, saved_numbers=2**30, saved_bytes=0)
    parameters, operations, memory = cost_lines(found, "8 images", passes=4, copies=2, width=2)
    assert parameters == "Parameters: 268,435,456"
    assert operations.startswith("Operations: 4e+12 floating-point operations a step")
    assert "(8 images, 4 times a step;" in operations
    assert "6.00 GiB = weights and gradients 2.00 + optimizer and averages 2.00 + what" in memory
    assert "2 bytes a number, 2.00 (" in memory


@pytest.mark.parametrize(
    ("name", "parameters", "multiplications"),
    # Of one image, forward, as their papers and torchvision's documentation give them.
    [("resnet50", 25.6e6, 4.09e9), ("efficientnet_b0", 5.3e6, 0.39e9), ("efficientnet_b7", 66.3e6, 37.75e9)],
)
def test_networks_for_imagenet_have_the_published_size(name: str, parameters: float, multiplications: float) -> None:
    size = NETWORKS[name].image_size

    def step() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = build_network(name, classes=1000)
        return model, lambda: model(torch.empty(2, 3, size, size)).sum()

    found = cost_of(step)
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    # Forward and two gradients, but none of the images; two operations a multiplication.
    assert found.flops / 2 / 6 == pytest.approx(multiplications, rel=0.03)


@pytest.mark.parametrize(("depth", "width", "parameters"), [(28, 10, 36.5e6), (28, 2, 1.47e6)])
def test_wide_residual_networks_have_the_published_size(depth: int, width: int, parameters: float) -> None:
    with torch.device("meta"):
        model = WideResNet(depth, width)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_the_language_model_of_penn_treebank_has_24_million_parameters() -> None:
    with torch.device("meta"):
        model = TransformerXL(10_000, PENN_TREEBANK)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(24e6, rel=0.03)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("demo", "77,562"), ("small", "1,467,610"), ("paper", "36,479,194")]
)
def test_table_2_says_what_it_would_train(
    preset: str, parameters: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert table2_cifar.main(["--preset", preset, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"Parameters: {parameters}\n" in text
    if preset == "paper":
        # WRN-28-10 is known for 5.2e9 multiplications an image, forward.
        assert "15 models to tune: 45,000 images, 200 epochs, 70,200 steps, 2.83e+17 floating-point" in text
        multiplications = 2.83e17 / 70_200 / 128 / 6
        assert multiplications == pytest.approx(5.2e9, rel=0.03)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Loss:
    weight: float = 1.0
    temperature: float = 0.4
    confidence: float = 0.8


def test_a_step_of_uda_is_the_students_pass_with_gradient_and_the_teachers_without() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))

    found = uda_cost(build, Loss(), labelled=2, unlabelled=6, channels=3, size=4, passes=7)
    image = 2 * 3 * 4 * 4 * 5  # forward, and the same again for the gradient of the weights; images need none
    assert found.student == 2 * 8 * image
    assert found.both.flops == 2 * 8 * image + 6 * image
    assert found.both.parameters == 3 * 4 * 4 * 5 + 5
    assert found.flops("uda") == found.flops("uda+autodropout") == 7 * found.both.flops
    assert found.flops("supervised") == found.flops("augmented") == 7 * 2 * 2 * image
    _, operations, passes, _ = found.lines(4, copies=1, width=2)
    assert "(2 labelled and 6 unlabelled images of 4x4, 7 times a step;" in operations
    assert f"gradient: {7 * 16 * image:.3g}; the teacher's, without: {7 * 6 * image:.3g}. " in passes
    # The loss keeps of the scores and of the images what the student needs; the teacher's pass keeps nothing.
    more = uda_cost(build, Loss(), labelled=2, unlabelled=7, channels=3, size=4)
    assert 3 * 4 * 4 <= more.both.saved_numbers - found.both.saved_numbers <= 3 * 4 * 4 + 6 * 5


def test_supervised_models_and_those_of_uda_are_counted_apart() -> None:
    cost = UdaCost(Cost(1, 80, 0, 0), student=60, passes=2, labelled=1, unlabelled=5)
    models = {"supervised": 3, "augmented": 1, "uda": 3, "uda+dropout": 2}
    supervised, uda = uda_models_lines("final", models, 10, 60, 4, 100, cost, devices=8)
    assert supervised.startswith("4 models final, supervised: 60 images, 10 of them with labels, 4 epochs, 100 steps, ")
    assert f"{10 * 2 * 8 * 100:.3g} floating-point operations each, {4 * 10 * 2 * 8 * 100:.3g} together" in supervised
    assert uda.startswith("5 models final, UDA: ")
    assert f"{80 * 2 * 8 * 100:.3g} floating-point operations each" in uda
    assert uda_models_lines("final", {"uda": 1}, 10, 60, 4, 100, cost, devices=8)[0].startswith("1 models final, UDA")


def test_table_2_says_what_few_labels_would_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert table2_cifar.main(["--preset", "paper", "--labels", "4000", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "WRN-28-2, augmentation flip_crop, strong flip_crop+randaugment+cutout\n" in text
    assert "Parameters: 1,467,610\n" in text
    assert "6 models to tune, supervised: 45,000 images, 4,000 of them with labels, 697 epochs, 178,432 steps" in text
    # The validation images come back without labels: 46,000 unlabelled ones in batches of 160.
    assert "15 models final, UDA: 50,000 images, 4,000 of them with labels, 697 epochs, 200,039 steps" in text
    # Forward three times for the student's 192 images, once for the teacher's 160; 0.21e9 multiplications an image.
    (each,) = re.findall(r"final, UDA: .* steps, ([\d.e+]+) floating-point operations each", text)
    assert float(each) / 200_039 / (6 * 192 + 2 * 160) == pytest.approx(0.21e9, rel=0.03)
    assert table2_cifar.main(["--labels", "800", "--dry-run"]) == 2
    assert "--labels must be below the 800 training images, got 800" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (table1_imagenet, []),
        (table1_imagenet, ["--labels", "0.1"]),
        (table2_cifar, []),
        (table2_cifar, ["--labels", "100"]),
        (table3_language_model, []),
        (table4_translation, []),
    ],
)
def test_all_tables_say_it_alike(
    script: ModuleType,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert script.main([*arguments, "--dry-run"]) == 0
    torch.set_num_threads(threads)
    expected = [
        "Methods: ",
        r"Parameters: [\d,]+$",
        r"Operations: [\d.e+]+ floating-point operations a step on each device, forward and backward \(.*",
        *(["Of these the student's pass, with gradient: .*"] if arguments else []),
        r"Memory of a device, estimated: [\d.]+ GiB = ",
        "SGD|Adam",
        *[r"\d+ models to tune.*: .* steps, [\d.e+]+ floating-point operations each, [\d.e+]+ together$"]
        * (2 if arguments else 1),
        *[r"\d+ models final.*: .* steps, [\d.e+]+ floating-point operations each, [\d.e+]+ together$"]
        * (2 if arguments else 1),
    ]
    lines = capsys.readouterr().out.splitlines()[-len(expected) :]
    assert all(re.match(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    assert list(tmp_path.iterdir()) == []


def test_where_numbers_decide_the_step_is_done() -> None:
    """An adaptive softmax computes the tail for the words of the tail alone."""

    def step(tail: int) -> Cost:
        def build() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
            model = nn.AdaptiveLogSoftmaxWithLoss(8, 30, [10], div_value=2.0)
            words = torch.tensor([5] * (12 - tail) + [20] * tail)
            return model, lambda: model(torch.ones(12, 8), words).loss

        return cost_of(build, "cpu")

    head, tail = 2 * 12 * 8 * 11, 2 * (8 * 4 + 4 * 20)
    # Forward and the gradient of the weights; between the two layers of the tail a gradient flows, too.
    assert step(0).flops == 2 * head
    assert step(3).flops == 2 * head + 3 * (2 * tail + 2 * 4 * 20)
