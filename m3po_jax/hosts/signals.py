"""Stopping on a signal: noticed between steps, agreed on by all hosts, and never forgotten.

A stage looks for the signal between two pieces of its work. One that arrives after the stage's last look belongs to
whatever comes next: on one host it is raised again on leaving the stage, so that whoever listened before (a stage
around this one, the command line, Python itself) hears of it. On several hosts, where a process that left alone
would keep the others waiting, the next stage's first look finds it, and all of them stop there together.

Between two stages the command line listens with `noted`, and the next look finds what it noted. It raises nothing by
itself: an exception out of nowhere is taken for something else by the library that it happens in (a configuration
that cannot be read, say), or swallowed whole (in a callback of the garbage collector).

A second Ctrl-C does not wait for anything: a thread hears of signals even while the main one compiles or computes,
and ends the process there and then, as a kill would. Files appear whole or not at all, so that nothing is lost but
the work since the last of them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import jax
import numpy as np

from m3po_jax.errors import EXIT_INTERRUPTED, Interrupted
from m3po_jax.hosts.agreement import gathered

T = TypeVar("T")
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
        return bool(gathered(np.array(self.received is not None)).any())

    def check(self, when: str) -> None:
        """
        Raises:
            Interrupted: any host was told to stop.
        """
        if self.any_host():
            raise Interrupted(f"stopped by {self.received or 'another host'} {when}")


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
        number = signal.Signals[stop.received]
        handler = previous[number]
        if callable(handler):
            handler(number, None)  # not raised again: it would count as a second Ctrl-C
        else:
            signal.raise_signal(number)
    else:
        _unseen[:] = [stop.received]


def stoppable(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields `items` until SIGTERM or SIGINT arrives; every host stops before the same item.

    Raises:
        Interrupted: between two items, so that what was written stays whole.
    """
    with stop_signal() as stop:
        for item in items:
            stop.check(f"while {what}; finished shards are saved")
            yield item


def stop_if_signalled(what: str) -> None:
    """Stops here if a signal has arrived since the last look, on all hosts together.

    Raises:
        Interrupted: before `what` has begun.
    """
    with stop_signal() as stop:
        stop.check(f"before {what}; what is finished is saved")


@contextmanager
def noted() -> Iterator[None]:
    """SIGTERM and SIGINT between stages wait for the next look while the block runs; a second SIGINT ends it all.

    A signal that no look has seen when the block ends is raised there.

    Raises:
        Interrupted: at the block's end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _unseen[:] = [signal.Signals(number).name]

    _unseen.clear()
    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        with _second_interrupt_ends():
            yield
        if _unseen:
            raise Interrupted(f"stopped by {_unseen[0]}; what is finished is saved")
    finally:
        _unseen.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """Answers SIGINT at once, whatever the main thread is busy with: the first with a word, the second by ending."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # The interpreter writes the number of each signal there as it arrives, before any handler of Python's can run.
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_interrupts, args=(read_end,), name="interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)
        watcher.join()
        os.close(read_end)


def _watch_interrupts(read_end: int) -> None:
    interrupts = 0
    while numbers := os.read(read_end, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            interrupts += 1
            if interrupts == 1:
                os.write(2, b"m3po: stopping as soon as that is safe; press Ctrl-C again to stop at once\n")
            else:
                _end_now()


def _end_now() -> None:
    """Ends this process without any of its clean-up, which could wait for a step, a compiler or another host."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, show_cursor + b"m3po: stopped at once; what is finished is saved; the same command continues\n")
    os._exit(EXIT_INTERRUPTED)
