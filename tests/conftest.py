"""Settings that must hold before any test module is imported, and shared fixtures."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

# Before torch is imported. A worker of pytest-xdist has one core; processes that a test starts inherit that.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the tests compile is small: starting Inductor's pool of processes takes longer than the compilation.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A shell that starts the tests in the background lets them and all that they start ignore Ctrl-C, which some test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before any kernel is imported: without a GPU the
# same kernels run under the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, named by the environment variable AUTODROPOUT_DATA."""
    value = os.environ.get("AUTODROPOUT_DATA")
    if not value:
        pytest.skip("needs real data: set AUTODROPOUT_DATA to the folder that holds the data sets")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"AUTODROPOUT_DATA must name a folder, got {value!r}")
    return path


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds_like_a_gpu() -> None:
    """Triton's interpreter truncates float32 to bfloat16, where compiled code rounds to nearest even (`cvt.rn`).

    test_machine_code.py asserts the latter; here the interpreter is taught the same, so that values can be compared.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return truncating(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding


@pytest.fixture(scope="session", autouse=True)
def interpreter_looks_up_once() -> None:
    """A fifth of the interpreter's time goes into two things that it does again and again: at every operation it makes
    a table of dtypes, and at every call of a helper it searches Triton's modules for functions to replace.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    dtype_of, dtypes = interpreter._get_np_dtype, dict[str, Any]()
    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    searched: set[int] = set()  # modules of helpers

    def dtype_by_name(type: Any) -> Any:
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(type)
        return dtypes[name]

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> None:
        searched.clear()  # the end of a launch takes replacements back
        launch(self, *args, **kwargs)

    def call_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module in searched:
            return self.rewrite()(*args, **kwargs)
        searched.add(module)
        return call(self, *args, **kwargs)

    interpreter._get_np_dtype = dtype_by_name
    interpreter.GridExecutor.__call__ = launch_and_forget
    interpreter.InterpretedFunction.__call__ = call_again
