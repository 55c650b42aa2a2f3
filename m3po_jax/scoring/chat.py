"""A client of OpenAI-compatible servers: one chat completion, with rate limits, retries and time-outs.

The key travels in one header and nowhere else. Whatever a server says is cleared of it before it enters an error, a
reason or an answer, because servers like to quote the key that they refuse.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from m3po_jax.config import EndpointConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
DENIED = frozenset({401, 402, 403, 404, 405})  # no other request would fare better
LONGEST_WAIT_S = 60.0  # between retries, where the server names no time
LONGEST_RETRY_AFTER_S = 600.0
MAX_RESPONSE_BYTES = 4_000_000
MALFORMED = "malformed_response"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Unusable(Exception):
    """This request has no usable answer; another one may have. `reason` goes to the score row."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Halted(Exception):
    """Another request has ended the run."""


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        content: The answer's text.
        tokens: Its tokens, each with the log-probs of the likeliest ones; empty where they were not asked for.
    """

    content: str
    tokens: tuple[tuple[str, dict[str, float]], ...]
    prompt_tokens: int
    completion_tokens: int


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
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
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
            wait: float | None = None
            try:
                status, headers, data = self._post(body)
            except self._http.TimeoutException:
                failure = "time-out"
            except self._http.RequestError as error:
                failure = f"no connection ({type(error).__name__})"
            else:
                if status == 200:
                    reply = self._parse(data)
                    self.limit.settle(expected_tokens, reply.prompt_tokens + reply.completion_tokens)
                    return reply
                failure = f"status {status}"
                if status in DENIED:
                    raise UserError(
                        f"the server answers {failure}{self._message(data)}",
                        where="score.endpoint",
                        remedy="check base_url, model and the key; paid answers are kept",
                    )
                if status not in RETRIED:
                    raise Unusable(f"refused_{status}", self._message(data))
                wait = retry_after(headers.get("retry-after"))
                if wait is not None:
                    self._heed(wait)
            if attempt < self.config.max_retries:
                with self._lock:
                    self.retries += 1
                    factor = self._jitter.uniform(0.5, 1.0)
                if wait is None:
                    self._pause(min(self.config.retry_wait_s * 2**attempt, LONGEST_WAIT_S) * factor)
        raise Unusable("no_answer", failure)

    def _heed(self, seconds: float) -> None:
        if seconds > LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the server asks to wait for {seconds:.0f} s",
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
            for part in response.iter_bytes():
                size += len(part)
                parts.append(part)
                if size > MAX_RESPONSE_BYTES:
                    raise Unusable(MALFORMED, f"more than {MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise self._http.ReadTimeout("the response takes too long")
            return response.status_code, response.headers, b"".join(parts)

    def _parse(self, data: bytes) -> Reply:
        try:
            value = json.loads(data)
            choice = value["choices"][0]
            content = choice["message"].get("content")
            if not isinstance(content, str):  # null: a refusal, or all tokens went into reasoning
                content = ""
            usage = value.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if min(counts) < 0:
                raise ValueError("negative usage")
            tokens = _tokens(choice.get("logprobs"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise Unusable(MALFORMED, type(error).__name__) from None
        return Reply(self.clean(content), tokens, *counts)

    def _message(self, data: bytes) -> str:
        """What the server says about a failure, in brief and without the key."""
        try:
            value = json.loads(data)
            text = value["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = data[:400].decode("utf-8", "replace")
        brief = " ".join(self.clean(str(text)).split())[:200]
        return f" ({brief})" if any(letter.isalnum() for letter in brief) else ""


def _tokens(logprobs: Any) -> tuple[tuple[str, dict[str, float]], ...]:
    """Tokens and the log-probs of their rivals, as the chat completions interface gives them."""
    if not logprobs or not logprobs.get("content"):
        return ()
    return tuple(
        (str(entry["token"]), {str(top["token"]): float(top["logprob"]) for top in entry.get("top_logprobs") or ()})
        for entry in logprobs["content"]
    )


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else max(0.0, seconds)
