"""Any OpenAI-compatible server as judge: a graded rubric about one image and one answer (METHOD section 3)."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from m3po_jax.config import EndpointConfig
from m3po_jax.data import schema
from m3po_jax.data.images import decode, picture_hash, read_encoded
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.scoring.alignment import NO_IMAGE, NO_REFERENCE, Judged, Scores
from m3po_jax.scoring.answer_cache import AnswerCache
from m3po_jax.scoring.chat import MALFORMED, ChatClient, Halted, Reply, Unusable
from m3po_jax.scoring.grading import check_rubric, render_rubric

NO_GRADE = "no_grade"
UNUSABLE_IN_A_ROW = 20  # then the server, not a request, is at fault
REPORT_SECONDS = 30.0
TOKENS_OF_AN_IMAGE = 1_000  # a first guess, until the server has told
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")


class Stop(Protocol):
    """Whether a signal to stop has arrived, and which."""

    received: str | None


@contextmanager
def _never() -> Iterator[Stop]:
    class Silent:
        received: str | None = None

    yield Silent()


def parse_grade(text: str, grades: Sequence[int]) -> float | None:
    """The grade that a text gives, None where it gives none or several.

    A JSON object with ``grade``, ``score`` or ``rating``, or a text in which one number stands that lies between the
    worst and the best grade; "4/5" and "4 out of 5" are 4.
    """
    low, high = grades[0], grades[-1]
    stripped = text.strip().removeprefix("```json").strip("`").strip()
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = next((value[name] for name in ("grade", "score", "rating") if name in value), None)
        stripped = str(value)
    stripped = re.sub(rf"\s*(?:/|\bout of\b)\s*{high}(?![\d.]*\d)", " ", stripped)
    found = {float(number) for number in _NUMBER.findall(stripped)}
    grade = found.pop() if len(found) == 1 else math.nan
    return grade if low <= grade <= high else None


def expected_grade(reply: Reply, grades: Sequence[int]) -> float | None:
    """The mean of the grades under the log-probs of the first token that is a grade, None without such a token."""
    names = {str(grade): grade for grade in grades}
    for token, rivals in reply.tokens:
        if token.strip() in names:
            weights: dict[int, float] = {}
            for rival, log_prob in rivals.items():
                if (name := rival.strip()) in names:
                    weights[names[name]] = weights.get(names[name], 0.0) + math.exp(min(log_prob, 0.0))
            total = sum(weights.values())
            return sum(grade * weight for grade, weight in weights.items()) / total if total > 0 else None
    return None


@dataclasses.dataclass
class Picture:
    """One image as a server gets it: a JPEG of bounded size, encoded when it is first needed."""

    encoded: bytes
    where: str
    max_side: int
    max_pixels: int
    _url: str = ""

    @property
    def digest(self) -> str:
        """Stands for the image in a cache key: of the original, so that an encoder's update pays nothing again."""
        return f"sha256:{picture_hash(self.encoded)}@{self.max_side}"

    @property
    def url(self) -> str:
        if not self._url:
            image = decode(
                schema.Image(bytes=self.encoded), root=Path(), max_pixels=self.max_pixels, where=self.where
            )
            image.thumbnail((self.max_side, self.max_side), PILImage.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=90)
            self._url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        return self._url


class Endpoint:
    """Asks a server for a grade of every answer: score = (grade − lowest) / (highest − lowest).

    Requests run side by side, within the configured rates. An answer without one clear grade is asked for again,
    with a reminder, `max_reasks` times; then the candidate has no score. Every paid answer is cached under a hash of
    its request before it is used, and found there by the next run of the same command.

    Args:
        config: The server, limits and prices.
        rubric: See `grading.Judge`.
        grades: Ascending integers.
        image_root: Folder that image paths are relative to.
        cache: Folder of paid answers; may be shared.
        run: Tells this run's spending from others'.
        max_image_pixels: Larger images are refused before they are decoded.
        stopping: A context that watches for a signal to stop; its value says which one was received.
        report: Gets a line about the progress of long work now and then.

    Raises:
        UserError: settings that cannot be meant, or no key in the environment.
    """

    name = "endpoint"

    def __init__(
        self,
        config: EndpointConfig,
        *,
        rubric: str = "",
        grades: Sequence[int] = (1, 2, 3, 4, 5),
        image_root: Path = Path(),
        cache: Path,
        run: str,
        max_image_pixels: int = 50_000_000,
        stopping: Callable[[], AbstractContextManager[Stop]] = _never,
        report: Callable[[str], object] = lambda line: None,
    ):
        check_rubric(rubric, grades)
        self.config, self.rubric, self.grades = config, rubric, list(grades)
        self.needs_reference = "{reference}" in rubric
        self.image_root, self.max_image_pixels, self.stopping = image_root, max_image_pixels, stopping
        self.report = report
        self.halt = threading.Event()
        self.client = ChatClient(config, halt=self.halt)
        self.cache = AnswerCache(cache, run)
        self.hits = self.reasks = 0
        self._lock = threading.Condition()
        self._failure: BaseException | None = None
        self._in_a_row = self._in_flight = 0
        self._dearest = self._tokens = 0.0  # the largest cost of one request, and its usual tokens

    def usage(self) -> dict[str, Any]:
        """What this run has paid for, by earlier commands too; hits, retries and re-asks are of this command."""
        return {
            "judge": self.config.model,
            "server": self.config.base_url,
            **self.cache.spent,
            "cost": round(self.cache.spent["cost"], 6),
            "from_cache": self.hits,
            "retries": self.client.retries,
            "reasks": self.reasks,
        }

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return self.judged(prompts, pools).scores

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        """Scores, and why a candidate has none.

        Raises:
            UserError: the server denies access or has stopped giving usable answers, or `max_cost` is reached.
            Interrupted: a signal arrived. Whatever was answered is cached in any case.
        """
        scores: Scores = [np.full(len(pool), np.nan) for pool in pools]
        reasons: list[list[str | None]] = [[None] * len(pool) for pool in pools]
        tasks: dict[tuple[int, str], tuple[Prompt, list[Picture], str]] = {}
        for index, (prompt, pool) in enumerate(zip(prompts, pools, strict=True)):
            why = NO_IMAGE if not prompt.images else None
            if why is None and self.needs_reference and not prompt.reference:
                why = NO_REFERENCE
            if why is not None:
                reasons[index] = [why] * len(pool)
                continue
            pictures = self._pictures(prompt)
            tasks |= {(index, answer): (prompt, pictures, answer) for answer in pool}
        found = self._run(tasks)
        for (index, answer), outcome in found.items():
            for k, candidate in enumerate(pools[index]):
                if candidate == answer:
                    if isinstance(outcome, str):
                        reasons[index][k] = outcome
                    else:
                        scores[index][k] = outcome
        return Judged(scores, reasons)

    def _pictures(self, prompt: Prompt) -> list[Picture]:
        where = prompt.where or f"id {prompt.id!r}"
        side, pixels = self.config.max_image_side, self.max_image_pixels
        encoded = [read_encoded(image, root=self.image_root, where=where) for image in prompt.images]
        return [Picture(image, where, side, pixels) for image in encoded]

    def _run(
        self, tasks: Mapping[tuple[int, str], tuple[Prompt, list[Picture], str]]
    ) -> dict[tuple[int, str], float | str]:
        """Runs all tasks side by side; the first failure that concerns them all stops the others."""
        self.halt.clear()
        self._failure = None
        with ThreadPoolExecutor(self.config.concurrency) as threads, self.stopping() as stop:
            futures: dict[Future[float | str], tuple[int, str]] = {
                threads.submit(self._guarded, *task): key for key, task in tasks.items()
            }
            pending: set[Future[float | str]] = set(futures)
            reported = time.monotonic()
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    if any(future.exception() for future in done) and self._failure is not None:
                        raise self._failure
                    if time.monotonic() - reported > REPORT_SECONDS and pending:
                        reported = time.monotonic()
                        done_now, cost = len(futures) - len(pending), self.cache.spent["cost"]
                        self.report(f"{self.config.model}: {done_now} of {len(futures)} answers, cost {cost:.4g}")
                    if stop.received:
                        raise Interrupted(f"stopped by {stop.received} while scoring; paid answers are kept")
            finally:
                self.halt.set()  # after success there is nobody left to halt
                for future in pending:
                    future.cancel()
        return {key: future.result() for future, key in futures.items()}

    def _guarded(self, prompt: Prompt, pictures: Sequence[Picture], answer: str) -> float | str:
        """`_grade`; what it raises stops the others at once, before they ask for more."""
        try:
            return self._grade(prompt, pictures, answer)
        except Halted:
            raise
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self.halt.set()
            raise

    def _grade(self, prompt: Prompt, pictures: Sequence[Picture], answer: str) -> float | str:
        """A score, or why there is none."""
        messages: list[dict[str, Any]] = [
            {
                "role": "user",
                "content": [
                    *({"type": "image_url", "image_url": {"url": picture}} for picture in pictures),
                    {"type": "text", "text": render_rubric(self.rubric, prompt, answer, self.grades)},
                ],
            }
        ]
        reason = NO_GRADE
        for attempt in range(self.config.max_reasks + 1):
            if attempt:
                with self._lock:
                    self.reasks += 1
            try:
                reply = self._ask(messages)
            except Unusable as error:
                self._note_unusable(error)
                reason = error.reason
                if reason != MALFORMED:
                    return reason
                continue
            grade = expected_grade(reply, self.grades) if self.config.logprobs else None
            grade = parse_grade(reply.content, self.grades) if grade is None else grade
            if grade is not None:
                with self._lock:
                    self._in_a_row = 0
                return (grade - self.grades[0]) / (self.grades[-1] - self.grades[0])
            reason = NO_GRADE
            reminder = f"Reply with one number from {self.grades[0]} to {self.grades[-1]} and nothing else."
            messages = [
                *messages,
                {"role": "assistant", "content": reply.content[:500]},
                {"role": "user", "content": reminder},
            ]
        if reason == NO_GRADE:
            self._note_unusable(Unusable(reason))
        return reason

    def _note_unusable(self, error: Unusable) -> None:
        with self._lock:
            self._in_a_row += 1
            stop = self._in_a_row >= UNUSABLE_IN_A_ROW
        if stop:
            raise UserError(
                f"{UNUSABLE_IN_A_ROW} requests in a row had no usable answer (last: {error})",
                where="score.endpoint",
                remedy="check the server and the model; run the same command to continue, paid answers are kept",
            )

    def _ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """From the cache, else from the server."""
        keyed = self._body(messages, lambda picture: picture.digest)
        key = content_hash("chat-1", self.client.url, keyed)
        if (stored := self.cache.get(key)) is not None:
            try:
                tokens = tuple((str(token), dict(rivals)) for token, rivals in stored["tokens"])
                reply = Reply(str(stored["content"]), tokens, 0, 0)
            except (KeyError, TypeError, ValueError):
                pass  # a damaged entry is asked for again
            else:
                with self._lock:
                    self.hits += 1
                return reply
        guess = self._reserve(messages)
        try:
            reply = self.client.complete(self._body(messages, lambda picture: picture.url), guess)
            cost = self._cost(reply.prompt_tokens, reply.completion_tokens)
            self.cache.put(
                key,
                {"content": reply.content, "tokens": [[token, rivals] for token, rivals in reply.tokens]},
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                cost=cost,
            )
            with self._lock:
                self._dearest = max(self._dearest, cost)
                self._tokens = float(reply.prompt_tokens + reply.completion_tokens) or guess
        finally:
            with self._lock:
                self._in_flight -= 1
                self._lock.notify_all()
        return reply

    def _body(self, messages: Sequence[Mapping[str, Any]], show: Callable[[Picture], str]) -> dict[str, Any]:
        """The request, with each picture as `show` gives it."""

        def part(value: Any) -> Any:
            if isinstance(value, Picture):
                return show(value)
            if isinstance(value, Mapping):
                return {name: part(inner) for name, inner in value.items()}
            if isinstance(value, list):
                return [part(inner) for inner in value]
            # A lone surrogate, which JSON may spell, cannot be sent.
            return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value

        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [part(message) for message in messages],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if config.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        return {name: value for name, value in (body | config.extra_body).items() if value is not None}

    def _cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        config = self.config
        return (prompt_tokens * config.prompt_price + completion_tokens * config.completion_price) / 1e6

    def _reserve(self, messages: Sequence[Mapping[str, Any]]) -> float:
        """Tokens that a request may use, once what it may cost fits in `max_cost` beside those in flight.

        Until a first answer has told its cost, it is guessed from the text's length, generously for an image.
        """
        content, limit = messages[0]["content"], self.config.max_cost
        prompt_tokens = sum(len(entry.get("text", "")) for entry in content) / 3 + TOKENS_OF_AN_IMAGE * (
            len(content) - 1
        )
        with self._lock:
            while limit is not None and not self.halt.is_set():
                one = self._dearest or self._cost(prompt_tokens, self.config.max_tokens)
                if self.cache.spent["cost"] + (self._in_flight + 1) * one <= limit:
                    break
                if not self._in_flight:
                    spent = f"{self.cache.spent['cost']:.4g} is spent"
                    raise UserError(
                        f"{spent}, and another request may pass the limit of {limit:g}",
                        where="score.endpoint.max_cost",
                        remedy="raise it and run the same command: paid answers are kept",
                    )
                self._lock.wait(0.5)  # those in flight may turn out to be cheaper
            self._in_flight += 1
            return self._tokens or prompt_tokens + self.config.max_tokens
