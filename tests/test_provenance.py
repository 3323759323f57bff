"""The commit is that of the checkout that a file belongs to, and of no other."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from autodropout import provenance

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_of(package: Path) -> str | None:
    """What `commit` says in a copy of its file in the folder `package`."""
    package.mkdir(parents=True, exist_ok=True)
    path = package / "provenance.py"
    if not path.exists():
        shutil.copy(provenance.__file__, path)
    spec = importlib.util.spec_from_file_location("copy_of_provenance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str | None = module.commit()
    return found


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert commit_of(tmp_path / "package") is None
    git(tmp_path, "add", "package/provenance.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path / "package") == commit
    (tmp_path / "new").touch()
    assert commit_of(tmp_path / "package") == commit
    with (tmp_path / "package/provenance.py").open("a") as file:
        file.write("# changed\n")
    assert commit_of(tmp_path / "package") == f"{commit}+dirty"


@pytest.mark.parametrize("ignored", [True, False])
def test_a_package_installed_within_another_project_has_no_commit(tmp_path: Path, ignored: bool) -> None:
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text(".venv/\n" if ignored else "")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-m", "theirs")
    assert commit_of(tmp_path / ".venv/lib/site-packages/autodropout") is None


def test_outside_of_any_checkout(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
