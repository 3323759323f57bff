"""The script of table 1: its table, two processes that are killed one by one and together, and refusals of one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from image_folders import CLASSES
from image_folders import write_folder
from scripts import finish
from scripts import records
from scripts import result
from scripts import wait_for

from autodropout import load_policy
from autodropout.reproduce import imagenet_data
from autodropout.reproduce import imagenet_training
from autodropout.reproduce import table1_imagenet as script
from autodropout.reproduce.data import DataError
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.imagenet_report import report
from autodropout.reproduce.imagenet_task import ImageNetTask
from autodropout.reproduce.imagenet_task import network_policy
from autodropout.reproduce.models.imagenet import sites_of

TINY = ["--epochs", "2", "--seeds", "1", "--methods"]
TINY_MODELS = 3 + 1


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(script.DATA_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def torchrun(folder: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The script on two processes."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), script.__file__, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Else a restarted group reads the addresses of the one before (pytorch/pytorch#135712).
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that a torchrun has started and that still run."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            lines = Path(f"/proc/{child}/environ").read_text().split("\0")
        except (ProcessLookupError, FileNotFoundError):  # it has just ended
            continue
        found |= {int(line.removeprefix("RANK=")): int(child) for line in lines if line.startswith("RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", [["stochasticdepth"], ["uda+dropout", "--labels", "0.1"]])
def test_one_rank_killed_and_all_ranks_killed_end_in_the_same_weights(which: list[str], tmp_path: Path) -> None:
    through, killed, arguments = tmp_path / "through", tmp_path / "killed", [*TINY, *which]
    table = finish(torchrun(through, *arguments))
    assert "2 processes" in " ".join(table.split())
    assert table.count("Table 1") == 1, "one process prints"

    process = torchrun(killed, *arguments, restarts=1)
    wait_for(killed, process, 1)
    first = ranks_of(process)
    os.kill(first[1], signal.SIGKILL)
    # torchrun ends the other process and starts both again: they go on with the model that was in training.
    deadline = time.monotonic() + 120
    while set(ranks_of(process).values()) & set(first.values()) or len(ranks_of(process)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(records(killed)) < TINY_MODELS
    wait_for(killed, process, 2)
    for pid in (process.pid, *ranks_of(process).values()):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(records(killed)) < TINY_MODELS
    assert finish(torchrun(killed, *arguments)) == table

    ended, expected = records(killed), records(through)
    assert [result(record) for record in ended] == [result(record) for record in expected]
    assert len({record["weights"] for record in ended}) == len(ended) == TINY_MODELS
    assert {record["arguments"]["ranks"] for record in ended} == {2}  # type: ignore[index]


@pytest.mark.slow
def test_to_the_table_and_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = dataclasses.replace(script.PRESETS["demo"], train_images=20, valid_images=30)
    monkeypatch.setitem(script.PRESETS, "demo", demo)
    arguments = ["--epochs", "1", "--seeds", "2", "--methods", "none,stochasticdepth,autodropout"]
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    assert max(map(len, first.splitlines())) <= 80
    text = " ".join(first.split())
    assert "test accuracy in %, torchvision's ResNet with three narrow bottlenecks, 1 epochs" in text
    assert "20 training, 30 validation, 797 test images" in text
    made = records(tmp_path)
    assert [record["phase"] for record in made] == ["tune"] * 6 + ["final"] * 6
    assert [record["method"] for record in made[-3:]] == ["none", "stochasticdepth", "autodropout"]
    assert all(len(str(record["weights"])) == 64 and float(str(record["loss"])) > 0 for record in made)
    (row,) = [line for line in first.splitlines() if line.startswith("none ")]
    values = [100 * float(str(record["accuracy"])) for record in made[6:] if record["method"] == "none"]
    assert float(row.split()[3]) == pytest.approx(sum(values) / 2, abs=0.0051)
    (picture,) = (tmp_path / "results").glob("*.png")
    assert picture.stat().st_size > 10_000
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert records(tmp_path) == made


@pytest.mark.slow
def test_a_dry_run_of_the_paper_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script.main(["--preset", "paper", "--micro-batch", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for described, recipe, title, parameters in zip(
        text.split("\n\n"),
        script.RECIPES,
        ("ResNet-50", "EfficientNet-B0", "EfficientNet-B7"),
        ("25,557,032", "5,288,548", "66,347,960"),
        strict=True,
    ):
        lines = described.splitlines()
        assert lines[0] == f"{title}, 1 process"
        assert f"Parameters: {parameters}" in lines
        for name, count in {"tune": 80_000, "final": 1_281_167}.items():
            steps = count // 1024 * recipe.epochs
            assert any(f"{name}: {count:,} images" in line and f"{steps:,} steps" in line for line in lines)
        assert any(f"weight decay {recipe.weight_decay:g}; label smoothing 0.1" in line for line in lines)
    assert "(2 images of 600x600, 512 times a step; " in text
    assert script.main(["--preset", "proxy", "--model", "efficientnet_b0", "--micro-batch", "2", "--dry-run"]) == 0
    (title, *_) = capsys.readouterr().out.splitlines()
    assert title == "EfficientNet-B0, 1 process"
    assert list(tmp_path.iterdir()) == []


def test_stochastic_depth_is_at_the_ends_of_blocks_and_grows() -> None:
    policy = network_policy("resnet50", "stochasticdepth", 0.3, 7, load_policy("hand-v0"))
    rates = [site.pattern.rate for site in policy.sites if site.pattern is not None]  # type: ignore[union-attr]
    ends = [site.name for site in policy.sites if site.pattern is not None]
    assert len(policy.sites) == len(sites_of("resnet50")) == 1 + 3 * 16
    blocks = [f"layer{stage}.{block}.bn3" for stage, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(n)]
    assert ends == blocks[1:]  # the first block has rate 0
    assert rates == pytest.approx([0.3 * block / 15 for block in range(1, 16)])
    with pytest.raises(ValueError, match="autodropout for efficientnet_b0, which has dropout 0.2, stoch"):
        network_policy("efficientnet_b0", "stochasticdepth", 0.3, 7, load_policy("hand-v0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "paper"], "preset paper needs ImageNet: give --data DIR"),
        (["--preset", "proxy", "--data", "missing"], "the data folder missing does not exist"),
        (["--preset", "paper", "--data", "digits"], "scikit-learn digits (8x8) has 1000 images"),
        (["--model", "resnet50"], "--model resnet50 needs --preset proxy or paper; demo has a network of its own"),
        (
            ["--preset", "paper", "--model", "efficientnet_b0", "--methods", "none,stochasticdepth"],
            "--methods takes none, dropout, spatialdropout, dropblock, autodropout for efficientnet_b0, got ",
        ),
        (
            ["--preset", "paper", "--model", "efficientnet_b7", "--methods", "stochasticdepth", "--dry-run"],
            "--methods takes none, dropout, spatialdropout, dropblock, autodropout for efficientnet_b7, got ",
        ),
        (["--micro-batch", "3"], "batch_size must be a multiple of micro_batch * ranks = 3 * 1, got 20"),
        (["--policy", "hand-lm-v0"], "autodropout at strength 0.5: model has no sites of place"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"table1_imagenet: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--methods", "mixup"], ["--seeds", "0"], ["--model", "vgg16"]])
def test_bad_options_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_image_met_in_training_is_one_line_and_the_same_command_goes_on(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`processes`: that load, as on a GPU's machine; what they raise arrives with their traceback in it."""
    write_folder(tmp_path / "data")
    demo = script.PRESETS["demo"]
    recipe = dataclasses.replace(demo.recipes[0], batch_size=4, micro_batch=4)
    small = dataclasses.replace(demo, recipes=(recipe,), train_images=8, valid_images=4)
    monkeypatch.setitem(script.PRESETS, "demo", small)
    monkeypatch.setattr(imagenet_data, "FINGERPRINTED", 1)
    monkeypatch.setattr(imagenet_training, "loading_processes", lambda device: processes)
    image = tmp_path / "data" / "val" / CLASSES[1] / "001.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    arguments = ["--data", "data", "--epochs", "1", "--seeds", "1", "--methods", "none"]
    assert script.main(arguments) == 2
    (run,) = Path("runs").iterdir()
    said = capsys.readouterr().err
    damaged = image.relative_to(tmp_path)
    assert f"\ntable1_imagenet: error: cannot decode {damaged}: OSError: " in said.replace("\r", "\n")
    assert said.endswith(f"; the same command goes on from {run}\n")
    assert "Traceback" not in said
    assert len(list(run.glob("*.pt"))) == 1
    image.write_bytes(whole)
    assert script.main(arguments) == 0
    assert "100%" in capsys.readouterr().err


def test_a_damaged_image_that_another_rank_meets_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(task: ImageNetTask, device: torch.device) -> None:
        raise DataError("cannot decode a.png: OSError: no\nimage")

    monkeypatch.setattr(script.group, "rank", lambda: 1)
    monkeypatch.setattr(ImageNetTask, "follow", follow)
    assert script.main([]) == 2
    assert capsys.readouterr().err == (
        "table1_imagenet: error: cannot decode a.png: OSError: no image; the same command goes on\n"
    )


def task_of(model: str, augment: str) -> ImageNetTask:
    """With the paper's recipe, on digits that are called ImageNet."""
    arguments = script._parser().parse_args([])
    task = script._task(arguments, script.PRESETS["demo"])
    recipe = next(recipe for recipe in script.RECIPES if recipe.model == model)
    settings = dataclasses.replace(
        task.settings, recipe=dataclasses.replace(recipe, augment=augment), preset="paper", final_on_all=True
    )
    return ImageNetTask(settings, dataclasses.replace(task.data, title="ImageNet (parquet)", classes=1000))


def test_the_papers_numbers_stand_beside_their_own_rows() -> None:
    def papers(task: ImageNetTask) -> list[str | None]:
        results = [Result("none", None, (0.7,)), Result("dropout", 0.1, (0.7,)), Result("autodropout", 1.0, (0.7,))]
        return [row.paper for row in report(task, results)[1]]

    crop = "resized_crop_flip"
    assert papers(task_of("resnet50", crop)) == ["76.5", None, "78.7"]
    assert papers(task_of("resnet50", f"{crop}+randaugment")) == [None, None, "80.3"]
    assert papers(task_of("efficientnet_b0", crop)) == [None, None, "77.5"]
    b7 = task_of("efficientnet_b7", crop)
    assert papers(b7) == ["84.1", None, "84.7"]
    assert any("dropout 0.5, stochastic depth" in note for note in report(b7, [Result("none", None, (0.7,))])[2])
    # Not beside models of the proxy's images, nor of other data.
    proxy = ImageNetTask(dataclasses.replace(b7.settings, final_on_all=False), b7.data)
    assert papers(proxy) == [None] * 3
    assert papers(ImageNetTask(b7.settings, dataclasses.replace(b7.data, classes=10))) == [None] * 3
