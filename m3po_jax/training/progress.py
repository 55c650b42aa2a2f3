"""The progress bar of training: on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "recall": "recall"}


def describe(metrics: Mapping[str, float]) -> str:
    """Loss, accuracy and margin in one short text."""
    return "  ".join(f"{label} {metrics[name]:.3f}" for name, label in _SHOWN.items() if name in metrics)


@contextmanager
def progress_bar(
    total: int, done: int, *, enabled: bool = True
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields a function of (steps done, metrics) that draws on stderr; silent where that is no terminal."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield lambda done, metrics: None
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total, completed=done, numbers="")

        def update(done: int, metrics: Mapping[str, float]) -> None:
            progress.update(task, completed=done, numbers=describe(metrics))

        yield update
