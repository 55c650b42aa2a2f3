"""On several hosts: a process that stays behind when JAX's runtime ends the one that works.

When a host is lost, the runtime of every other one prints pages of its own and aborts; nothing in the process can
stop it. So a command that runs on several hosts works in a child. The parent passes signals on to it and its messages
to the terminal, keeps back what the runtime prints as it dies, and ends with one line and the status on which
launchers start a command again. It never imports JAX.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator

from m3po_jax.errors import EXIT_INTERRUPTED

HEARTBEAT_SECONDS = 30  # after which a silent host counts as lost
_PR_SET_PDEATHSIG = 1
_LOST = "another host is gone; what is finished is saved"
# Lines of the runtime about other hosts; behind the first error among them comes nothing but its dump.
_CHATTER = re.compile(rb"\[Gloo\] Rank |[IWEF]\d{4} [\d:.]+ .*(preemption_|coordination_service|client\.h:)")
_DUMP = re.compile(rb"[EF]\d{4} [\d:.]+ .*(coordination_service|client\.h:)")
_FAILED_COLLECTIVE = re.compile(
    r"gloo .*failed|coordination.?service|heartbeat|connection (reset|closed) by peer|socket closed"
    r"|nccl.*(abort|remote)|barrier (timed out|failed)|deadline_exceeded|unavailable:",
    re.IGNORECASE,
)


def runs_on_several_hosts() -> bool:
    """Whether a launcher has said that this process is one of several."""
    return bool(os.environ.get("M3PO_COORDINATOR")) or os.environ.get("M3PO_MULTI_HOST") == "1"


def is_lost_host(error: Exception) -> bool:
    """Whether an exception of JAX's says that another host does not answer any more."""
    return not isinstance(error, (AssertionError, ImportError)) and bool(_FAILED_COLLECTIVE.search(str(error)))


def leave_after(error: Exception) -> None:
    """Ends the worker in which a collective operation failed; its clean-up would wait for the host that is gone."""
    if _verbose():
        print(error, file=sys.stderr)
    _tell_lost()
    os._exit(EXIT_INTERRUPTED)


def _verbose() -> bool:
    return os.environ.get("M3PO_VERBOSE") == "1"


def _tell_lost() -> None:
    hint = "" if _verbose() else " (M3PO_VERBOSE=1 shows what JAX says of it)"
    print(f"m3po: {_LOST}{hint}; the same command continues", file=sys.stderr, flush=True)


def stay_behind() -> int | None:
    """Forks a worker: None in the worker, which goes on; in the parent, once it has ended, the exit status."""
    read_end, write_end = os.pipe()
    parent = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes from the parent alone, and so counts once
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent takes the worker along
        if os.getppid() != parent:
            os._exit(EXIT_INTERRUPTED)
        os.dup2(write_end, 2)
        os.close(read_end)
        os.close(write_end)
        return None
    os.close(write_end)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(worker, number))
    dumped = False
    for line in _lines(read_end):
        dumped = dumped or bool(_DUMP.match(line))
        if _verbose() or line.startswith(b"m3po: ") or not (dumped or _CHATTER.match(line)):
            os.write(2, line)
    os.close(read_end)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if status == -signal.SIGABRT and dumped:
        _tell_lost()
        return EXIT_INTERRUPTED
    if status < 0:
        print(f"m3po: the worker was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
        return 128 - status
    return status


def _lines(source: int) -> Iterator[bytes]:
    """Whole lines of a pipe as they come, and what is left at its end."""
    rest = b""
    while data := os.read(source, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest
