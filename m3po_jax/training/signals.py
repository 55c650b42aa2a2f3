"""Stopping on a signal: noticed between steps, agreed on by all hosts, and never forgotten.

A stage looks for the signal between two pieces of its work. One that arrives after the stage's last look belongs to
whatever comes next: on one host it is raised again on leaving the stage, so that whoever listened before (a stage
around this one, the command line, Python itself) hears of it. On several hosts, where a process that left alone
would keep the others waiting, the next stage's first look finds it, and all of them stop there together.

Between two stages the command line listens with `noted`, and the next look finds what it noted. It raises nothing by
itself: an exception out of nowhere is taken for something else by the library that it happens in (a configuration
that cannot be read, say), or swallowed whole (in a callback of the garbage collector).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np

from m3po_jax.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_unseen: list[str] = []  # a signal that the next look has yet to see


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


@contextmanager
def noted() -> Iterator[None]:
    """SIGTERM and SIGINT between stages wait for the next look while the block runs; a second SIGINT does not wait.

    One that no look has seen when the block ends is raised there.

    Raises:
        Interrupted: at the block's end.
        KeyboardInterrupt: on a second SIGINT, wherever that is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        again = bool(_unseen)
        _unseen[:] = [signal.Signals(number).name]
        if number == signal.SIGINT:
            if again:
                _unseen.clear()
                raise KeyboardInterrupt
            # Not `print`, which a signal handler may have interrupted.
            os.write(2, b"m3po: stopping as soon as that is safe; press Ctrl-C again to stop at once\n")

    _unseen.clear()
    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
        if _unseen:
            raise Interrupted(f"stopped by {_unseen[0]}; what is finished is saved")
    finally:
        _unseen.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)
