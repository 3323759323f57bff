"""The contract of every runner, and what becomes of a training that raises, dies, hangs or fills its memory.

The recipe of these tests runs the code that it finds in its policy's provenance. The Ray cluster has three nodes, of
one core each, on this machine; so that of two workers each is on another node.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from autodropout import Policy
from autodropout.search.run_folder import make_runner
from autodropout.search.runners import processes
from autodropout.search.runners.attempt import attempt
from autodropout.search.runners.attempt import failed
from autodropout.search.runners.attempt import load
from autodropout.search.runners.base import Failed
from autodropout.search.runners.base import Finished
from autodropout.search.runners.base import Outcome
from autodropout.search.runners.base import Runner
from autodropout.search.runners.base import Task
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.runners.processes import ProcessRunner
from autodropout.search.runners.ray_cluster import Mailbox
from autodropout.search.runners.ray_cluster import RayRunner
from autodropout.search.runners.ray_cluster import _capacity
from autodropout.search.runners.ray_cluster import _recipe_here
from autodropout.search.runners.ray_cluster import _Worker

RECIPE = """
DIRECTION = "max"


def space():
    raise NotImplementedError


def train(policy, seed, report):
    names = {"seed": seed, "report": report, "metric": seed / 3}
    exec(policy.provenance["code"], names)
    return names["metric"]
"""

PATIENCE = 120.0  # seconds until a test gives up on what should take a few
LIMIT = 8.0  # seconds of an attempt; all attempts but those that hang take milliseconds
MEMORY = 2 << 30
# Hangs in C, without letting another thread of Python run, and with a child that ignores SIGTERM.
HANG = """
import ctypes, subprocess
child = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; exec sleep 1000"], stdout=subprocess.PIPE)
child.stdout.readline()
report(0, child.pid)
ctypes.PyDLL(None).sleep(1000)
"""

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
# Of the kernel's flags of a process (include/linux/sched.h): it is ending; a signal has ended it.
PF_EXITING, PF_SIGNALED = 0x4, 0x400

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


def a_task(code: str, number: int = 0, seed: int = 1, attempt: int = 0) -> Task:
    policy = Policy(Policy.uniform(None).sites, {"code": code})
    return Task(number, attempt, policy.to_json(), seed)


@dataclass
class Harness:
    """A runner, what was reported to its driver, and what the driver answers."""

    kind: str
    runner: Runner
    reports: list[tuple[int, int, float]] = field(default_factory=list)
    answer: Callable[[int, int, float], bool] = lambda number, step, value: True

    def on_report(self, number: int, step: int, value: float) -> bool:
        self.reports.append((number, step, value))
        return self.answer(number, step, value)

    def drive(self, *codes: str) -> list[Outcome]:
        """Trains all codes, as many at a time as there are slots; outcomes in the order of the codes."""
        tasks = [a_task(code, number, seed=10 + number) for number, code in enumerate(codes)]
        return drive(self.runner, tasks)


def drive(runner: Runner, tasks: list[Task]) -> list[Outcome]:
    todo, outcomes, running = list(tasks), list[Outcome](), 0
    give_up = time.monotonic() + PATIENCE
    while todo or running:
        while todo and running < runner.slots:
            runner.submit(todo.pop(0))
            running += 1
        outcomes += runner.wait(5.0)
        running = len(tasks) - len(todo) - len(outcomes)
        assert time.monotonic() < give_up, f"no outcome; so far: {outcomes}"
    assert len(outcomes) == len(tasks)
    return sorted(outcomes, key=lambda outcome: outcome.task.number)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "coded.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[str]:
    """With a core each: two for the actors of `shared`, which may live as long, one for what a test starts."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whether the user has a token for clusters or not
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(**node)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def seven_cores() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_cores", lambda: 7)
        yield


@pytest.fixture(
    scope="module", params=["in-process", "processes", pytest.param("ray", marks=[needs_ray, pytest.mark.slow])]
)
def shared(request: pytest.FixtureRequest, recipe: Path) -> Iterator[Harness]:
    runner: Runner
    if request.param == "in-process":
        runner = InProcessRunner()
    elif request.param == "processes":
        request.getfixturevalue("seven_cores")
        runner = ProcessRunner(2, timeout=LIMIT, memory_limit=MEMORY, logs=recipe.parent / "logs")
    else:
        runner = RayRunner(2, address=request.getfixturevalue("three_nodes"), timeout=LIMIT)
    with runner:
        harness = Harness(request.param, runner)
        runner.start(str(recipe), harness.on_report)
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Harness:
    shared.reports.clear()
    shared.answer = lambda number, step, value: True
    return shared


def failure(outcome: Outcome, kind: str) -> str:
    assert isinstance(outcome, Failed), outcome
    assert outcome.kind == kind, outcome
    assert outcome.seconds >= 0
    return outcome.message


def test_every_task_gets_its_own_outcome(harness: Harness) -> None:
    outcomes = harness.drive(*["pass"] * 5)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Finished)
        assert outcome.task == a_task("pass", number, seed=10 + number)
        assert outcome.metric == (10 + number) / 3
        assert outcome.stopped is None
        assert outcome.seconds >= 0
    assert harness.runner.wait(None) == []  # nothing runs


def test_what_is_reported_arrives_in_order(harness: Harness) -> None:
    code = "import torch; report(0, 0.1 + 0.2); report(3, torch.tensor(2.5)); report(4, 7); metric = torch.tensor(0.5)"
    outcomes = harness.drive(code, code, code)
    assert [outcome.metric for outcome in outcomes if isinstance(outcome, Finished)] == [0.5] * 3
    for number in range(3):
        assert [report for report in harness.reports if report[0] == number] == [
            (number, 0, 0.1 + 0.2),
            (number, 3, 2.5),
            (number, 4, 7.0),
        ]


@pytest.mark.parametrize(
    "code",
    [
        "for step in range(9): report(step, seed + step / 8)",
        # A recipe that goes on after any error of a step.
        "for step in range(9):\n  try: report(step, seed + step / 8)\n  except Exception: pass",
        # What must not be done, and does not help either.
        "for step in range(9):\n  try: report(step, seed + step / 8)\n  except BaseException: pass",
        "for step in range(9):\n  try: report(step, seed + step / 8)\n  finally: 1 / (2 - step)",
    ],
)
def test_an_answer_of_false_ends_a_training(harness: Harness, code: str) -> None:
    harness.answer = lambda number, step, value: number == 0 or step < 2
    first, second = harness.drive("report(2, 0); metric = 3", code)
    assert isinstance(first, Finished)
    assert (first.metric, first.stopped) == (3.0, None)
    assert isinstance(second, Finished)
    assert (second.metric, second.stopped) == (11 + 2 / 8, 2)
    assert [report for report in harness.reports if report[0] == 1] == [(1, step, 11 + step / 8) for step in range(3)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("metric = float('nan')", "ValueError: result of train must be in [-1e+100, 1e+100], got nan"),
        ("metric = -1e200", "ValueError: result of train must be in [-1e+100, 1e+100], got -1e+200"),
        ("metric = None", "TypeError: result of train must be a number, got None"),
        ("report(0, float('inf'))", "ValueError: value of report at step 0 must be in [-1e+100, 1e+100], got inf"),
        ("report(0, '1')", "TypeError: value of report at step 0 must be a number, got '1'"),
        ("report(4, 1); report(4, 1)", "ValueError: step must be at least 5, as the last one was 4, got 4"),
        ("report(-1, 1)", "ValueError: step must be at least 0, got -1"),
        ("report(0.5, 1)", "TypeError: step must be an integer, got 0.5"),
    ],
)
def test_a_training_that_raises_fails_with_its_traceback(harness: Harness, code: str, message: str) -> None:
    (outcome,) = harness.drive(code)
    lines = failure(outcome, "raised").splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == message
    assert ('coded.py", line ' in lines[1]) == (not message.startswith(("ValueError: result", "TypeError: result")))


def test_each_worker_has_its_share_of_the_threads(harness: Harness) -> None:
    if harness.kind == "in-process":
        pytest.skip("has all threads of its driver")
    code = "import os, torch; metric = 100 * torch.get_num_threads() + int(os.environ['OMP_NUM_THREADS'])"
    (outcome,) = harness.drive(code)
    assert isinstance(outcome, Finished)
    assert outcome.metric == (303 if harness.kind == "processes" else 101)  # 7 // 2; one core an actor


def test_no_more_tasks_than_slots(harness: Harness, tmp_path: Path) -> None:
    slots, gate = harness.runner.slots, tmp_path / "gate"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    for number in range(slots):
        harness.runner.submit(a_task("pass" if harness.kind == "in-process" else code, number))
    with pytest.raises(RuntimeError, match="submit must be called while a slot is free"):
        harness.runner.submit(a_task("pass", slots))
    if harness.kind != "in-process":
        assert harness.runner.wait(0.01) == []  # too early
        gate.touch()
    numbers: list[int] = []
    while len(numbers) < slots:
        numbers += [outcome.task.number for outcome in harness.runner.wait(None)]
    assert sorted(numbers) == list(range(slots))


def test_what_trainings_print_stays_out_of_the_driver_output(
    harness: Harness, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if harness.kind == "in-process":
        pytest.skip("prints where the driver prints")
    code = "import os, sys; print('to stdout'); print('to stderr', file=sys.stderr); os.system('echo from a child')"
    harness.drive(code, code)
    assert capfd.readouterr() == ("", "")
    if harness.kind == "processes":
        text = "".join(path.read_text() for path in sorted((recipe.parent / "logs").glob("worker-[01].log")))
        for line in ("to stdout", "to stderr", "from a child"):
            assert text.count(line) == 2


@needs_proc
def test_workers_that_die_hang_or_fill_their_memory_are_replaced(harness: Harness) -> None:
    if harness.kind == "in-process":
        pytest.skip("takes its driver along")
    ray = harness.kind == "ray"

    def answer(number: int, step: int, value: float) -> bool:
        if number == 2 and ray:
            kill_actor(harness.runner, number)
        elif number in (1, 2):
            os.kill(int(value), signal.SIGKILL if number == 1 else signal.SIGTERM)
        return True

    harness.answer = answer
    killed = "import os, sys, time; print('last words', file=sys.stderr); report(0, os.getpid()); time.sleep(1000)"
    # Of two tries to take 4 GiB, Python's is caught; torch's raises no MemoryError.
    full = "try: bytearray(4 << 30)\nexcept MemoryError: import torch; torch.zeros(1 << 30)"
    outcomes = harness.drive(HANG, killed, killed, "metric = 4", "raise MemoryError" if ray else full)

    assert failure(outcomes[0], "timeout") == f"killed: ran past its limit of {LIMIT:g} s"
    messages = [failure(outcome, "died") for outcome in outcomes[1:3]]
    if ray:
        assert "worker process has died" in messages[0]
        assert "ray.kill" in messages[1]
    else:
        end = f"; its memory limit was {MEMORY} bytes\nlast words"
        assert messages[0] == f"the worker was killed by SIGKILL, as the system does when memory runs out{end}"
        assert messages[1] == f"the worker was killed by SIGTERM{end}"
    assert isinstance(outcomes[3], Finished)
    assert failure(outcomes[4], "memory").splitlines()[-1].startswith("MemoryError" if ray else "RuntimeError")
    (child,) = [int(value) for number, _, value in harness.reports if number == 0]
    wait_until(lambda: not alive(child), "the child of a killed worker is gone")


def kill_actor(runner: Runner, number: int) -> None:
    import ray

    assert isinstance(runner, RayRunner)
    (actor,) = [worker.actor for worker in runner._workers.values() if worker.task and worker.task.number == number]
    ray.kill(actor)


def alive(process: int) -> bool:
    """Whether it runs; what is dead but not yet collected does not, nor what SIGKILL has reached.

    Its sender goes on before a killed process has had its turn on a busy core to come to its end.
    """
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    pending = int(re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    killed = pending >> (signal.SIGKILL - 1) & 1 or int(numbers[5]) & (PF_EXITING | PF_SIGNALED)
    return state not in "ZX" and not killed


def wait_until(holds: Callable[[], Any], what: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < give_up, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """The processes that run with this text in their environment, but for one that is just replacing its program.

    The kernel tells the parent of a new program, and shows the program's process, before its environment is in place.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(folder, "environ").read_bytes() and alive(int(folder.name)):
                found.append(int(folder.name))
    return found


DRIVER = """
import os
import sys

from autodropout.search.runners.base import Task
from autodropout.search.runners.{module} import {runner}

# No guard against being imported: a worker must not run this script again.
with {runner}(1, {arguments}) as runner:
    runner.start({recipe!r}, lambda number, step, value: print(int(value), flush=True) or True)
    runner.submit(Task(0, 0, {policy!r}, 1))
    while True:
        runner.wait(None)
"""


@needs_proc
@pytest.mark.parametrize(
    ("module", "runner", "number"),
    [
        ("processes", "ProcessRunner", signal.SIGKILL),
        ("processes", "ProcessRunner", signal.SIGINT),
        pytest.param("ray_cluster", "RayRunner", signal.SIGKILL, marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_no_process_outlives_its_driver(
    tmp_path: Path, recipe: Path, request: pytest.FixtureRequest, module: str, runner: str, number: signal.Signals
) -> None:
    ray = module == "ray_cluster"
    script = tmp_path / "driver.py"
    policy = a_task(HANG).policy
    arguments = f"address={request.getfixturevalue('three_nodes')!r}" if ray else ""
    script.write_text(
        DRIVER.format(module=module, runner=runner, arguments=arguments, recipe=str(recipe), policy=policy)
    )
    mark = f"AUTODROPOUT_TEST_{uuid.uuid4().hex}"
    driver = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, mark: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())  # now in the middle of the training
        worker = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        assert os.getsid(worker) != driver.pid  # so that Ctrl-C does not reach it
        if not ray:  # a worker of a cluster has the cluster's environment
            wait_until(lambda: len(marked(mark)) >= 4, "driver, guard, worker and its child run")
        os.killpg(driver.pid, number)  # as a terminal does with Ctrl-C
        begin = time.monotonic()
        _, errors = driver.communicate(timeout=PATIENCE)
        if number == signal.SIGINT:
            assert time.monotonic() - begin < 5
            assert errors.rstrip().endswith("KeyboardInterrupt")
            assert not marked(mark)
        wait_until(lambda: not (marked(mark) or alive(worker) or alive(child)), "no process is left")
    finally:
        for process in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@needs_proc
def test_closing_in_the_middle_ends_everything(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"AUTODROPOUT_TEST_{uuid.uuid4().hex}"
    monkeypatch.setenv(mark, "1")

    def on_report(number: int, step: int, value: float) -> bool:
        raise OSError("no space left for the journal")

    runner = ProcessRunner(1)
    with runner:
        runner.start(str(recipe), on_report)
        runner.submit(a_task("import subprocess; subprocess.Popen(['sleep', '1000']); report(1, 1)"))
        with pytest.raises(OSError, match="no space left for the journal"):
            runner.wait(None)
        wait_until(lambda: len(marked(mark)) == 3, "guard, worker and its child run")
    assert not marked(mark)
    runner.close()


def test_in_process_errors_of_the_driver_and_ctrl_c_are_no_failures(recipe: Path) -> None:
    def on_report(number: int, step: int, value: float) -> bool:
        raise OSError("no space left for the journal")

    runner = InProcessRunner()
    runner.start(str(recipe), on_report)
    runner.submit(a_task("try: report(0, 1)\nexcept Exception: pass"))
    with pytest.raises(OSError, match="no space left for the journal"):
        runner.wait(None)
    runner.submit(a_task("try: raise KeyboardInterrupt\nexcept Exception: pass"))
    with pytest.raises(KeyboardInterrupt):
        runner.wait(None)
    runner.submit(a_task("metric = 2"))
    assert [outcome.metric for outcome in runner.wait(None) if isinstance(outcome, Finished)] == [2.0]


def test_a_lack_of_memory_is_told_from_other_errors() -> None:
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "no memory"),
        raised_by(lambda: torch.empty(1 << 55)),
        raised_by(lambda: numpy.empty(1 << 55)),
    ]
    for error in errors:
        failure(failed(a_task("pass"), error, 0.0), "memory")
    for error in [RuntimeError("CUDA out of patience"), OSError(errno.ENOENT, "no file"), KeyError(errno.ENOMEM)]:
        failure(failed(a_task("pass"), error, 0.0), "raised")


def raised_by(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_recipe_that_cannot_be_loaded_in_a_worker_fails_its_tasks(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    loaded = load(str(broken))
    for number in range(2):
        outcome = attempt(loaded, a_task("pass", number), lambda step, value: True)
        assert "nothing_of_this_name" in failure(outcome, "raised").splitlines()[-1]


def test_a_worker_that_does_not_get_ready_is_given_up(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "START_SECONDS", 0.2)
    monkeypatch.setattr(processes, "PROGRAM", "import time; time.sleep(1000); {path!r}; {descriptor}")
    with ProcessRunner(1) as runner:
        runner.start(str(recipe), lambda number, step, value: True)
        (outcome,) = drive(runner, [a_task("pass")])
        assert failure(outcome, "timeout") == "killed: was starting past its limit of 0.2 s"


def test_how_many_actors_fit() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert _capacity(nodes, 2, 0) == 4 + 1
    assert _capacity(nodes, 4, 1) == 2
    assert _capacity(nodes, 1, 0.5) == 4
    assert _capacity(nodes, 0.1, 0) == 80 + 30
    assert _capacity(nodes, 16, 0) == 0


def test_a_node_without_the_recipe_gets_a_copy(recipe: Path, tmp_path: Path) -> None:
    source = recipe.read_bytes()
    assert _recipe_here(str(recipe), source) == str(recipe)
    (tmp_path / "coded.py").write_text("another one")
    for path in [tmp_path / "coded.py", tmp_path / "nowhere" / "coded.py"]:
        copy = Path(_recipe_here(str(path), source))
        assert copy != path
        assert copy.name == "coded.py"
        assert copy.read_bytes() == source
        copy.unlink()
        copy.parent.rmdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProcessRunner(0), r"workers must be an integer in \[1, \d+\], got 0"),
        (lambda: ProcessRunner(1, timeout=0), "timeout must be above 0 and finite, or None, got 0"),
        (lambda: ProcessRunner(1, timeout=math.inf), "timeout must be above 0 and finite, or None, got inf"),
        (
            lambda: ProcessRunner(1, memory_limit=0),
            r"memory_limit must be an integer in \[1, 9223372036854775807\], got 0",
        ),
        (lambda: ProcessRunner(1, memory_limit=2**63), "memory_limit must be an integer in .* got 9223372036854775808"),
        (lambda: RayRunner(0), "workers must be an integer in .* got 0"),
        (lambda: RayRunner(1, cpus_per_trial=0), "cpus_per_trial must be above 0 and finite, got 0"),
        (lambda: RayRunner(1, gpus_per_trial=-1), "gpus_per_trial must be at least 0 and finite, got -1"),
        (lambda: RayRunner(1, timeout=-1), "timeout must be above 0 and finite, or None, got -1"),
    ],
)
def test_what_must_be_refused(make: Callable[[], Runner], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [ProcessRunner, RayRunner])
@pytest.mark.parametrize(("workers", "got"), [(1.5, "1.5 of type float"), ("2", "'2' of type str"), (True, "True")])
def test_the_number_of_workers_is_an_integer(kind: Callable[[Any], Runner], workers: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"^workers must be an integer in \[1, \d+\], got {got}"):
        kind(workers)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'autodropout\[ray\]'"):
        RayRunner(1)


def test_a_report_of_an_actor_that_is_gone_waits_no_longer_than_until_the_next_begins() -> None:
    """It would hold one of the calls that the mailbox takes at a time, for ever. Other slots go on."""

    async def play() -> None:
        mailbox = Mailbox()
        gone, other = (asyncio.ensure_future(mailbox.report(slot, (slot, 0), 1, 0.5)) for slot in (0, 1))
        await asyncio.sleep(0)
        await mailbox.begin(0, (0, 1))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(gone, 5)
        await mailbox.answer(0, (0, 0), True)  # of the driver, which does not know yet
        await mailbox.answer(1, (1, 0), True)
        assert await asyncio.wait_for(other, 5) is True

    asyncio.run(play())


def test_an_answer_reaches_the_task_that_asked_only() -> None:
    async def play() -> None:
        mailbox = Mailbox()
        old, new = (asyncio.ensure_future(mailbox.report(0, (7, attempt), 1, 0.5)) for attempt in (0, 1))
        assert await mailbox.collect() == [(0, (7, 0), (1, 0.5)), (0, (7, 1), (1, 0.5))]
        await mailbox.answer(0, (7, 0), False)
        assert await asyncio.wait_for(old, 5) is False
        assert not new.done()
        await mailbox.answer(0, (7, 1), True)
        assert await asyncio.wait_for(new, 5) is True

    asyncio.run(play())


@needs_ray
def test_reports_of_gone_actors_are_answered_but_not_passed_on() -> None:
    runner = RayRunner(3)
    harness = Harness("ray", runner)
    runner._on_report = harness.on_report
    answers: list[tuple[int, tuple[int, int], bool]] = []
    remote = SimpleNamespace(remote=lambda *answer: answers.append(answer))
    runner._mailbox = SimpleNamespace(answer=remote)
    # Slot 0 has the next attempt, slot 1 a new actor without a task, slot 2 none yet.
    runner._workers = {slot: _Worker(None) for slot in (0, 1)}
    runner._workers[0].task = a_task("pass", 0, attempt=1)
    gone = [(slot, (slot, 0), report) for slot in range(3) for report in (None, (1, 0.5))]
    runner._answer(gone)
    assert answers == [(slot, (slot, 0), False) for slot in range(3)]
    assert harness.reports == []
    assert runner._workers[0].since is None
    runner._answer([(0, (0, 1), None), (0, (0, 1), (2, 0.25))])
    assert answers[3:] == [(0, (0, 1), True)]
    assert harness.reports == [(0, 2, 0.25)]
    assert runner._workers[0].since is not None


@pytest.mark.slow
@needs_ray
def test_a_search_goes_on_after_more_actors_died_while_they_report_than_the_mailbox_takes_calls(
    tmp_path: Path, recipe: Path, three_nodes: str
) -> None:
    import ray

    with RayRunner(1, address=three_nodes, timeout=LIMIT) as runner:
        harness = Harness("ray", runner)
        runner.start(str(recipe), harness.on_report)
        for number in range(5):  # of one slot it takes four calls at a time
            gate = tmp_path / str(number)
            code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nreport(1, 1)"
            runner.submit(a_task(code, number))
            wait_until(lambda: runner.wait(0.1) == [] and runner._workers[0].since is not None, "a training begins")
            gate.touch()
            assert ray.wait([runner._letters], timeout=PATIENCE)[0], f"report {number} does not arrive"
            runner._end(0)  # as when it dies before its report is read
        (outcome,) = drive(runner, [a_task("report(1, 2.5)", 5)])
        assert isinstance(outcome, Finished)
        assert harness.reports == [(5, 1, 2.5)]


@pytest.mark.slow
@needs_ray
def test_workers_that_no_cluster_can_hold_are_refused(recipe: Path, three_nodes: str) -> None:
    with (
        RayRunner(2, cpus_per_trial=2, address=three_nodes) as runner,
        pytest.raises(ValueError, match="workers must be at most 0 on this cluster with 2 CPUs and 0 GPUs each, got 2"),
    ):
        runner.start(str(recipe), lambda number, step, value: True)


def test_a_runner_that_no_journal_of_the_commands_names_is_refused(tmp_path: Path) -> None:
    """A search begun in Python records the name of its class, which has arguments that are not known here."""
    with pytest.raises(ValueError, match="must be in-process, processes or ray, got 'RayRunner'"):
        make_runner({"kind": "RayRunner", "workers": 8}, tmp_path)
