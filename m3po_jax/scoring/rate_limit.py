"""How fast a server may be asked: requests and tokens a minute, and the pauses that it asks for."""

from __future__ import annotations

import email.utils
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime


class Halted(Exception):
    """Another request has ended the run."""


class RateLimit:
    """Spaces requests out so that no minute has more of them, or more tokens, than allowed; for many threads.

    Args:
        requests: A minute; 0: no limit.
        tokens: A minute; 0: no limit.
        wait: Sleeps for some seconds.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        requests: float,
        tokens: float,
        *,
        wait: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.request_gap = 60.0 / requests if requests else 0.0
        self.token_gap = 60.0 / tokens if tokens else 0.0
        self._wait, self._clock, self._lock = wait, clock, threading.Lock()
        self._next_request = self._next_token = self._paused_until = 0.0

    def acquire(self, tokens: float) -> None:
        """Returns when a request of about so many tokens may be sent."""
        with self._lock:
            at = max(self._clock(), self._next_request, self._next_token, self._paused_until)
            self._next_request, self._next_token = at + self.request_gap, at + tokens * self.token_gap
        while (left := max(at, self._paused_until) - self._clock()) > 0:
            self._wait(left)

    def settle(self, expected: float, actual: float) -> None:
        """Corrects what `acquire` was told by what the request has used."""
        with self._lock:
            self._next_token += (actual - expected) * self.token_gap

    def pause(self, seconds: float) -> None:
        """No request for so long: the server asked for it."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else max(0.0, seconds)
