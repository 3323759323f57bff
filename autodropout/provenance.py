"""Which version of the source made a result."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str | None:
    """The git commit of the checkout with this file, "+dirty" if tracked files differ; None outside of a checkout."""
    file = Path(__file__).resolve()

    def git(*command: str) -> str:
        run = subprocess.run(["git", "-C", str(file.parent), *command], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # or the package is installed within another project
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
