"""Words for the person at the terminal: on standard error, from one process only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console

from m3po_jax.errors import harmless
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.training.progress import progress_bar

T = TypeVar("T")

console = Console(stderr=True, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """One line, without markup and control codes, because it may contain a user's or a model's text."""
    if is_writer():
        console.print(harmless(text), style=style, markup=False, soft_wrap=True)


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yields `items`, and shows how many of them are done."""
    with progress_bar(harmless(title), total, enabled=is_writer(), console=console) as advance:
        for number, item in enumerate(items):
            if number:
                advance(number)
            yield item
        advance(total)
