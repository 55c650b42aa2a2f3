"""Words for the person at the terminal: on standard error, from one process only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from m3po_jax.errors import harmless

T = TypeVar("T")

console = Console(stderr=True, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """One line, without markup and control codes, because it may contain a user's or a model's text."""
    if jax.process_index() == 0:
        console.print(harmless(text), style=style, markup=False, soft_wrap=True)


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yields `items` with a progress bar where someone watches."""
    if jax.process_index() != 0 or not console.is_terminal:
        yield from items
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=harmless(title))
