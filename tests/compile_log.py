"""What jax compiles, by its own events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def noted_compilations() -> Iterator[list[str]]:
    """Names of the functions that are compiled, or found in the cache on disk, inside; one entry for each shape."""
    names: list[str] = []

    def note(event: str, seconds: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
