"""Tuning, final models, run state: nothing is trained twice, lost or told twice; changed inputs train anew."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autodropout import Policy
from autodropout import TiledPattern
from autodropout import load_policy
from autodropout.reproduce import experiment
from autodropout.reproduce import image_task
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import Split
from autodropout.reproduce.data import open_data
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Job
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import RunError
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.experiment import source_fingerprint
from autodropout.reproduce.image_task import ImageTask
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.training import Outcome
from autodropout.reproduce.training import Recipe

CPU = torch.device("cpu")
SETTINGS = Settings(
    name="tiny",
    preset="demo",
    recipe=Recipe(10, 1, epochs=2, batch_size=10, learning_rate=0.1, weight_decay=5e-4, augment="none"),
    methods=("none", "dropout", "spatialdropout"),
    seeds=2,
    tuning_seeds=2,
    final_on_all=False,
    policy_name="hand-v0",
    policy=load_policy("hand-v0"),
)
MODELS = 2 * 3 * 2 + 3 * 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Such small networks only lose by more, and what a script sets must not reach other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("digits", 20, 30)


class Trainer:
    """Stands in for `train_model`: remembers what it was asked for, answers by a rule."""

    def __init__(self, rule: Callable[[Policy, int, int], float]) -> None:
        self.rule = rule
        self.calls: list[tuple[Policy, int, int, int]] = []

    def __call__(
        self,
        recipe: Recipe,
        policy: Policy,
        train: Split,
        evaluation: Split,
        classes: int,
        seed: int,
        device: torch.device,
        checkpoint: Path,
        on_epoch: Callable[[], None],
    ) -> Outcome:
        self.calls.append((policy, seed, len(train), len(evaluation)))
        checkpoint.write_bytes(b"state")
        for _ in range(recipe.epochs):
            on_epoch()
        return Outcome(self.rule(policy, seed, len(evaluation)), 1.5)


def rate(policy: Policy) -> float:
    pattern = policy.sites[0].pattern
    return 0.0 if pattern is None else pattern.rate  # type: ignore[attr-defined]


def by_rate(policy: Policy, seed: int, measured_on: int) -> float:
    """Best at 0.1 on validation, but at 0.2 on test; a little from the seed."""
    best = 0.1 if measured_on == 30 else 0.2
    return 0.9 - abs(rate(policy) - best) + seed % 1000 / 1000


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer(by_rate)
    monkeypatch.setattr(image_task, "train_model", stand_in)
    return stand_in


def run(settings: Settings, data: ImageData, folder: Path) -> list[Result]:
    with Experiment(ImageTask(settings, data), CPU, folder) as opened:
        return opened.run(lambda _: None, lambda: None)


def lines(folder: Path) -> list[dict[str, object]]:
    (path,) = (folder / "results").glob("*.jsonl")
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_strength_is_chosen_on_validation_images_only(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    results = run(SETTINGS, data, tmp_path)
    assert [(r.method, r.strength) for r in results] == [("none", None), ("dropout", 0.1), ("spatialdropout", 0.1)]
    assert results[0].values == pytest.approx((0.7, 0.701))
    assert results[1].values == pytest.approx((0.8, 0.801))
    tuning, finals = trainer.calls[:12], trainer.calls[12:]
    assert {(len_train, len_eval) for _, _, len_train, len_eval in tuning} == {(20, 30)}
    assert {(len_train, len_eval) for _, _, len_train, len_eval in finals} == {(20, 797)}
    assert {seed for _, seed, _, _ in tuning} == {1000, 1001}
    assert [seed for _, seed, _, _ in finals] == [0, 0, 0, 1, 1, 1], "seed by seed, so an interrupted run is paired"


def test_every_method_gets_the_same_number_of_trials(data: ImageData, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, methods=tuple(STRENGTHS))
    with Experiment(ImageTask(settings, data), CPU, tmp_path) as opened:
        jobs = opened.tuning_jobs()
        assert opened.model_count() == len(jobs) + 6 * 2
    counts = {method: sum(job.method == method for job in jobs) for method in STRENGTHS}
    assert counts == dict.fromkeys(STRENGTHS, 6) | {"none": 0}
    assert len(set(jobs)) == len(jobs)


def test_weaker_of_equal_strengths(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_task, "train_model", Trainer(lambda *_: 0.5))
    assert [result.strength for result in run(SETTINGS, data, tmp_path)] == [None, 0.05, 0.05]


def test_sums_of_equal_results_are_equal_and_a_training_that_diverged_is_the_worst(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Experiment(ImageTask(SETTINGS, data), CPU, tmp_path) as opened:

        def best(*values: tuple[float, ...]) -> float | None:
            strengths = STRENGTHS["dropout"]
            tried = zip(strengths, values, strict=True)
            return opened._best(
                "dropout", {Job("tune", "dropout", s, i): v for s, vs in tried for i, v in enumerate(vs)}
            )

        assert STRENGTHS["dropout"] == (0.05, 0.1, 0.2)
        assert 0.1 + 0.7 < 0.4 + 0.4
        assert best((0.1, 0.7), (0.4, 0.4), (0.0, 0.0)) == 0.05
        assert best((math.nan, 0.9), (0.1, 0.1), (0.2, 0.2)) == 0.2
        monkeypatch.setattr(ImageTask, "larger_is_better", False)
        assert best((math.nan, 0.9), (200.0, math.inf), (300.0, 300.0)) == 0.2


def test_final_models_may_take_the_validation_images_back(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    run(dataclasses.replace(SETTINGS, final_on_all=True), data, tmp_path)
    assert {call[2:] for call in trainer.calls[:12]} == {(20, 30)}
    assert {call[2:] for call in trainer.calls[12:]} == {(50, 797)}


def test_one_line_per_trained_model(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    run(SETTINGS, data, tmp_path)
    records = lines(tmp_path)
    assert len(records) == MODELS == len(trainer.calls)
    assert len({record["key"] for record in records}) == MODELS
    assert [record["number"] for record in records] == list(range(MODELS))
    first, last = records[0], records[-1]
    found = {name: first[name] for name in ("phase", "split", "method", "strength", "seed", "metric", "seconds")}
    assert found == {
        "phase": "tune",
        "split": "validation",
        "method": "dropout",
        "strength": 0.05,
        "seed": 1000,
        "metric": "accuracy",
        "seconds": 1.5,
    }
    assert (last["phase"], last["split"], last["method"], last["strength"]) == ("final", "test", "spatialdropout", 0.1)
    assert last["accuracy"] == pytest.approx(0.801)
    assert last["data"] == {"title": data.title, "fingerprint": data.fingerprint}
    assert last["arguments"] == {
        **dataclasses.asdict(SETTINGS.recipe),
        "train_images": 20,
        "evaluation_images": 797,
        "final_on_all": False,
    }
    assert last["versions"]["torch"] == torch.__version__.split("+")[0]  # type: ignore[index]
    assert last["source"] == source_fingerprint()
    assert {"commit", "finished", "device", "threads"} <= last.keys()


def test_same_command_again_trains_nothing(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    first = run(SETTINGS, data, tmp_path)
    before = lines(tmp_path)
    trained = len(trainer.calls)
    told: list[Job] = []
    epochs: list[None] = []
    with Experiment(ImageTask(SETTINGS, data), CPU, tmp_path) as again:
        assert again.run(told.append, lambda: epochs.append(None)) == first
    assert len(trainer.calls) == trained
    assert lines(tmp_path) == before
    assert (len(told), len(epochs)) == (MODELS, MODELS * 2), "progress counts what is already done"


def test_more_seeds_and_methods_train_only_what_is_new(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    run(dataclasses.replace(SETTINGS, methods=("none",), seeds=1), data, tmp_path)
    run(SETTINGS, data, tmp_path)
    assert len(trainer.calls) == MODELS
    assert len(lines(tmp_path)) == MODELS


@pytest.mark.parametrize("moment", ["before the line", "inside the line", "after the line", "before the next"])
@pytest.mark.parametrize("model", [0, 4, MODELS - 1])
def test_no_line_is_lost_or_doubled_by_a_kill(
    data: ImageData, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, model: int
) -> None:
    class Killed(BaseException):
        pass

    real = experiment._line
    calls = iter(range(1000))

    def killing_line(record: dict[str, object]) -> bytes:
        if next(calls) != model:
            return real(record)
        if moment != "before the line":
            content = real(record)
            with open(opened.results, "ab") as file:
                file.write(content[:20] if moment == "inside the line" else content)
        raise Killed

    opened = Experiment(ImageTask(SETTINGS, data), CPU, tmp_path)
    with monkeypatch.context() as patch:
        if moment == "before the next":
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
        else:
            patch.setattr(experiment, "_line", killing_line)
        with pytest.raises(Killed):
            opened.run(lambda _: None, lambda: None)
    opened.lock.release()  # the system does it for a dead process

    uninterrupted = run(SETTINGS, data, tmp_path / "other")
    trained = len(trainer.calls)
    assert run(SETTINGS, data, tmp_path) == uninterrupted
    done = 1 if moment == "before the next" else model + 1
    assert len(trainer.calls) - trained == MODELS - done, "what was recorded is not trained again"
    records = lines(tmp_path)
    strip = {"finished"}
    expected = [{k: v for k, v in record.items() if k not in strip} for record in lines(tmp_path / "other")]
    assert [{k: v for k, v in record.items() if k not in strip} for record in records] == expected
    assert not list(opened.runs.glob("*.pt")), "checkpoints of finished models are removed"


def test_a_training_that_diverged_is_a_line_of_strict_json(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_json(constant: str) -> None:
        raise AssertionError(constant)

    settings = dataclasses.replace(SETTINGS, methods=("none",))
    stand_in = Trainer(lambda policy, seed, measured_on: (math.inf, 0.25)[seed])
    monkeypatch.setattr(image_task, "train_model", stand_in)
    (first,) = run(settings, data, tmp_path)
    assert first.values == (math.inf, 0.25)
    (path,) = (tmp_path / "results").glob("*.jsonl")
    before = path.read_text(encoding="utf-8")
    records = [json.loads(line, parse_constant=no_json) for line in before.splitlines()]
    assert [record["accuracy"] for record in records] == ["inf", 0.25]
    assert run(settings, data, tmp_path) == [first], "what is kept under runs/ is the same number"
    assert path.read_text(encoding="utf-8") == before
    assert len(stand_in.calls) == 2


def test_lines_of_finite_numbers_are_plain_json() -> None:
    record = {"a": 1, "b": 0.1, "c": [1, 2.5, None], "d": {"e": True, "f": "inf"}, "é": (1, "x")}
    assert experiment._line(record) == json.dumps(record).encode() + b"\n"
    nested = {"loss": math.nan, "of": {"it": [-math.inf, (math.inf, 1)]}}
    assert experiment._line(nested) == b'{"loss": "nan", "of": {"it": ["-inf", ["inf", 1]]}}\n'


def test_results_are_never_read(data: ImageData, trainer: Trainer, tmp_path: Path) -> None:
    first = run(SETTINGS, data, tmp_path)
    before = lines(tmp_path)
    (path,) = (tmp_path / "results").glob("*.jsonl")
    path.write_text("nonsense", encoding="utf-8")
    assert run(SETTINGS, data, tmp_path) == first
    assert lines(tmp_path) == before
    trained = len(trainer.calls)
    for file in (tmp_path / "runs").rglob("*.json"):
        file.unlink()
    assert run(SETTINGS, data, tmp_path) == first
    assert len(trainer.calls) == trained + MODELS


def test_whatever_determines_the_result_trains_anew(
    data: ImageData, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, methods=("none",), seeds=1)
    policy = Policy.uniform(TiledPattern(0.3))
    recipes = [{"epochs": 3}, {"learning_rate": 0.2}, {"width": 2}, {"augment": "randaugment"}]
    changed = [dataclasses.replace(settings.recipe, **change) for change in recipes]  # type: ignore[arg-type]
    variants = [dataclasses.replace(settings, recipe=recipe) for recipe in changed]
    variants += [dataclasses.replace(settings, final_on_all=True), dataclasses.replace(settings, policy=policy)]
    for variant in (settings, *variants):
        run(variant, data, tmp_path)
    run(settings, open_data("digits", 21, 30), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "source_fingerprint", lambda: "changed code")
        run(settings, data, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "versions", lambda: {"torch": "another"})
        run(settings, data, tmp_path)
    assert len(trainer.calls) == 1 + len(variants) + 3
    run(settings, data, tmp_path)
    assert len(trainer.calls) == 1 + len(variants) + 3


def test_source_fingerprint_sees_every_change_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/a.py", "policy.json", "report.py"):
        (package / name).write_text(f"# {name}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen = [source_fingerprint(["some_package"])]
    for name in ("inner/a.py", "policy.json", "new.py"):
        (package / name).write_text("{}\n", encoding="utf-8")
        seen.append(source_fingerprint(["some_package"]))
    (package / "new.py").rename(package / "renamed.py")
    seen.append(source_fingerprint(["some_package"]))
    assert len(set(seen)) == 5
    (package / "report.py").write_text("# only shows\n", encoding="utf-8")
    (package / "notes.txt").write_text("no code\n", encoding="utf-8")
    assert source_fingerprint(["some_package"]) == seen[-1]


def test_fingerprint_covers_kernels_and_recipes() -> None:
    parts = {package: source_fingerprint([package]) for package in experiment.PACKAGES}
    assert len(set(parts.values())) == 3
    assert set(experiment.PACKAGES) == {"autodropout", "autodropout.kernels", "autodropout.reproduce"}


def test_second_process_is_refused(data: ImageData, tmp_path: Path) -> None:
    with (
        Experiment(ImageTask(SETTINGS, data), CPU, tmp_path),
        pytest.raises(RunError, match="another process is running"),
    ):
        Experiment(ImageTask(SETTINGS, data), CPU, tmp_path)
    with Experiment(ImageTask(SETTINGS, data), CPU, tmp_path):
        pass


def test_policies_are_checked_before_any_training(data: ImageData, trainer: Trainer) -> None:
    ImageTask(dataclasses.replace(SETTINGS, methods=tuple(STRENGTHS)), data).check_policies()
    # Size 1.9 covers the whole map wherever the tile is placed, at the strengths 1 and 1.5 only.
    everything = dataclasses.replace(SETTINGS, policy=Policy.uniform(TiledPattern(1.9)), methods=("autodropout",))
    with pytest.raises(RunError, match=r"autodropout at strength 1\.0: .*expected rate of at most 0\.95"):
        ImageTask(everything, data).check_policies()
    assert trainer.calls == []


def test_real_training_end_to_end(data: ImageData, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, seeds=1, tuning_seeds=1, methods=("none", "stochasticdepth", "autodropout")
    )
    first, again = (run(settings, data, tmp_path / folder) for folder in "ab")
    assert first == again
    assert all(0 <= accuracy <= 1 for result in first for accuracy in result.values)
    assert [result.method for result in first] == list(settings.methods)
