"""The process that stays behind: what it passes on, what it keeps back, and the statuses that it ends with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from m3po_jax.errors import EXIT_INTERRUPTED
from m3po_jax.hosts.supervisor import is_lost_host

STAY = """
import os, signal, sys, time
from m3po_jax.hosts.supervisor import stay_behind

status = stay_behind()
if status is not None:
    print(f"parent {status}", flush=True)
    sys.exit(status)
print(f"worker {os.getpid()}", flush=True)
"""
# As the runtime writes it when the host that coordinates is killed.
DUMP = """
os.write(2, b"[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\\n")
os.write(2, b"a line of ours\\n")
os.write(2, b"W1125 20:31:56.29 3724 preemption_sync_manager.cc:147] Failed to retrieve preemption notice\\n")
os.write(2, b"F1125 20:31:56.293545 3724 client.h:80] Terminating process because the JAX distributed service\\n")
os.write(2, b"\\nRPC: /xla.coordination.CoordinationService/PollForError\\n")
os.write(2, b"*** Check failure stack trace: ***\\n    @ 0x7f\\n")
os.abort()
"""


def start(work: str, **variables: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", STAY + work], stdout=pipe, stderr=pipe, text=True, env=variables)


def test_an_abort_of_the_runtime_becomes_one_line_and_the_status_of_a_stopped_run() -> None:
    process = start(DUMP)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED and told.splitlines()[1:] == [f"parent {EXIT_INTERRUPTED}"]
    assert errors.splitlines() == [
        "a line of ours",
        "m3po: another host is gone; what is finished is saved (M3PO_VERBOSE=1 shows what JAX says of it); "
        "the same command continues",
    ]
    assert "Check failure" in start(DUMP, M3PO_VERBOSE="1").communicate(timeout=60)[1]


@pytest.mark.parametrize(("work", "status"), [("sys.exit(2)", 2), ("", 0), ("1 / 0", 1), ("os.abort()", 134)])
def test_any_other_end_keeps_its_status(work: str, status: int) -> None:
    """An abort of which the runtime says nothing is a defect, and not repeated for ever."""
    process = start(work)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("ZeroDivisionError" in errors) == (status == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_worker(number: signal.Signals) -> None:
    wait = "signal.signal(int(os.environ['N']), lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    process = start(wait, N=str(int(number)))
    assert process.stdout is not None and process.stdout.readline().startswith("worker")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_killed_parent_takes_the_worker_along() -> None:
    process = start("time.sleep(60)")
    assert process.stdout is not None
    worker = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{worker}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_errors_that_tell_of_a_lost_host_are_known_from_others() -> None:
    lost = "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Connection reset by peer"
    assert is_lost_host(ValueError(lost))
    assert is_lost_host(RuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: orbax"))
    for other in ("Out of memory allocating 12 bytes", "Incompatible shapes for dot: (3, 4) and (5, 6)", ""):
        assert not is_lost_host(ValueError(other))
