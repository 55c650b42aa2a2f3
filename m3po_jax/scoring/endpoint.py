"""Any OpenAI-compatible server as judge: a graded rubric about one image and one answer (docs/judges.md)."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from m3po_jax.config import EndpointConfig
from m3po_jax.data.images import read_encoded
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.scoring.alignment import Backend, Judged, Scores
from m3po_jax.scoring.answer_cache import AnswerCache
from m3po_jax.scoring.endpoint_settings import check_client
from m3po_jax.scoring.grading import check_rubric, render_rubric
from m3po_jax.scoring.pictures import Picture, grey_square
from m3po_jax.scoring.rate_limit import Halted
from m3po_jax.scoring.reasons import (
    CUT_AT,
    MALFORMED,
    NO_ANSWER,
    NO_GRADE,
    NO_IMAGE,
    NO_REFERENCE,
    OUTAGES,
    UNANSWERABLE,
)
from m3po_jax.scoring.responses import Reply, Unusable
from m3po_jax.scoring.written_grades import expected_grade, is_grade_alone, parse_grade, spoken_from

UNUSABLE_IN_A_ROW = 20  # then a question that nobody refuses tells whether the server is at fault
OUTAGE_WEIGHT = 4  # a request that got no answer has been sent many times already
FAILED_COMMANDS = 3  # that got no answer to one request while they got others: it is not asked again
REPORT_SECONDS = 30.0
TOKENS_OF_AN_IMAGE = 1_000  # a first guess, until the server has told
_LIMITS = ("max_tokens", "max_completion_tokens")

Task = tuple[Prompt, list[Picture], str]
Key = TypeVar("Key")
Result = TypeVar("Result")


class Stop(Protocol):
    """Whether a signal to stop has arrived, and which."""

    received: str | None


@contextmanager
def _never() -> Iterator[Stop]:
    class Silent:
        received: str | None = None

    yield Silent()


def answer_limit(config: EndpointConfig) -> int:
    """The most tokens that an answer may have, by whichever name the server knows that."""
    named = [config.extra_body.get(name) for name in _LIMITS]
    return max((value for value in named if isinstance(value, int)), default=config.max_tokens)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one answer's grading: a score, or why there is none."""

    key: str
    score: float = math.nan
    failure: Unusable | None = None

    @property
    def reason(self) -> str | None:
        return self.failure.reason if self.failure else None


class Endpoint(Backend):
    """Asks a server for a grade of every answer: score = (grade − lowest) / (highest − lowest).

    Requests run side by side, within the configured rates. An answer that is not whole, or states no grade or
    several, is asked for again, with a reminder, `max_reasks` times; then the candidate has no score. What every
    request cost is kept, and every answer that gave a grade, before it is used; the next run of the same command
    finds it there. Where many requests in a row come to nothing, a question that nobody refuses tells whether the
    server is at fault.

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
        check_client()
        from m3po_jax.scoring.chat import ChatClient  # its library is an extra

        self.config, self.rubric, self.grades = config, rubric, list(grades)
        self.needs_reference = "{reference}" in rubric
        self.image_root, self.max_image_pixels, self.stopping = image_root, max_image_pixels, stopping
        self.report = report
        self.halt = threading.Event()
        self.client = ChatClient(config, halt=self.halt)
        self.cache = AnswerCache(cache, run)
        self.hits = self.reasks = 0
        self.notes: dict[str, str] = {}
        self._lock = threading.Condition()
        self._failure: BaseException | None = None
        self._in_a_row = self._weight = self._in_flight = 0
        self._patience, self._probing = UNUSABLE_IN_A_ROW, False
        self._dearest = self._tokens = 0.0  # the largest cost of one request, and its usual tokens

    def usage(self) -> dict[str, Any]:
        """What this run has paid for, by earlier commands too; hits, retries and re-asks are of this command."""
        return {
            "judge": self.config.model,
            "server": self.config.base_url,
            **self.cache.spent,  # `guessed`: requests whose tokens the server did not tell
            "cost": round(self.cache.spent["cost"], 6),
            "from_cache": self.hits,
            "retries": self.client.retries,
            "reasks": self.reasks,
        }

    def usages(self) -> list[dict[str, Any]]:
        return [self.usage()]

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return self.judged(prompts, pools).scores

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        """Scores, and why a candidate has none.

        Raises:
            UserError: the server denies access or has stopped giving usable answers, or `max_cost` is reached.
            Interrupted: a signal arrived, or the server is down. Whatever was answered is cached in any case.
        """
        scores: Scores = [np.full(len(pool), np.nan) for pool in pools]
        reasons: list[list[str | None]] = [[None] * len(pool) for pool in pools]
        tasks: dict[tuple[int, str], Task] = {}
        for index, (prompt, pool) in enumerate(zip(prompts, pools, strict=True)):
            why = NO_IMAGE if not prompt.images else None
            if why is None and self.needs_reference and not (prompt.reference or "").strip():
                why = NO_REFERENCE
            if why is not None:
                reasons[index] = [why] * len(pool)
                continue
            pictures = self._pictures(prompt)
            tasks |= {(index, answer): (prompt, pictures, answer) for answer in pool}
        for (index, answer), outcome in self._outcomes(tasks).items():
            for k, candidate in enumerate(pools[index]):
                if candidate == answer:
                    scores[index][k] = outcome.score
                    reasons[index][k] = outcome.reason
        return Judged(scores, reasons, notes=self.notes)

    def _outcomes(self, tasks: Mapping[tuple[int, str], Task]) -> dict[tuple[int, str], Outcome]:
        """Runs all tasks, those that got no answer twice, and makes sure that the server is not at fault."""
        outcomes = self._run({key: partial(self._grade, *task) for key, task in tasks.items()})
        missing = [key for key, outcome in outcomes.items() if outcome.reason in OUTAGES]
        if missing and len(missing) < len(tasks):
            outcomes |= self._run({key: partial(self._grade, *tasks[key]) for key in missing})
        failures = [outcome.failure for outcome in outcomes.values() if outcome.failure]
        if failures and len(failures) == len(tasks) and (fault := self._run({0: self._probe})[0]):
            raise self._at_fault(failures[-1], fault, len(failures))
        for key, outcome in outcomes.items():
            # A limited rate says nothing about the request that met it.
            if outcome.failure and outcome.reason in OUTAGES and "status 429" not in outcome.failure.detail:
                commands = self.cache.fail(outcome.key)
                if commands >= FAILED_COMMANDS:
                    failure = Unusable(UNANSWERABLE, f"{commands} commands in vain, {outcome.failure}")
                    outcomes[key] = Outcome(outcome.key, failure=failure)
        self.notes |= {failure.reason: failure.detail for failure in failures}
        return outcomes

    def _pictures(self, prompt: Prompt) -> list[Picture]:
        where = prompt.where or f"id {prompt.id!r}"
        side, pixels = self.config.max_image_side, self.max_image_pixels
        encoded = [read_encoded(image, root=self.image_root, where=where) for image in prompt.images]
        return [Picture(image, where, side, pixels) for image in encoded]

    def _run(self, tasks: Mapping[Key, Callable[[], Result]]) -> dict[Key, Result]:
        """Runs all tasks side by side; the first failure that concerns them all stops the others."""
        self.halt.clear()
        self._failure = None
        with ThreadPoolExecutor(self.config.concurrency) as threads, self.stopping() as stop:
            futures: dict[Future[Result], Key] = {
                threads.submit(self._guarded, task): key for key, task in tasks.items()
            }
            pending: set[Future[Result]] = set(futures)
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

    def _guarded(self, task: Callable[[], Result]) -> Result:
        """Runs a task; what it raises stops the others at once, before they ask for more."""
        try:
            return task()
        except Halted:
            raise
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self.halt.set()
            raise

    def _grade(self, prompt: Prompt, pictures: Sequence[Picture], answer: str) -> Outcome:
        """A score from the cache or from the server, or why there is none."""
        messages = self._messages(prompt, pictures, answer)
        keyed = self._body(messages, lambda picture: picture.digest)
        # How much room an answer has changes no whole answer.
        key = content_hash("chat-2", self.client.url, {name: keyed[name] for name in keyed if name not in _LIMITS})
        if (grade := self._stored(key)) is not None:
            with self._lock:
                self.hits += 1
            return self._usable(key, grade)
        failure, asked = Unusable(NO_GRADE), messages
        for attempt in range(self.config.max_reasks + 1):
            if attempt:
                with self._lock:
                    self.reasks += 1
            try:
                return self._usable(key, self._ask(asked, key))
            except Unusable as error:
                failure = error
            if failure.reason == MALFORMED:
                self.client.back_off(attempt)
            elif failure.reason == NO_GRADE or failure.reason.startswith(CUT_AT):
                asked = self._reminded(messages, failure.reply)
            else:
                break
        self._note_unusable(failure)
        return Outcome(key, failure=failure)

    def _usable(self, key: str, grade: float) -> Outcome:
        with self._lock:
            self._in_a_row = self._weight = 0
        return Outcome(key, (grade - self.grades[0]) / (self.grades[-1] - self.grades[0]))

    def _messages(self, prompt: Prompt, pictures: Sequence[Picture], answer: str) -> list[dict[str, Any]]:
        text = render_rubric(self.rubric, prompt, answer, self.grades)
        shown = ({"type": "image_url", "image_url": {"url": picture}} for picture in pictures)
        return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]

    def _reminded(self, messages: Sequence[Mapping[str, Any]], reply: Reply | None) -> list[dict[str, Any]]:
        """The question with a reminder, behind what was answered if that ended; an empty turn servers refuse."""
        reminder = f"Reply with one number from {self.grades[0]} to {self.grades[-1]} and nothing else."
        start = spoken_from(reply.content) if reply is not None and not reply.cut else None
        said = reply.content[start:][:500].strip() if reply is not None and start is not None else ""
        if said:
            return [
                *map(dict, messages),
                {"role": "assistant", "content": said},
                {"role": "user", "content": reminder},
            ]
        (first,) = messages
        return [{**first, "content": [*first["content"], {"type": "text", "text": reminder}]}]

    def _read(self, reply: Reply) -> float:
        """The grade of an answer.

        Raises:
            Unusable: it is not whole, or states no grade or several.
        """
        if reply.cut and not is_grade_alone(reply.content, self.grades):
            limit = answer_limit(self.config)
            said = "its thinking did not end" if spoken_from(reply.content) is None else "it was not whole"
            if not reply.content.strip():
                said = "all of it was reasoning" if reply.thought else "its content was empty"
            raise Unusable(f"{CUT_AT}{limit}", f"finish_reason length at {limit} tokens, {said}", reply=reply)
        grade = parse_grade(reply.content, self.grades)
        if grade is None:
            start = spoken_from(reply.content)
            said = " ".join(reply.content[start or 0 :].split())
            said = f"{said[:80]!r}" if said else "the content is empty"
            said += ", all of it was reasoning" if reply.thought and not reply.content.strip() else ""
            raise Unusable(NO_GRADE, "its thinking did not end" if start is None else said, reply=reply)
        if not self.config.logprobs:
            return grade
        expected = expected_grade(reply.content, reply.tokens, self.grades)
        return grade if expected is None else expected

    def _note_unusable(self, failure: Unusable) -> None:
        """Counts requests in a row that came to nothing; after so many, asks whether the server is at fault."""
        with self._lock:
            self._in_a_row += 1
            self._weight += OUTAGE_WEIGHT if failure.reason == NO_ANSWER else 1
            if self._weight < self._patience or self._probing:
                return
            count, self._probing = self._in_a_row, True
        fault = self._probe()
        with self._lock:
            self._probing, self._in_a_row, self._weight = False, 0, 0
            self._patience *= 2  # the server serves: it is these prompts that it does not like
        if fault is not None:
            raise self._at_fault(failure, fault, count)

    def _probe(self) -> Unusable | None:
        """Asks for a grade of something harmless; returns why there was none."""
        image = Picture(grey_square(), "probe", self.config.max_image_side, self.max_image_pixels)
        row = Prompt("probe", (), "Describe the image.", "A grey square.")
        try:
            self._ask(self._messages(row, [image], "A grey square."), "")
        except Unusable as error:
            return error
        return None

    def _at_fault(self, failure: Unusable, fault: Unusable, count: int) -> Exception:
        """What stops a run whose server serves nothing: an outage may pass, anything else has to be mended."""
        where = "score.endpoint"
        if fault.reason == NO_ANSWER:
            kept = "what was answered is kept, the rest is asked again"
            return Interrupted(f"{where}: the server gives no answer ({fault.detail}); {kept}")
        remedy = "check the server and the model"
        if fault.reason.startswith(CUT_AT):
            remedy = "raise score.endpoint.max_tokens, or turn the server's thinking off"
        several = f"{count} requests in a row" if count > 1 else "a request"
        return UserError(
            f"{several} had no usable answer (last: {failure}), and a harmless one had none either",
            where=where,
            remedy=f"{remedy}; run the same command to continue, paid answers are kept",
        )

    def _stored(self, key: str) -> float | None:
        """The grade of a kept answer, None where there is none that counts: then it is asked for again."""
        stored = self.cache.get(key)
        if stored is None:
            return None
        try:
            tokens = tuple((str(token), dict(rivals)) for token, rivals in stored["tokens"])
            return self._read(Reply(str(stored["content"]), tokens, bool(stored["cut"])))
        except (KeyError, TypeError, ValueError, Unusable):
            return None

    def _ask(self, messages: Sequence[Mapping[str, Any]], key: str) -> float:
        """The server's grade; what the request cost is kept, and under `key` the answer that gave a grade.

        Raises:
            Unusable: there is none; what was paid for it is kept all the same.
        """
        guess = self._reserve(messages)
        try:
            kept: dict[str, Any] | None = None
            reply: Reply | None = None
            try:
                reply = self.client.complete(
                    self._body(messages, lambda picture: picture.url), self._tokens or sum(guess)
                )
                grade = self._read(reply)
                kept = {"content": reply.content, "tokens": [[*pair] for pair in reply.tokens], "cut": reply.cut}
            except Unusable as error:
                reply = error.reply if error.reply is not None else Reply("") if error.paid else None
                raise
            finally:
                if reply is not None:
                    self._pay(key, kept, reply, guess)
        finally:
            with self._lock:
                self._in_flight -= 1
                self._lock.notify_all()
        return grade

    def _pay(self, key: str, kept: Any | None, reply: Reply, guess: tuple[int, int]) -> None:
        """Keeps an answer and its cost; where the server does not tell the tokens, the guess that reserved it."""
        prompt = guess[0] if reply.prompt_tokens is None else reply.prompt_tokens
        completion = guess[1] if reply.completion_tokens is None else reply.completion_tokens
        cost = self._cost(prompt, completion)
        guessed = reply.prompt_tokens is None or reply.completion_tokens is None
        self.cache.put(key, kept, prompt_tokens=prompt, completion_tokens=completion, cost=cost, guessed=guessed)
        with self._lock:
            self._dearest = max(self._dearest, cost)
            self._tokens = float(prompt + completion)

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

    def _reserve(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """(prompt, completion) tokens that a request may use, once `max_cost` has room for it beside those in flight.

        They are guessed from the text's length, generously for an image, and from the limit of an answer; for the
        cost, the dearest request so far is a better guess.
        """
        prompt_tokens, limit = 0, self.config.max_cost
        for message in messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            prompt_tokens += sum(
                len(part["text"]) // 3 + 1 if "text" in part else TOKENS_OF_AN_IMAGE for part in parts
            )
        guess = prompt_tokens, answer_limit(self.config)
        with self._lock:
            while limit is not None and not self.halt.is_set():
                one = self._dearest or self._cost(*guess)
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
            return guess
