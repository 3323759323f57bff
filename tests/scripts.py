"""Runs the scripts of the tables as a user does, and reads what they leave behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(script: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The script, running in a folder that is made for it."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts background jobs deaf to Ctrl-C, and their children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def records(folder: Path) -> list[dict[str, object]]:
    """Of the only run in a folder."""
    (path,) = (folder / "results").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(record: dict[str, object]) -> dict[str, object]:
    """What two runs of one command have in common."""
    return {name: value for name, value in record.items() if name not in ("seconds", "finished", "commit")}


def wait_for(folder: Path, process: subprocess.Popen[str], finished: int) -> None:
    """Until that many models are finished and another one is in training."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = {path.stem for path in (folder / "runs").glob("*/*.json")} - {"run"}
        # The checkpoint of a model that is finished stays until its line is in results/.
        training = {path.stem for path in (folder / "runs").glob("*/*.pt")} - done
        if len(done) >= finished and training:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("no progress in two minutes")


def check_kills(script: Path, folder: Path, arguments: list[str], models: int) -> str:
    """Killed with -9 while its second and its third to last model are in training, the same command ends in the table
    and the records of a run that was left alone. Returns the table.
    """
    through, killed = folder / "through", folder / "killed"
    expected = finish(start(script, through, *arguments))
    for finished in (1, models - 3):
        process = start(script, killed, *arguments)
        wait_for(killed, process, finished)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert len(records(killed)) < models
    assert finish(start(script, killed, *arguments)) == expected
    assert [result(r) for r in records(killed)] == [result(r) for r in records(through)]
    assert len({record["key"] for record in records(killed)}) == models
    return expected
