"""Loops of the CPU, compiled by Numba where it is installed (`pip install autodropout[cpu]`): `*_numba.py` holds them.

PyTorch makes an op of several passes over the activation, or over a mask of its size, and Philox of eighty passes over
its counters. A compiled loop reads an element, decides and writes it. Bits and values are the same with and without,
but that a dropped cell may be -0.0 without, where the mask is a factor, and the payloads of NaN.

Threads are those of `torch.get_num_threads()`. Numba runs them by OpenMP, on Linux by the same library as PyTorch, so
that the two do not wait beside each other for the same cores (docs/cpu-speed.md).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

# Bytes that are worth a second thread: a tenth of a millisecond inside the cache.
GRAIN = 1 << 20

# Numba's own pool of threads, which it uses where no OpenMP is found, ends the process when two threads start loops.
_ONE_LOOP = threading.Lock()


def has_numba() -> bool:
    """Whether the compiled loops are to be used: where Numba can be imported.

    In a function that `torch.compile` could not take as a whole, Dynamo may look into the implementation of an op. It
    reads PyTorch, not compiled loops.
    """
    return not torch.compiler.is_dynamo_compiling() and _imports_numba()


@lru_cache(maxsize=1)
def _imports_numba() -> bool:
    """It refuses a NumPy newer than itself, which is said once, as is anything else that keeps it from loading."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except Exception as error:  # beside ImportError what comes of parts that do not fit, such as SystemError
        warnings.warn(f"autodropout runs without Numba on the CPU, which is slower: {error}", stacklevel=2)
        return False
    return True


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles at the first call with arguments of new types; other Python threads run on meanwhile."""
    return _compile(function, nogil=True)


def parallel_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function whose `prange` runs on several threads. To be called by `run`."""
    return _compile(function, parallel=True, nogil=True)


def _compile(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    import numba

    compiler: Callable[..., Any]
    try:
        # Kept beside the source, or in the user's cache, for the next process. What a loop calls is compiled into it,
        # and not looked at again when only the file of that changes: then delete __pycache__.
        compiler = numba.njit(function, cache=True, error_model="numpy", **options)
        _keep_one_at_a_time(compiler)
        _load_under_any_name(compiler)
    except RuntimeError:  # neither place can be written to
        compiler = numba.njit(function, error_model="numpy", **options)
    return compiler


def _keep_one_at_a_time(compiler: Any) -> None:
    """Locks the cache of a loop while it is written to.

    Two processes that keep a loop for two dtypes at the same time give both the same file (Numba 0.68), and the one
    whose code is not in it fails from then on.
    """
    if fcntl is None or not hasattr(compiler, "_cache"):  # NUMBA_DISABLE_JIT=1 leaves the function as it is
        return
    cache = compiler._cache
    save = cache.save_overload

    def save_alone(*arguments: Any) -> None:
        # Where nothing can be kept, as on a full disk, it is compiled for the process.
        with suppress(OSError), open(Path(cache.cache_path, "autodropout.lock"), "w") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            save(*arguments)

    cache.save_overload = save_alone


def _load_under_any_name(compiler: Any) -> None:
    """Compiles anew what a process has kept that knew this folder by a name that leads nowhere here.

    In a checkout it is `kernels` as well as `autodropout.kernels`. Numba keeps the modules of loops by name, and finds
    what it kept by file.
    """
    if not hasattr(compiler, "_cache"):
        return
    load = compiler._cache.load_overload

    def load_or_not(*arguments: Any) -> Any:
        with suppress(ImportError):
            return load(*arguments)
        return None

    compiler._cache.load_overload = load_or_not


def run(one: Callable[..., Any], several: Callable[..., Any], parts: int, size: int, *arguments: Any) -> Any:
    """`one(*arguments, 0, parts)`, or `several(*arguments, threads)` where `size` bytes are worth several threads."""
    threads = min(torch.get_num_threads(), parts, size // GRAIN)
    if threads <= 1:
        # Also in a data loader's worker, a fork in which OpenMP must not run: PyTorch gives it one thread.
        return one(*arguments, 0, parts)
    with _ONE_LOOP:
        of_numba = _threads_of_numba()
        before, now = of_numba.get(), min(threads, of_numba.most)
        if before == now:
            return several(*arguments, threads)
        of_numba.set(now)
        try:
            return several(*arguments, threads)
        finally:
            of_numba.set(before)


class _Threads(NamedTuple):
    """Reads and sets the number of threads of the loops that this Python thread starts, and the largest allowed."""

    get: Callable[[], int]
    set: Callable[[int], object]
    most: int


@lru_cache(maxsize=1)
def _threads_of_numba() -> _Threads:
    """What `numba.get_num_threads` and `numba.set_num_threads` call.

    Before, each takes two locks, one of them between processes, in case Numba's threads must be started first: 0.1 ms a
    call of `run` where other work has emptied the cache (docs/cpu-speed.md).
    """
    import numba
    from numba.np.ufunc import parallel

    of_torch = torch.get_num_threads()
    numba.get_num_threads()  # starts them, and with them sets the number of the OpenMP that PyTorch uses
    if torch.get_num_threads() != of_torch:
        torch.set_num_threads(of_torch)
    get = getattr(parallel, "_get_num_threads", numba.get_num_threads)
    set_to = getattr(parallel, "_set_num_threads", numba.set_num_threads)
    return _Threads(get, set_to, numba.config.NUMBA_NUM_THREADS)


def is_dense(x: torch.Tensor) -> bool:
    """Whether loops take this activation: contiguous, or a map (N, C, H, W) in channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def factor_of(x: torch.Tensor, scale: float) -> Any:
    """What a loop multiplies kept elements of `array(x)` by. 16-bit floats are integers there, which 1 leaves alone."""
    if x.dtype == torch.float64:
        return np.float64(scale)
    return np.float32(scale) if x.dtype == torch.float32 else np.int16(1)


def scale_rest_(y: torch.Tensor, scale: float) -> None:
    """After the loop: the product where `factor_of` could not hold the scale, formed in float32 and cast."""
    if y.dtype in (torch.float16, torch.bfloat16) and scale != 1:
        y.mul_(scale)


def array(x: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a CPU tensor as NumPy sees it, which knows no bfloat16: 16-bit floats come as int16."""
    if x.requires_grad:
        x = x.detach()
    return x.view(torch.int16).numpy() if x.dtype in (torch.float16, torch.bfloat16) else x.numpy()
