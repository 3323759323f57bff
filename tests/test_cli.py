"""The command line: files written, and one clear line with exit code 2 when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from autodropout.cli import main
from autodropout.patterns import BlockPattern
from autodropout.patterns import TiledPattern
from autodropout.policy import Policy
from autodropout.policy import Site


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs `main`, asserts exit code 2, nothing on stdout and one line on stderr, and returns that line."""
    try:
        code: object = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


def test_show_draws_a_shipped_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "hand-v0", "-o", str(tmp_path / "policy.png")]) == 0
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr() == ("", "")


def test_show_draws_a_file_on_a_map(tmp_path: Path) -> None:
    Policy.uniform(BlockPattern(0.1, 3)).save(tmp_path / "policy.json")
    sizes = []
    for side in ("8", "16"):
        assert main(["show", str(tmp_path / "policy.json"), "--map", side, "--output", str(tmp_path / "p.pdf")]) == 0
        sizes.append((tmp_path / "p.pdf").read_bytes())
    assert sizes[0] != sizes[1]


def test_unknown_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["show", "hand-v9", "-o", str(tmp_path / "p.png")], capsys) == (
        "autodropout: error: policy must be a file or one of the shipped policies (digits-v1, digits-v2, hand-lm-v0, "
        "hand-v0), got 'hand-v9'"
    )
    assert not (tmp_path / "p.png").exists()


def test_bad_policy_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.json"
    site = {"name": "a", "depth": 2, "place": "batch_norm", "pattern": None}
    file.write_text(json.dumps({"schema": 1, "masks": 1, "sites": [site]}))
    assert fails(["show", str(file), "-o", str(tmp_path / "p.png")], capsys) == (
        f"autodropout: error: {file}: sites[0].depth: must be in [0, 1], got 2"
    )


def test_bad_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(["show", "hand-v0", "-o", str(tmp_path / "p.jpg")], capsys)
    assert line == f"autodropout: error: path must end in one of .png, .pdf, got '{tmp_path / 'p.jpg'}'"
    line = fails(["show", "hand-v0", "-o", str(tmp_path / "missing" / "p.png")], capsys)
    assert line.startswith("autodropout: error: ")
    assert "No such file or directory" in line


@pytest.mark.parametrize("side", ["0", "513", "-3", "8.5", "x", "\u00b2"])
def test_bad_map(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(["show", "hand-v0", "-o", "p.png", f"--map={side}"], capsys)
    assert line == f"autodropout show: error: argument --map: must be an integer in [1, 512], got {side!r}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "autodropout: error: the following arguments are required: command"),
        (["show", "hand-v0"], "autodropout show: error: the following arguments are required: -o/--output"),
        (["draw"], "autodropout: error: argument command: invalid choice: 'draw' "),
        (["show", "hand-v0", "-o", "p.png", "--size", "3"], "autodropout: error: unrecognized arguments: --size 3"),
    ],
)
def test_bad_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(argv, capsys).startswith(message)


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fails(["show", "hand-v0", "-o", str(tmp_path / "p.png")], capsys) == (
        "autodropout: error: drawing needs matplotlib: pip install autodropout[draw]"
    )


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_without_the_library_of_a_model(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = fails(["sites", f"{library}:resnet18"], capsys)
    assert line == f"autodropout: error: import of {library} halted; None in sys.modules"


def test_a_search_without_filelock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "autodropout.search.journal", raising=False)
    monkeypatch.setitem(sys.modules, "filelock", None)
    line = fails(["search", "cifar10"], capsys)
    assert line == "autodropout: error: import of filelock halted; None in sys.modules"


@pytest.mark.parametrize(
    ("name", "shapes", "error"),
    [
        ("torchvision:r3d_18", "(1, 3, 224, 224)", "RuntimeError: "),
        ("torchvision:raft_small", "(1, 3, 224, 224)", "TypeError: RAFT.forward() missing 1 required positional"),
        ("transformers:CLIPModel", "input_ids (1, 16)", ""),
        ("transformers:WhisperModel", "input_ids (1, 16), decoder_input_ids (1, 16)", ""),
    ],
)
def test_a_model_that_wants_another_example(
    name: str, shapes: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(["sites", name], capsys).startswith(
        f"autodropout: error: {name} does not run with its example, {shapes}; FILE.py:FUNCTION can return a model "
        f"with an example of your own: {error}"
    )


OWN = """
from torch import nn, ones
class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
    def forward(self, x, scale):
        return self.norm(x) * scale["a"]["b"]
def wrong():
    return Wrong(), (ones(1, 3, 4, 4), {"a": [ones(2), 3]})
def fails():
    return {}["key"]
def exits():
    raise SystemExit(3)
def listed():
    return nn.BatchNorm2d(3), [ones(1, 3, 4, 4)]
"""


@pytest.mark.parametrize(
    ("function", "policy", "message"),
    [
        ("exits", [], "own.py:exits must return (model, example): SystemExit: 3"),
        ("listed", [], "own.py:listed must return (model, example): TypeError: example must be a tensor, a tuple of"),
        ("fails", [], "own.py:fails must return (model, example): KeyError: 'key'"),
        (
            "wrong",
            [],
            "own.py:wrong does not run with its example, (1, 3, 4, 4), a (2,), int; FILE.py:FUNCTION can return a "
            "model with an example of your own: TypeError: list indices must be integers or slices, not str",
        ),
        ("wrong", ["--policy", "hand-v0"], "own.py:wrong does not run with its example, (1, 3, 4, 4), a (2,), int; "),
        ("wrong", ["--policy", "hand-v9"], "policy must be a file or one of the shipped policies "),
    ],
)
def test_errors_of_a_file_are_one_line(
    function: str,
    policy: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN, encoding="utf-8")
    assert fails(["sites", f"own.py:{function}", *policy], capsys).startswith(f"autodropout: error: {message}")


def test_a_file_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import no_such_package\n", encoding="utf-8")
    assert fails(["sites", "own.py:f"], capsys) == (
        "autodropout: error: own.py cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"
    )


def test_a_file_that_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import sys\nsys.exit('no data')\n", encoding="utf-8")
    assert fails(["sites", "own.py:f"], capsys) == (
        "autodropout: error: own.py cannot be imported: SystemExit: no data"
    )


def test_a_warning_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = Policy((Site("layer4.1.bn2", 1.0, pattern=TiledPattern(0.5)),))
    policy.save("mine.json")
    assert main(["sites", "torchvision:resnet18", "--policy", "mine.json"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("autodropout: warning: patterns go by depth, as the policy names only 1 of the 17 sites")


def test_help_names_the_shipped_policies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["show", "--help"])
    assert stop.value.code == 0
    assert "hand-v0" in capsys.readouterr().out


def test_the_console_script_and_the_module_are_this_function(tmp_path: Path) -> None:
    (script,) = entry_points(group="console_scripts", name="autodropout")
    assert script.load() is main
    run = subprocess.run(
        [sys.executable, "-m", "autodropout.cli", "show", "hand-v0", "-o", str(tmp_path / "p.png"), "--map", "8"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "")
    assert (tmp_path / "p.png").is_file()
