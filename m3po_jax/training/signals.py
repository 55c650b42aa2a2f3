"""Stopping on a signal: noticed between steps, agreed on by all hosts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np


class StopSignal:
    """Set by SIGTERM or SIGINT; on several hosts, all of them stop at the same step."""

    def __init__(self) -> None:
        self.received: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def any_host(self) -> bool:
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.received is not None)).any())


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catches SIGTERM and SIGINT while the block runs (in the main thread; elsewhere nothing is caught)."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
