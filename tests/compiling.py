"""Runs the scripts that compile kernels for GPUs that are not here, in processes without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def lines_of(script: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """The JSON lines of a run for each command, side by side; skipped if this Triton lacks what the script needs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    lines = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        lines += [json.loads(line) for line in out.splitlines()]
    if "missing" in lines[0]:
        pytest.skip(lines[0]["missing"])
    return lines
