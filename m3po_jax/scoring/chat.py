"""One chat completion from an OpenAI-compatible server, through OpenAI's own client.

That client retries with growing waits and keeps time-outs. What it sends and receives passes through a connection
that knows the rest: the rate limits, how large a response may be, and the errors that servers hide inside a success.

The key travels in one header and nowhere else. Whatever a server says is cleared of it before it enters an error, a
reason or an answer, because servers like to quote the key that they refuse.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import openai

from m3po_jax.config import EndpointConfig
from m3po_jax.errors import UserError
from m3po_jax.scoring.endpoint_settings import check_endpoint, read_key
from m3po_jax.scoring.rate_limit import Halted, RateLimit, retry_after
from m3po_jax.scoring.reasons import MALFORMED, NO_ANSWER
from m3po_jax.scoring.responses import Denied, Passing, Reply, Unusable, brief, read_response

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # as OpenAI's client waits
LONGEST_RETRY_AFTER_S = 600.0
MAX_RESPONSE_BYTES = 4_000_000
_EXPECTED_TOKENS = "x-expected-tokens"  # between the two classes, never sent
# What OpenAI's client would tell of this machine and of its user's account at OpenAI.
_UNTOLD = ("authorization", "openai-", "x-stainless-")
_RETRY_COUNT = "x-stainless-retry-count"  # of OpenAI's client


class ChatClient:
    """Sends chat completions; safe to use from several threads.

    Args:
        halt: Once set, waiting requests raise `Halted`.

    Raises:
        UserError: settings that cannot be meant, or no key in the environment.
    """

    def __init__(self, config: EndpointConfig, *, halt: threading.Event):
        check_endpoint(config)
        self.halt = halt
        self.url = config.base_url.rstrip("/") + "/chat/completions"
        self._connection = _Connection(config, read_key(config), self._wait)
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key="none",  # the connection has it
            max_retries=config.max_retries,
            timeout=config.timeout_s,
            http_client=self._connection,
        )

    @property
    def retries(self) -> int:
        """Requests that were sent once more."""
        return self._connection.retries

    def close(self) -> None:
        self._client.close()

    def _wait(self, seconds: float) -> None:
        if self.halt.wait(seconds):
            raise Halted

    def back_off(self, attempt: int) -> None:
        """Waits before a question whose answer was unreadable is asked again: twice as long each time."""
        self._wait(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S))

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
        headers = {_EXPECTED_TOKENS: str(expected_tokens)}
        try:
            response = self._client.post(
                "/chat/completions", cast_to=httpx2.Response, body=dict(body), options={"headers": headers}
            )
        except openai.APIStatusError as error:
            raise Unusable(NO_ANSWER, error.response.extensions["failure"]) from None
        except openai.APITimeoutError:
            raise Unusable(NO_ANSWER, "time-out") from None
        except openai.APIConnectionError as error:
            raise Unusable(NO_ANSWER, f"no connection ({type(error.__cause__).__name__})") from None
        return response.extensions["reply"]


class _Connection(httpx2.Client):
    """Sends one request and reads its response, for OpenAI's client, which sends again where that may help.

    Args:
        key: Empty where the server needs none.
        wait: Sleeps for some seconds, or raises `Halted`.
    """

    def __init__(self, config: EndpointConfig, key: str, wait: Callable[[float], object]):
        super().__init__(
            timeout=config.timeout_s,
            follow_redirects=False,  # a redirect would carry the key to another host
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        self.limit = RateLimit(config.requests_per_minute, config.tokens_per_minute, wait=wait)
        self.retries = 0
        self._key, self._seconds, self._wait, self._lock = key, config.timeout_s, wait, threading.Lock()

    def _clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """A success with the `Reply` as extension ``reply``, or a status that passes with its words as ``failure``.

        Raises:
            Unusable, UserError: sending it again would not help.
            Halted: the run ends.
        """
        tokens = float(request.headers.pop(_EXPECTED_TOKENS))
        with self._lock:
            self.retries += int(request.headers.get(_RETRY_COUNT, 0)) > 0
        for name in [
            name for name in request.headers if name.startswith(("authorization", "openai-", "x-stainless-"))
        ]:
            del request.headers[name]  # what OpenAI's client tells of this machine and its user's account
        request.headers["Accept-Encoding"] = "identity"
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        self._wait(0)
        self.limit.acquire(tokens)
        response = super().send(request, **{**options, "stream": True})
        status, headers = response.status_code, response.headers
        try:
            reply = read_response(status, self._read(response), self._clean)
        except Denied as error:
            place = brief(self._clean(headers.get("location", "")))
            raise UserError(
                f"the server answers {error}" + (f", a redirect to {place}" if place else ""),
                where="score.endpoint",
                remedy="check base_url, model and the key; paid answers are kept",
            ) from None
        except Passing as error:
            self._heed(headers.get("retry-after"), str(error))
            again, failure = {"x-should-retry": "true"}, {"failure": str(error)}
            status = status if status >= 400 else 503  # it stood inside a success
            return httpx2.Response(status, headers=again, extensions=failure, request=request)
        used = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
        self.limit.settle(tokens, used or tokens)
        return httpx2.Response(200, extensions={"reply": reply}, request=request)

    def _read(self, response: httpx2.Response) -> bytes:
        """At most `MAX_RESPONSE_BYTES` of the body, in at most the time-out altogether."""
        deadline, data = time.monotonic() + self._seconds, b""
        try:
            for part in response.iter_bytes():
                data += part
                if len(data) > MAX_RESPONSE_BYTES:
                    if response.status_code != 200:
                        break  # how a failure is told is not worth more
                    raise Unusable(MALFORMED, f"more than {MAX_RESPONSE_BYTES} bytes", paid=True)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the response takes too long")
        except httpx2.DecodingError:
            raise Unusable(MALFORMED, "packed as nobody asked, and damaged", paid=True) from None
        finally:
            response.close()
        return data

    def _heed(self, header: str | None, failure: str) -> None:
        """Keeps all requests back for as long as the server asks."""
        seconds = retry_after(header)
        if seconds is None:
            return
        if seconds > LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the server answers {failure} and asks to wait for {seconds:.0f} s",
                where="score.endpoint",
                remedy="run the same command later; paid answers are kept",
            )
        self.limit.pause(seconds)
