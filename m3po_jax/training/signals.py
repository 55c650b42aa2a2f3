"""Stopping on a signal: noticed between steps, agreed on by all hosts, and never forgotten.

A stage looks for the signal between two pieces of its work. One that arrives after the stage's last look belongs to
whatever comes next: on one host it is raised again on leaving the stage, so that whoever listened before (a stage
around this one, the command line, Python itself) acts on it at once. On several hosts, where a process that left
alone would keep the others waiting, the next stage's first look finds it, and all of them stop there together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_unseen: list[str] = []  # on several hosts: a signal that the next stage has yet to see


class StopSignal:
    """Set by SIGTERM or SIGINT; on several hosts, all of them stop at the same step.

    Attributes:
        received: The signal's name; None before one arrives.
    """

    def __init__(self, received: str | None = None) -> None:
        self.received = received

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def any_host(self) -> bool:
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.received is not None)).any())


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catches SIGTERM and SIGINT while the block runs (in the main thread; elsewhere nothing is caught).

    A block that ends although a signal has arrived hands it on; one that ends with an exception has acted on it, or
    ends the command anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopSignal()
        return
    stop = StopSignal(_unseen.pop() if _unseen else None)
    previous = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop.received is None:
        return
    if jax.process_count() == 1:
        signal.raise_signal(signal.Signals[stop.received])
    else:
        _unseen[:] = [stop.received]
