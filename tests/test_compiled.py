"""Where compiled loops run on the CPU, and where they must not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_torch import without_numba

from autodropout import TiledPattern
from autodropout import pattern_dropout

pytest.importorskip("numba", reason="needs Numba")

PATTERN = TiledPattern(size=0.3, stride=0.2, repeat=2)
ROOT = Path(__file__).parents[1]

# More than one thread is given: 4 MiB.
DROPS = """
import os, sys, torch
from autodropout import TiledPattern, pattern_dropout
x = torch.ones(64, 16, 32, 32)
def total(): return pattern_dropout(x, TiledPattern(size=0.3, stride=0.2, repeat=2), seed=1).double().sum().item()
"""


def python(code: str, *, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DROPS + code],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def expected() -> str:
    with without_numba():
        return f"{pattern_dropout(torch.ones(64, 16, 32, 32), PATTERN, seed=1).double().sum().item()}\n"


def test_an_activation_that_is_negated_lazily() -> None:
    """Its memory, which a loop reads, holds the opposite."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pattern_dropout(torch._neg_view(x), PATTERN, seed=1), -pattern_dropout(x, PATTERN, seed=1))


def test_numba_is_loaded_by_the_first_op_that_needs_it() -> None:
    result = python("assert 'numba' not in sys.modules; total(); assert 'numba' in sys.modules")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("of_numba", [1, 3])
def test_the_number_of_threads_of_pytorch_stays(of_numba: int) -> None:
    """Numba starts its threads in the OpenMP of PyTorch, as many as it finds cores."""
    code = "torch.set_num_threads(2); total(); print(torch.get_num_threads())"
    result = python(code, NUMBA_NUM_THREADS=str(of_numba))
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr


def test_a_numba_that_cannot_be_imported_is_said_once(tmp_path: Path) -> None:
    """As it is when NumPy is newer than the Numba that is installed."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less. Got NumPy 2.9.')")
    result = python("total(); print(total())", PYTHONPATH=str(tmp_path))
    assert result.stdout == expected(), result.stderr
    assert result.stderr.count("Numba needs NumPy 2.2 or less") == 1
    assert "slower" in result.stderr


# One process compiles a loop for float32, one for float64, and both look into the empty cache before either writes. The
# first then writes its index first and its code last. Both wait two seconds at most: a lock keeps the other out.
RACE = """
import numba.core.caching, pathlib, sys, time, torch
dtype, other, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
first = dtype == "float32"
def meet(event, of):
    (folder / f"{event} {dtype}").touch()
    end = time.monotonic() + 2
    while of and not (folder / of).exists() and time.monotonic() < end:
        time.sleep(0.01)
File = numba.core.caching.IndexDataCacheFile
save_index, save_data = File._save_index, File._save_data
def slow_index(self, overloads):
    meet("looked", f"looked {other}")
    meet("waits", None if first else f"wrote index {other}")
    save_index(self, overloads)
    meet("wrote index", None)
def slow_data(self, name, data):
    meet("has index", f"wrote code {other}" if first else None)
    save_data(self, name, data)
    meet("wrote code", None)
File._save_index, File._save_data = slow_index, slow_data
from autodropout.kernels.compiled import loop
from looped import twice
import numpy
print(loop(twice)(numpy.ones(3, dtype)).tolist())
"""


@pytest.mark.slow
def test_two_processes_that_keep_a_loop_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "looped.py").write_text("def twice(x):\n    return 2 * x\n")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def start(dtype: str, other: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RACE, dtype, other, str(tmp_path)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for together in (True, False):  # at the same time; later
        processes = []
        for dtype, other in (("float32", "float64"), ("float64", "float32")):
            processes.append(start(dtype, other))
            if not together:
                processes[-1].wait()
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (0, "[2.0, 2.0, 2.0]\n"), err


def test_what_a_process_in_the_checkout_kept_is_no_use_outside(tmp_path: Path) -> None:
    """There the folder is `kernels` too, a name under which other processes find nothing."""
    code = """
import sys, torch
{path}
from {name} import Atlas, tiled_dropout
print(tiled_dropout(torch.ones(2, 3, 4, 4), Atlas.of(0.5, 0.5, 1, 0.0, 0.0, 0.0, 4, 4), seed=1).sum().item())
"""
    shown = []
    for name, path in (("kernels", f"sys.path.insert(0, {str(ROOT)!r})"), ("autodropout.kernels", "")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(name=name, path=path)],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        shown.append(result.stdout)
    assert shown[0] == shown[1]


def test_nowhere_to_keep_what_was_compiled(tmp_path: Path) -> None:
    """Neither beside the source nor in the user's cache: it is compiled for the process."""
    package = tmp_path / "site" / "autodropout"
    shutil.copytree(ROOT / "autodropout", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # Root may write anywhere, so folders that cannot be made are what root cannot write to: names that files have.
    for name in ("autodropout/kernels/__pycache__", "autodropout/__pycache__", "home"):
        (tmp_path / "site" / name).write_text("")
    home = str(tmp_path / "site" / "home")
    result = python(
        f"import autodropout; assert autodropout.__file__.startswith({str(tmp_path)!r}); print(total())",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
        PYTHONDONTWRITEBYTECODE="1",
        HOME=home,
        XDG_CACHE_HOME=home,
    )
    assert result.stdout == expected(), result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_fork_with_one_thread() -> None:
    """OpenMP ends a process that was forked from one with threads and starts some; a data loader's worker has one."""
    code = """
torch.set_num_threads(2)
total()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    print(total(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    result = python(code)
    assert result.stdout == expected(), result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_calls_from_several_threads(layer: str) -> None:
    """Numba's own pool, used where OpenMP is missing, ends the process when two threads start loops at a time."""
    code = """
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
with ThreadPoolExecutor(4) as pool:
    totals = set(pool.map(lambda _: total(), range(40)))
(result,) = totals
print(result)
"""
    result = python(code, NUMBA_THREADING_LAYER=layer)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected()


def test_the_number_of_threads_of_numba_is_left_alone() -> None:
    code = """
import numba
numba.set_num_threads(1)
torch.set_num_threads(2)
total()
assert numba.get_num_threads() == 1
"""
    result = python(code, NUMBA_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
