"""How far a long piece of work has come: a bar on a terminal, a line a minute anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 60.0  # between two lines of a log
_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "recall": "recall"}


class Advance(Protocol):
    """Called with how many items are done, and with what is to be said of the last one."""

    def __call__(self, done: int, note: str = "") -> None: ...


def describe(metrics: Mapping[str, float]) -> str:
    """Loss, accuracy and margin in one short text."""
    return "  ".join(f"{label} {metrics[name]:.3f}" for name, label in _SHOWN.items() if name in metrics)


@contextmanager
def progress_bar(
    title: str,
    total: int,
    done: int = 0,
    *,
    enabled: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Shows on stderr how many of `total` items are done; yields the function that is told of it.

    The first item waits for the compiler, and the bar says so. Time left is reckoned from the items behind it.

    Args:
        done: Items that an earlier process has done.
        enabled: False: this process shows nothing.
        clock: Seconds that never run back.
    """
    console = console or Console(stderr=True, highlight=False)
    if not enabled:
        yield lambda done, note="": None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done, note="compiling")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
    else:
        yield _Lines(title, total, done, console, clock)


class _Lines:
    """A line a minute: what is done, what share that is, how long the rest will take."""

    def __init__(self, title: str, total: int, done: int, console: Console, clock: Callable[[], float]):
        self.title, self.total, self.console, self.clock = title, total, console, clock
        self.before, self.written = done, clock()
        self.first: tuple[float, int] | None = None  # when the first item was done, and how many were then

    def __call__(self, done: int, note: str = "") -> None:
        now = self.clock()
        if self.first is None and done > self.before:
            self.first = now, done
        if now - self.written < LINE_SECONDS or done >= self.total:
            return
        self.written = now
        parts = [f"{self.title}: {done:,} of {self.total:,} ({done / self.total:.0%})", self._left(now, done), note]
        self.console.print(", ".join(filter(None, parts)), markup=False, soft_wrap=True)

    def _left(self, now: float, done: int) -> str:
        if self.first is None or done <= self.first[1]:
            return ""
        since, count = self.first
        return f"{duration((now - since) / (done - count) * (self.total - done))} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
