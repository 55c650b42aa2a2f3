"""A signal that arrives after a stage's last look is acted on by whoever comes next; none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import pytest

from m3po_jax import cli
from m3po_jax.errors import Interrupted
from m3po_jax.hosts import signals
from m3po_jax.hosts.signals import noted, stop_if_signalled, stop_signal, stoppable

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own answer to SIGINT, which it leaves out where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tell(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_after_the_last_look_reaches_whoever_listened_before(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with stop_signal():
            tell(number)
            assert heard == []
        assert heard == [number]
        with stop_signal() as stop:
            assert stop.received is None, "it was handed on, so a later stage must not stop for it again"
    finally:
        signal.signal(number, before)


def test_an_inner_block_hands_its_signal_to_the_outer_one() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM while testing"):
        for item in stoppable([1, 2, 3], "testing"):
            assert item == 1
            with stop_signal():
                tell(signal.SIGTERM)


def test_a_block_that_stopped_for_its_signal_does_not_raise_it_again() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted):
        for _ in stoppable([1, 2], "testing"):
            tell(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_other_threads_catch_nothing() -> None:
    found: list[str | None] = []

    def work() -> None:
        with stop_signal() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_on_several_hosts_the_next_stage_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that left alone would keep the others waiting: it waits for their next common look."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with stop_signal():
        tell(signal.SIGTERM)
    with stop_signal() as stop:
        assert stop.received == "SIGTERM"
    with pytest.raises(Interrupted), stop_signal() as stop:
        assert stop.received == "SIGTERM", "a stage that has not looked hands it on again"
        raise Interrupted("all stop")
    with stop_signal() as stop:
        assert stop.received is None


@BOTH
def test_the_command_ends_with_75_where_the_last_piece_was_told(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stage's work is whole, and what would follow it does not start."""
    from m3po_jax.pipeline import verbs

    done: list[str] = []

    def run(options: object) -> None:
        for item in stoppable(["first", "last"], "testing"):
            done.append(item)
            if item == "last":
                tell(number)
        stop_if_signalled("the next stage")
        done.append("the next stage")

    monkeypatch.setattr(verbs, "run", run)
    assert cli.main(["run", "--config", "quickstart.yaml"]) == cli.EXIT_INTERRUPTED
    assert done == ["first", "last"]
    told = capfd.readouterr().err
    assert f"stopped by {number.name} before the next stage; what is finished is saved; the same command" in told
    assert ("Ctrl-C again" in told) == (number == signal.SIGINT)
    assert signals._unseen == []


def test_a_signal_between_stages_disturbs_nothing_and_is_not_lost() -> None:
    """An exception out of a handler would be swallowed in a finalizer, and taken for another one in a library."""

    class Finalized:
        def __del__(self) -> None:
            tell(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM before scoring"), noted():
        held = Finalized()
        del held
        stop_if_signalled("scoring")
        pytest.fail("the look must stop here")
    assert signals._unseen == []


def test_a_signal_that_no_look_has_seen_is_raised_at_the_end() -> None:
    """Work that is whole, but the script that called for it must not go on to the next command."""
    finished: list[bool] = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM; what is finished is saved"), noted():
        tell(signal.SIGTERM)
        finished.append(True)
    assert finished and signals._unseen == []


# In C for a minute, where no handler of Python's runs, as in XLA's compiler.
BUSY = """
import ctypes, signal
from m3po_jax.hosts.signals import noted, stop_signal

signal.signal(signal.SIGINT, signal.default_int_handler)
wait = ctypes.CDLL(None).clock_nanosleep
until = (ctypes.c_long * 2)(60, 0)
with noted(), stop_signal():
    print("busy", flush=True)
    while wait(1, 0, until, until):  # begins again where a signal has ended it
        pass
"""


def test_a_second_interrupt_ends_a_stage_that_is_deep_in_the_compiler() -> None:
    """The main thread runs no Python for a minute; the process ends at once, with the status of a stopped run."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one waits"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == cli.EXIT_INTERRUPTED and time.monotonic() - started < 10
    assert "press Ctrl-C again to stop at once" in told and "stopped at once; what is finished is saved" in told


def test_other_verbs_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of theirs looks for a signal."""
    from m3po_jax.pipeline import verbs

    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setattr(verbs, "report", lambda options: tell(signal.SIGTERM))
        assert cli.main(["report", "--config", "quickstart.yaml"]) == 0
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
