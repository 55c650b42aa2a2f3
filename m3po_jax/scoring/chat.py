"""A client of OpenAI-compatible servers: one chat completion, with rate limits, retries and time-outs.

The key travels in one header and nowhere else. Whatever a server says is cleared of it before it enters an error, a
reason or an answer, because servers like to quote the key that they refuse.
"""

from __future__ import annotations

import email.utils
import ipaddress
import math
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from m3po_jax.config import EndpointConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values
from m3po_jax.scoring.reasons import MALFORMED, NO_ANSWER
from m3po_jax.scoring.responses import Denied, Passing, Reply, Unusable, brief, read_response

LONGEST_WAIT_S = 60.0  # between retries, where the server names no time
LONGEST_RETRY_AFTER_S = 600.0
MAX_RESPONSE_BYTES = 4_000_000
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Halted(Exception):
    """Another request has ended the run."""


def check_endpoint(config: EndpointConfig) -> None:
    """UserError where the settings cannot be meant; no error shows what may be a secret."""
    where = "score.endpoint"
    if config.api_key_env and not _VARIABLE.fullmatch(config.api_key_env):
        raise UserError(
            "not the name of an environment variable",
            where=f"{where}.api_key_env",
            remedy="name the variable; the key itself must not stand in a recipe",
        )
    url, place = urlsplit(config.base_url), f"{where}.base_url"
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise UserError(
            "has credentials, a query or a fragment", where=place, remedy="the key comes from api_key_env alone"
        )
    try:
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise UserError(
            f"not the address of a server: {config.base_url!r}", where=place, remedy="such as https://host/v1"
        )
    if (
        url.scheme == "http"
        and config.api_key_env
        and not config.allow_insecure
        and not _is_local(url.hostname or "")
    ):
        raise UserError(
            "would send the key unencrypted to another machine",
            where=place,
            remedy="use https, or set score.endpoint.allow_insecure=true in a network of your own",
        )
    if not config.model:
        raise UserError("no model", where=f"{where}.model", remedy="the server's name for the judge")
    check_values(config, where)
    for name, value, what in (("stream", True, "answers in pieces"), ("n", None, "several answers")):
        if name in config.extra_body and config.extra_body[name] not in ((False, None) if value else (1, None)):
            raise UserError(
                f"asks for {what}; one whole answer is read",
                where=f"{where}.extra_body.{name}",
                remedy="leave it out",
            )
    if config.max_cost is not None and not config.prompt_price + config.completion_price > 0:
        raise UserError(
            "a limit without prices", where=f"{where}.max_cost", remedy="set prompt_price and completion_price"
        )


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(config: EndpointConfig) -> str:
    """The key from its environment variable; empty where none is named.

    Raises:
        UserError: the variable is absent, or holds what no header can carry.
    """
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.api_key_env} is not set",
            where="score.endpoint.api_key_env",
            remedy="export it in the shell that starts the run",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"the environment variable {config.api_key_env} does not hold a key", where="score.endpoint.api_key_env"
        )
    return key


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


class ChatClient:
    """Sends chat completions; safe to use from several threads.

    Args:
        halt: Once set, waiting requests raise `Halted`.
        seed: Of the jitter.
    """

    def __init__(self, config: EndpointConfig, *, halt: threading.Event, seed: int = 0):
        try:
            import httpx2
        except ImportError:
            raise UserError(
                "the endpoint backend needs an HTTP client",
                where="score.backend",
                remedy="pip install 'm3po-jax[judge]'",
            ) from None
        check_endpoint(config)
        self._http, self.config, self.halt = httpx2, config, halt
        self._key = read_key(config)
        # Not packed, so that a response's size is what arrives.
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout_s),
            follow_redirects=False,  # a redirect would carry the key to another host
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        self.url = config.base_url.rstrip("/") + "/chat/completions"
        self.limit = RateLimit(config.requests_per_minute, config.tokens_per_minute, wait=self._pause)
        self.retries = 0
        self._jitter, self._lock = random.Random(seed), threading.Lock()

    def close(self) -> None:
        self._client.close()

    def clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    def _pause(self, seconds: float) -> None:
        if self.halt.wait(seconds):
            raise Halted

    def complete(self, body: Mapping[str, Any], expected_tokens: float) -> Reply:
        """One chat completion; waits for the rate limit and retries what may pass.

        Args:
            body: Of the request, as JSON.
            expected_tokens: For the limit of tokens a minute.

        Raises:
            Unusable: no answer after all retries, a refused request, or a response that is no chat completion.
            UserError: the server denies access, or asks to wait for very long.
            Halted: `halt` was set meanwhile.
        """
        failure = "time-out"
        for attempt in range(self.config.max_retries + 1):
            if self.halt.is_set():
                raise Halted
            self.limit.acquire(expected_tokens)
            try:
                status, headers, data = self._post(body)
                reply = read_response(status, data, self.clean)
            except self._http.TimeoutException:
                failure = "time-out"
            except self._http.RequestError as error:
                failure = f"no connection ({type(error).__name__})"
            except Denied as error:
                place = brief(self.clean(headers.get("location", "")))
                raise UserError(
                    f"the server answers {error}" + (f", a redirect to {place}" if place else ""),
                    where="score.endpoint",
                    remedy="check base_url, model and the key; paid answers are kept",
                ) from None
            except Passing as error:
                failure = str(error)
                self._heed(headers, failure)
            else:
                used = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
                self.limit.settle(expected_tokens, used or expected_tokens)
                return reply
            if attempt < self.config.max_retries:
                with self._lock:
                    self.retries += 1
                self.back_off(attempt)
        raise Unusable(NO_ANSWER, failure)

    def back_off(self, attempt: int) -> None:
        """Waits before a request is sent again: twice as long each time, with jitter."""
        with self._lock:
            factor = self._jitter.uniform(0.5, 1.0)
        self._pause(min(self.config.retry_wait_s * 2 ** min(attempt, 20), LONGEST_WAIT_S) * factor)

    def _heed(self, headers: Mapping[str, str], failure: str) -> None:
        """Keeps all requests back for as long as the server asks."""
        seconds = retry_after(headers.get("retry-after"))
        if seconds is None:
            return
        if seconds > LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the server answers {failure} and asks to wait for {seconds:.0f} s",
                where="score.endpoint",
                remedy="run the same command later; paid answers are kept",
            )
        self.limit.pause(seconds)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and at most `MAX_RESPONSE_BYTES` of the body, in at most `timeout_s` altogether."""
        deadline = time.monotonic() + self.config.timeout_s
        parts: list[bytes] = []
        with self._client.stream("POST", self.url, json=dict(body)) as response:
            size = 0
            for part in response.iter_raw():
                size += len(part)
                parts.append(part)
                if size > MAX_RESPONSE_BYTES:
                    if response.status_code != 200:
                        break  # how a failure is told is not worth more
                    raise Unusable(MALFORMED, f"more than {MAX_RESPONSE_BYTES} bytes", paid=True)
                if time.monotonic() > deadline:
                    raise self._http.ReadTimeout("the response takes too long")
            data = unpacked(b"".join(parts), response.headers.get("content-encoding", ""))
            return response.status_code, response.headers, data


def unpacked(data: bytes, encoding: str) -> bytes:
    """A body as it was before a server packed it, at most `MAX_RESPONSE_BYTES` long, though nobody asked for packing.

    Raises:
        Unusable: another encoding than gzip and deflate, a damaged body, or one that unpacks to more.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return data
    if name not in ("gzip", "x-gzip", "deflate"):
        raise Unusable(MALFORMED, f"an encoding that was not asked for ({brief(name)})", paid=True)
    unpacker = zlib.decompressobj(wbits=47)  # reads the header of either
    try:
        result = unpacker.decompress(data, MAX_RESPONSE_BYTES)
    except zlib.error:
        raise Unusable(MALFORMED, f"damaged {name}", paid=True) from None
    if unpacker.unconsumed_tail:
        raise Unusable(MALFORMED, f"unpacks to more than {MAX_RESPONSE_BYTES} bytes", paid=True)
    return result


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
