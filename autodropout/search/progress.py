"""Live progress of a search on a terminal, or plain lines where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import IO
from typing import Any

from .history import History
from .history import total_entropy
from .journal import Record

RECENT = 20  # trials of the mean
WIDTH = 80
PLAIN_SECONDS = 30.0  # between two plain lines about nothing in particular
REFRESH = 4  # times a second


class Progress:
    """An observer of a driver, and a context manager around its run.

    Plain lines are written at each new best, each failure, and otherwise every 30 seconds.

    Args:
        stream: a text stream.
        workers: trials that can run at a time.
        live: None: if the stream is a terminal.
        clock: seconds.

    Raises:
        ImportError: it is to be live, and Rich is not installed.
    """

    def __init__(
        self, stream: IO[str], workers: int, live: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.history = History()
        self.stream = stream
        self.workers = workers
        self._clock = clock
        self._begun = self._printed = clock()
        self._before = 0  # trials that were over when this sitting began
        self._said = 0  # trials that were over at the last plain line about them
        self._live: Any = None
        if stream.isatty() if live is None else live:
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError as error:
                if error.name != "rich":
                    raise
                raise ImportError("live progress needs Rich: pip install 'autodropout[search]'", name="rich") from error
            console = Console(file=stream, force_terminal=True)
            self._live = Live(console=console, refresh_per_second=REFRESH, get_renderable=self._panel)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._over != self._said:
            self._line(self._status())

    def __call__(self, record: Record, replayed: bool = False) -> None:
        """Takes the next record."""
        history, best = self.history, self.history.best
        history(record, replayed)
        if replayed:
            self._said = self._over
            return
        kind = record["record"]
        if kind in ("run", "resume"):
            self._begun, self._before = self._clock(), self._over
            for notice in record.get("notices", ()):
                self._line(notice)
        elif kind == "fail":
            what = "failed" if record["final"] else "failed and is tried again"
            self._line(f"trial {record['trial']} {what} ({record['kind']}): {last_line(record['message'])}")
        elif kind == "tell" and self._live is None:
            waited = self._clock() - self._printed
            if history.best is not best or waited >= PLAIN_SECONDS:
                self._line(self._status())

    @property
    def _over(self) -> int:
        return len(self.history.told) + self.history.failed

    def figures(self) -> dict[str, str]:
        """What is shown, by name, as text."""
        history, shown = self.history, {}
        best = history.best
        if best is not None:
            shown["best"] = f"{best.metric:.5g} (trial {best.number})"
            recent = [trial.metric for trial in history.told[-RECENT:] if trial.metric is not None]
            shown[f"mean of last {len(recent)}"] = f"{statistics.fmean(recent):.5g}"
        if history.updates:
            last = history.updates[-1]
            entropy = total_entropy(last)
            if entropy is not None:
                shown["entropy"] = f"{entropy:.2f} nats"
            shown["age"] = f"{statistics.fmean(last['ages']):.1f} (at most {max(last['ages'])})"
        shown["failed"] = str(history.failed)
        return shown

    def time_left(self) -> float | None:
        """Seconds until the last trial ends, at the pace of this sitting; None before a trial has ended."""
        done = self._over - self._before
        if not done:
            return None
        return (self._clock() - self._begun) / done * (self.history.budget - self._over)

    def _status(self) -> str:
        left, self._said = self.time_left(), self._over
        figures = ", ".join(f"{name} {value}" for name, value in self.figures().items())
        tail = "" if left is None or not left else f", about {clock_time(left)} left"
        return f"{self._over} of {self.history.budget} trials: {figures}{tail}"

    def _line(self, text: str) -> None:
        self._printed = self._clock()
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def _panel(self) -> Any:
        """Three lines of at most 80 columns: a bar, then the figures in columns."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        history, left = self.history, self.time_left()
        name = history.recipe["name"] if history.header else ""
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, history.budget), completed=self._over, width=28)
        counted = Text(f"{self._over} of {history.budget}", style="bold")
        waiting = Text("" if left is None else f"about {clock_time(left)} left", style="dim")
        head.add_row(Text(_cut(name, 20), style="bold cyan"), bar, counted, waiting)
        lines: list[Any] = [head]
        row = Text()
        # Only here: a plain line is written when a worker has just become free, and has its next trial a moment later.
        busy = f"{min(history.unfinished, self.workers)} of {self.workers}"
        for label, value in {**self.figures(), "workers busy": busy}.items():
            item = Text.assemble((f"{label} ", "dim"), value)
            if row and len(row) + 3 + len(item) > WIDTH:
                lines.append(row)
                row = Text()
            row += Text("   ") + item if row else item
        lines.append(row)
        panel = Table.grid()
        for line in lines:
            panel.add_row(line)
        return panel


def last_line(message: str) -> str:
    """The last line of a message that is not blank, which says the most in a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def clock_time(seconds: float) -> str:
    """As in 0:03:21 or 2 d 4:00:00."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}\u2026"
