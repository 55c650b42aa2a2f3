"""The endpoint backend against a server of its own: answers, failures, limits, the cache, cost and the key."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from stub_server import KEY, completion, stub_server
from tiny_judges import png, prompt

from m3po_jax.config import EndpointConfig
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.scoring import chat
from m3po_jax.scoring import endpoint as module
from m3po_jax.scoring.answer_cache import AnswerCache
from m3po_jax.scoring.endpoint import Endpoint
from m3po_jax.scoring.endpoint_settings import check_endpoint
from m3po_jax.scoring.rate_limit import RateLimit, retry_after

ROWS, POOLS = [prompt(1), prompt(2, images=2)], [["a dog.", "a cat."], ["a bus."]]


@pytest.fixture
def server():
    with stub_server() as stub:
        yield stub


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture(autouse=True)
def first_wait(monkeypatch):
    """OpenAI's client waits for half a second before it sends again: not in every test."""

    def wait(seconds):
        monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", seconds)
        monkeypatch.setattr(chat, "FIRST_WAIT_S", seconds)

    wait(0.01)
    return wait


def endpoint(server, tmp_path, *, run="run", rubric="", grades=(1, 2, 3, 4, 5), stopping=None, **settings):
    config = {"base_url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY"}
    more = {} if stopping is None else {"stopping": stopping}
    made = EndpointConfig(**{**config, "timeout_s": 5.0, **settings})
    return Endpoint(made, rubric=rubric, grades=grades, cache=tmp_path / "cache", run=run, **more)


def by_answer(grades):
    """A server that grades by a word of the answer."""

    def respond(request, number):
        text = next(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")
        return completion(next(grade for word, grade in grades.items() if word in text))

    return respond


def test_answers_become_scores(server, tmp_path):
    server.respond = by_answer({"dog": "5", "cat": "Grade: 2", "bus": '{"grade": 4, "why": "9 windows"}'})
    judged = endpoint(server, tmp_path).judged(ROWS, POOLS)
    np.testing.assert_allclose(np.concatenate(judged.scores), [1.0, 0.25, 0.75])
    assert judged.reasons == [[None, None], [None]]
    request = next(r for r in server.requests if "bus" in json.dumps(r["body"]))
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    body = request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 16)
    (message,) = body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert "a bus." in message["content"][-1]["text"] and ROWS[1].instruction in message["content"][-1]["text"]


def test_images_are_sent_small(server, tmp_path):
    big = Prompt("big", (Image(bytes=png(0, 300)),), "Describe the image.")
    endpoint(server, tmp_path, max_image_side=64)([big, ROWS[0]], [["a dog."], ["a dog."]])
    sizes = []
    for request in server.requests:
        url = request["body"]["messages"][0]["content"][0]["image_url"]["url"]
        head, data = url.split(",")
        assert head == "data:image/jpeg;base64"
        sizes.append(PILImage.open(io.BytesIO(base64.b64decode(data))).size)
    assert sorted(sizes) == [(28, 28), (64, 64)]


def test_prompts_without_what_the_rubric_needs_are_not_sent(server, tmp_path):
    backend = endpoint(server, tmp_path, rubric="{answer} {reference}")
    rows = [prompt(1, images=0), prompt(2), prompt(3, reference="a dog"), prompt(4, reference=" \n")]
    judged = backend.judged(rows, [["a"], ["b", "c"], ["d"], ["e"]])
    assert judged.reasons == [["no_image"], ["no_reference"] * 2, [None], ["no_reference"]]
    assert len(server.requests) == 1
    assert np.isnan(judged.scores[0]).all() and np.isnan(judged.scores[1]).all() and judged.scores[2] == [0.5]


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_may_pass_is_retried(server, tmp_path, status):
    server.respond = lambda request, number: (status, {}, {}) if number < 2 else completion("4")
    backend = endpoint(server, tmp_path, concurrency=1)
    assert backend(ROWS[:1], [["a dog."]])[0] == [0.75]
    assert len(server.requests) == 3 and backend.usage()["retries"] == 2


def test_the_server_says_how_long_to_wait(server, tmp_path):
    server.respond = lambda request, number: (429, {"Retry-After": "1"}, {}) if number == 0 else completion("4")
    # Nobody asks meanwhile: the limit is the server's, not the request's.
    backend = endpoint(server, tmp_path, concurrency=2, requests_per_minute=60 / 0.15)
    backend(ROWS[:1], [["a dog.", "a cat.", "a bird."]])
    refused, *later = [request["time"] for request in server.requests]
    assert all(at - refused > 0.95 for at in later[1:]) and max(later) - refused < 3.0
    server.respond = lambda request, number: (429, {"Retry-After": "100000"}, {})
    with pytest.raises(UserError, match=r"answers status 429 and asks to wait for 100000 s; run the same"):
        backend(ROWS[:1], [["a boat."]])


@pytest.mark.parametrize("header", ["0", "-5", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 99999", ""])
def test_a_wait_of_nothing_is_no_hurry(server, tmp_path, header, first_wait):
    first_wait(0.2)
    server.respond = lambda request, number: (429, {"Retry-After": header}, {}) if number < 2 else completion("4")
    assert endpoint(server, tmp_path)(ROWS[:1], [["a dog."]])[0] == [0.75]
    times = [request["time"] for request in server.requests]
    assert times[1] - times[0] > 0.09 and times[2] - times[1] > 0.19


def test_retry_after_is_a_number_or_a_date():
    assert [retry_after(value) for value in ("2", "0.5", "-3", "soon", "", None, "nan")] == [2, 0.5, 0, *[None] * 4]
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after(then) == pytest.approx(30, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_time_outs_are_retried_and_slow_starts_are_not(server, tmp_path):
    def respond(request, number):
        time.sleep(1.0 if number == 0 else 0.2)
        return completion("4")

    server.respond = respond
    backend = endpoint(server, tmp_path, timeout_s=0.5)
    assert backend(ROWS[:1], [["a dog."]])[0] == [0.75]
    assert len(server.requests) == 2 and backend.usage()["retries"] == 1


def test_a_server_that_is_down_stops_the_run_and_is_asked_again(tmp_path, server):
    url = server.url.rsplit(":", 1)[0] + ":1/v1"  # a port where nobody listens
    backend = endpoint(server, tmp_path, base_url=url, max_retries=2)
    with pytest.raises(Interrupted, match=r"the server gives no answer \(no connection \(ConnectError\)\)"):
        backend.judged(ROWS[:1], [["a dog."]])
    assert backend.usage()["retries"] == 2 * 2, "of the candidate, and of the question that tells"
    server.respond = lambda request, number: (503, {}, {"error": {"message": "no capacity"}})
    with pytest.raises(Interrupted, match=r"status 503 \(no capacity\)"):
        endpoint(server, tmp_path, max_retries=1, concurrency=1)(ROWS[:1], [[f"answer {n}" for n in range(30)]])
    assert len(server.requests) == 5 * 2 + 2, "not every one of thirty waits for nothing"
    server.respond = lambda request, number: completion("4")
    assert endpoint(server, tmp_path)(ROWS[:1], [["a dog."]])[0] == [0.75]


def test_one_answer_that_fails_is_told_and_after_three_commands_given_up(server, tmp_path):
    """A server that breaks over one image would keep a run from its end for ever."""

    def respond(request, number):
        return (500, {}, {"detail": "boom"}) if "dog" in json.dumps(request) else completion("4")

    server.respond = respond
    for command in range(3):
        judged = endpoint(server, tmp_path, max_retries=1).judged(ROWS[:1], [["a dog.", "a cat."]])
        expected = "no_answer" if command < 2 else "unanswerable"
        assert judged.reasons == [[expected, None]] and judged.scores[0][1] == 0.75
        assert "status 500 (boom)" in judged.notes["no_answer"]
    assert len(server.requests) == 3 * 4 + 1, "the answered one was paid for once"


def test_a_limited_rate_is_never_given_up(server, tmp_path):
    server.respond = lambda request, number: (429, {}, {}) if "dog" in json.dumps(request) else completion("4")
    for _ in range(4):
        judged = endpoint(server, tmp_path, max_retries=0).judged(ROWS[:1], [["a dog.", "a cat."]])
        assert judged.reasons == [["no_answer", None]] and judged.notes == {"no_answer": "status 429"}


BROKEN = [
    b"<html>",
    b"{",
    b"[]",
    b"\xff",
    b'data: {"choices":[{"delta":{"content":"4"}}]}\n\ndata: [DONE]\n\n',
    {"choices": []},
    {"choices": {"message": {"content": "4"}}},
    {"choices": [4]},
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": 4}}]},
    {"choices": [{"finish_reason": "error", "message": {"content": "4"}}]},
    {"object": "error"},
]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: str(body)[:24])
def test_malformed_responses_are_asked_for_again_and_then_abstained_from(server, tmp_path, body):
    def respond(request, number):
        return (200, {}, body) if "dog" in json.dumps(request) else completion("4")

    server.respond = respond
    judged = endpoint(server, tmp_path, max_reasks=2).judged(ROWS[:1], [["a dog.", "a cat."]])
    assert judged.reasons == [["malformed_response", None]] and len(server.requests) == 2 * 3 + 1
    server.respond = lambda request, number: (200, {}, body) if number == 7 else completion("5")
    assert endpoint(server, tmp_path, max_reasks=2)(ROWS[:1], [["a dog."]])[0] == [1.0]


def test_a_server_that_sends_nothing_readable_is_at_fault(server, tmp_path):
    page = b"<html><head><title>Sign in</title><script>x()</script></head><body>to go on</body></html>"
    server.respond = lambda request, number: (200, {}, page)
    with pytest.raises(UserError, match=r"malformed_response: not a chat completion \(Sign in\)"):
        endpoint(server, tmp_path)(ROWS[:1], [["a dog."]])


def test_an_answer_without_a_grade_is_asked_for_again_with_a_reminder(server, tmp_path):
    server.respond = lambda request, number: completion("A lovely picture!" if number == 0 else "4")
    backend = endpoint(server, tmp_path)
    assert backend(ROWS[:1], [["a dog."]])[0] == [0.75] and backend.usage()["reasks"] == 1
    roles = [message["role"] for message in server.requests[1]["body"]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["body"]["messages"][1]["content"] == "A lovely picture!"
    again = endpoint(server, tmp_path)
    assert again(ROWS[:1], [["a dog."]])[0] == [0.75] and len(server.requests) == 2, "nothing is paid twice"
    assert again.usage()["requests"] == 2 and again.usage()["from_cache"] == 1


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (completion(None, finish_reason="length"), ""),
        (completion("<think>I see 3 cups", finish_reason="length"), ""),
        (completion("<think>I see 3 cups</think>A fine picture"), "A fine picture"),
        (completion("   "), ""),
    ],
)
def test_a_reminder_repeats_no_thinking_and_no_empty_turn(server, tmp_path, first, said):
    server.respond = lambda request, number: first if number == 0 else completion("4")
    assert endpoint(server, tmp_path)(ROWS[:1], [["a dog."]])[0] == [0.75]
    messages = server.requests[1]["body"]["messages"]
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ([said] if said else [])
    last = messages[-1]["content"]
    assert "one number from 1 to 5" in (last if said else last[-1]["text"])


UNUSABLE = {
    "empty": (completion(None, finish_reason="length"), "cut_at_16", "its content was empty"),
    "reasoning": (completion("", finish_reason="length"), "cut_at_16", "all of it was reasoning"),
    "thinking": (completion("<think>The image shows 3", finish_reason="length"), "cut_at_16", "thinking did not end"),
    "open": (completion("<think>4"), "no_grade", "its thinking did not end"),
    "cut": (completion("4 - the answer", finish_reason="length"), "cut_at_16", "not whole"),
    "words": (completion("It is a picture."), "no_grade", "It is a picture."),
    "nothing": (completion(""), "no_grade", "the content is empty"),
    "tool": (completion(None, tool_calls=1), "no_grade", "a call of a tool"),
}
UNUSABLE["reasoning"][0]["choices"][0]["message"]["reasoning_content"] = "The grade is 4"
UNUSABLE["tool"][0]["choices"][0]["message"]["tool_calls"] = [{"function": {"name": "grade"}}]


@pytest.mark.parametrize(("answer", "reason", "note"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_answers_are_no_grades_and_never_kept(server, tmp_path, answer, reason, note):
    server.respond = lambda request, number: answer if "dog" in json.dumps(request) else completion("2")
    backend = endpoint(server, tmp_path, max_reasks=1, prompt_price=1.0)
    judged = backend.judged(ROWS[:1], [["a dog.", "a cat."]])
    assert judged.reasons == [[reason, None]] and note in judged.notes[reason]
    assert np.isnan(judged.scores[0][0]) and judged.scores[0][1] == 0.25
    assert backend.usage()["requests"] == 3 and backend.usage()["prompt_tokens"] == 300, "all of it was paid for"
    server.respond = lambda request, number: completion("5")  # the server is mended
    again = endpoint(server, tmp_path, max_reasks=1, prompt_price=1.0)
    assert again(ROWS[:1], [["a dog.", "a cat."]])[0].tolist() == [1.0, 0.25]
    assert len(server.requests) == 4 and again.usage()["requests"] == 4


def test_a_server_that_gives_only_empty_answers_says_why(server, tmp_path):
    server.respond = lambda request, number: completion(None, finish_reason="length")
    with pytest.raises(UserError, match=r"content was empty.*raise score\.endpoint\.max_tokens, or turn") as caught:
        endpoint(server, tmp_path, concurrency=1)(ROWS[:1], [[f"answer {n}" for n in range(40)]])
    assert "finish_reason length at 16 tokens" in str(caught.value)
    assert len(server.requests) <= 3 * 21
    # More room for an answer changes no whole answer: what is paid for stays.
    server.respond = lambda request, number: completion("4")
    pool = ["a dog.", "a cat."]
    endpoint(server, tmp_path)(ROWS[:1], [pool])
    before = len(server.requests)
    endpoint(server, tmp_path, max_tokens=64)(ROWS[:1], [pool])
    assert len(server.requests) == before


def test_one_token_may_be_a_whole_answer(server, tmp_path):
    server.respond = lambda request, number: completion("4" if number == 0 else "1", finish_reason="length")
    assert endpoint(server, tmp_path, max_tokens=1)(ROWS[:1], [["a dog."]])[0] == [0.75]
    with pytest.raises(UserError, match="finish_reason length at 1 tokens, it was not whole"):
        endpoint(server, tmp_path, max_tokens=1, grades=range(11))(ROWS[:1], [["a dog."]])


def test_a_refused_request_concerns_its_candidate_alone(server, tmp_path):
    refusal = (400, {}, {"error": {"message": f"content policy {KEY}"}})
    server.respond = lambda request, number: refusal if "dog" in json.dumps(request) else completion("3")
    judged = endpoint(server, tmp_path).judged(ROWS[:1], [["a dog.", "a cat."]])
    assert judged.reasons == [["refused_400", None]] and judged.scores[0][1] == 0.5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_denied_access_stops_at_once_and_never_shows_the_key(server, tmp_path, status):
    message = f"Incorrect API key provided: {KEY}"
    server.respond = lambda request, number: (status, {}, {"error": {"message": message}})
    with pytest.raises(UserError, match=rf"status {status} \(Incorrect API key provided: \[key\]\)") as caught:
        endpoint(server, tmp_path, concurrency=1)(ROWS[:1], [["a", "b", "c", "d"]])
    assert len(server.requests) == 1 and KEY not in str(caught.value) and caught.value.__cause__ is None


def test_a_server_that_stops_being_useful_stops_the_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNUSABLE_IN_A_ROW", 5)
    server.respond = lambda request, number: completion("4") if number < 3 else (400, {}, {"message": "no such key"})
    pool = [f"answer {number}" for number in range(12)]
    with pytest.raises(
        UserError, match=r"5 requests in a row had no usable answer \(last: refused_400: .*no such key\)"
    ):
        endpoint(server, tmp_path, concurrency=1)(ROWS[:1], [pool])
    assert len(server.requests) == 3 + 5 + 1, "the last one was a harmless question"
    server.respond = lambda request, number: completion("4")
    assert (endpoint(server, tmp_path, concurrency=1)(ROWS[:1], [pool])[0] == 0.75).all()
    assert len(server.requests) == 9 + 9, "the three answers from before the failure are kept"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_prompts_that_a_filter_refuses_do_not_end_the_run(server, tmp_path, concurrency):
    """However many lie side by side: the guard is for a server that refuses everything."""
    refusal = {"error": {"message": "The response was filtered", "code": "content_filter"}}

    def respond(request, number):
        return (400, {}, refusal) if "wound" in json.dumps(request["messages"]) else completion("4")

    server.respond = respond
    rows = [prompt(1), *[dataclasses.replace(prompt(n), instruction="Describe the wound.") for n in range(2, 40)]]
    pools = [["a dog.", "a cat."]] * len(rows)
    for _ in range(2):
        judged = endpoint(server, tmp_path, concurrency=concurrency).judged(rows, pools)
        assert judged.reasons == [[None, None], *[["refused_400"] * 2] * 38]
    assert judged.notes["refused_400"] == "status 400 (The response was filtered)"
    alone = endpoint(server, tmp_path).judged(rows[1:3], pools[1:3])
    assert alone.reasons == [["refused_400"] * 2] * 2, "nor where a shard has nothing else"


def test_redirects_are_not_followed(server, tmp_path):
    server.respond = lambda request, number: (307, {"Location": f"{server.url}/elsewhere"}, {})
    with pytest.raises(UserError, match=r"status 307, a redirect to http://.*/elsewhere; check base_url"):
        endpoint(server, tmp_path, concurrency=1).judged(ROWS[:1], [["a dog."]])
    assert len(server.requests) == 1


def test_a_response_is_bounded_however_it_is_packed(server, tmp_path):
    import gzip

    bomb = gzip.compress(b"0" * 50_000_000)
    good = gzip.compress(json.dumps(completion("4")).encode())

    def respond(request, number):
        text = json.dumps(request)
        if "bird" in text:
            return 200, {"Content-Encoding": "gzip"}, good
        if "cat" in text:
            return 200, {"Content-Encoding": "br"}, good
        return (200, {"Content-Encoding": "gzip"}, bomb) if "dog" in text else (200, {}, b" " * 5_000_000)

    server.respond = respond
    pool = ["a dog.", "a cat.", "a bus.", "a bird."]
    judged = endpoint(server, tmp_path, max_reasks=0).judged(ROWS[:1], [pool])
    assert judged.reasons == [[*["malformed_response"] * 3, None]] and judged.scores[0][3] == 0.75
    assert all(request["headers"]["Accept-Encoding"] == "identity" for request in server.requests)


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        (None, (None, None)),
        ({}, (None, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (None, 0)),
        ({"prompt_tokens": -5, "completion_tokens": "2"}, (None, None)),
        ({"prompt_tokens": True, "completion_tokens": 1e300}, (None, None)),
        ({"prompt_tokens": 900, "completion_tokens": None}, (900, None)),
        ({"input_tokens": 900, "output_tokens": 3}, (900, 3)),
    ],
)
def test_where_the_server_tells_no_tokens_the_guess_is_spent(server, tmp_path, usage, told):
    server.respond = lambda request, number: {**completion("4"), "usage": usage}
    prices = {"prompt_price": 2.5, "completion_price": 10.0, "concurrency": 2}
    backend = endpoint(server, tmp_path, **prices)
    backend(ROWS[:1], [["a dog."]])
    spent = backend.usage()
    text = len(server.text(0)) // 3 + 1
    expected = (told[0] or 1000 + text, 16 if told[1] is None else told[1])
    assert (spent["prompt_tokens"], spent["completion_tokens"]) == expected
    assert spent["guessed"] == (None in told)
    assert spent["cost"] == pytest.approx((expected[0] * 2.5 + expected[1] * 10) / 1e6, abs=1e-6)
    pool = [f"answer {number}" for number in range(30)]
    limited = endpoint(server, tmp_path, run="limited", max_cost=0.01, **prices)
    with pytest.raises(UserError, match=r"score\.endpoint\.max_cost: .* is spent"):
        limited(ROWS[:1], [pool])
    assert 0.006 < limited.usage()["cost"] <= 0.01, "the limit holds"
    assert endpoint(server, tmp_path, run="limited", **prices).usage() == limited.usage() | {"retries": 0}


def test_what_was_paid_for_nothing_counts(server, tmp_path):
    broken = {"choices": [], "usage": {"prompt_tokens": 700, "completion_tokens": 1}}
    server.respond = lambda request, number: broken if number == 0 else completion("4")
    backend = endpoint(server, tmp_path, prompt_price=1.0)
    assert backend(ROWS[:1], [["a dog."]])[0] == [0.75]
    assert backend.usage()["requests"] == 2 and backend.usage()["prompt_tokens"] == 800


def test_concurrency_has_a_limit(server, tmp_path):
    def respond(request, number):
        time.sleep(0.05)
        return completion("4")

    server.respond = respond
    pool = [f"answer {number}" for number in range(12)]
    endpoint(server, tmp_path, concurrency=3)(ROWS[:1], [pool])
    assert len(server.requests) == 12 and 2 <= server.most <= 3


class Clock:
    """Time that passes only in waits."""

    def __init__(self):
        self.now = 0.0

    def wait(self, seconds):
        self.now += seconds


@given(st.integers(1, 600), st.integers(1, 40))
def test_no_minute_has_more_requests_than_allowed(rate, count):
    clock, sent = Clock(), []
    limit = RateLimit(rate, 0, wait=clock.wait, clock=lambda: clock.now)
    for _ in range(count):
        limit.acquire(1)
        sent.append(clock.now)
    for start in sent:
        assert sum(start <= at < start + 60 - 1e-6 for at in sent) <= rate


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=2, max_size=30))
def test_tokens_a_minute_follow_what_was_used(requests):
    clock, allowed = Clock(), 1000.0
    limit, used = RateLimit(0, allowed, wait=clock.wait, clock=lambda: clock.now), 0.0
    for expected, actual in requests:
        limit.acquire(expected)
        assert used <= allowed / 60 * clock.now + 1e-6, "all earlier tokens have had their time"
        limit.settle(expected, actual)
        used += actual


def test_repeated_commands_pay_nothing_and_cost_is_counted(server, tmp_path):
    prices = {"prompt_price": 2.0, "completion_price": 10.0}
    first = endpoint(server, tmp_path, **prices)
    scores = first(ROWS, POOLS)
    cost = 3 * (100 * 2 + 2 * 10) / 1e6
    expected = {"requests": 3, "prompt_tokens": 300, "completion_tokens": 6, "from_cache": 0}
    assert {name: first.usage()[name] for name in expected} == expected
    assert first.usage()["cost"] == pytest.approx(cost, abs=1e-6)
    again = endpoint(server, tmp_path, **prices)
    for found, known in zip(again(ROWS, POOLS), scores, strict=True):
        np.testing.assert_array_equal(found, known)
    assert len(server.requests) == 3 and again.usage()["from_cache"] == 3
    assert again.usage()["cost"] == pytest.approx(cost, abs=1e-6), "the run's own cost stays"
    other = endpoint(server, tmp_path, run="another", **prices)
    other(ROWS, POOLS)
    assert len(server.requests) == 3 and other.usage()["requests"] == 0 and other.usage()["cost"] == 0
    # Another model, image bound, temperature or rubric is another question.
    for change in ({"model": "judge-2"}, {"max_image_side": 20}, {"temperature": 0.5}, {"rubric": "Grade {answer}"}):
        before = len(server.requests)
        endpoint(server, tmp_path, **change)(ROWS[:1], [["a dog."]])
        assert len(server.requests) == before + 1, change


def test_equal_answers_of_a_pool_are_asked_once(server, tmp_path):
    (scores,) = endpoint(server, tmp_path)(ROWS[:1], [["a dog."] * 4])
    assert scores.tolist() == [0.5] * 4 and len(server.requests) == 1


def test_a_torn_line_costs_one_answer(server, tmp_path):
    endpoint(server, tmp_path, concurrency=1)(ROWS, POOLS)
    (file,) = (tmp_path / "cache").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1] + lines[2][:20] + b"\n")
    again = endpoint(server, tmp_path, concurrency=1)
    assert np.isfinite(np.concatenate(again(ROWS, POOLS))).all()
    assert len(server.requests) == 4 and again.usage()["requests"] == 3


def test_max_cost_stops_before_it_is_passed(server, tmp_path):
    pool = [f"answer {number}" for number in range(30)]
    one = (100 * 1000 + 2 * 0) / 1e6
    # The first guess of a request's cost is its text and image; the server then tells what it is.
    backend = endpoint(server, tmp_path, prompt_price=1000.0, max_cost=10 * one + 0.01, concurrency=1)
    server.respond = lambda request, number: completion("4")
    with pytest.raises(UserError, match=r"score\.endpoint\.max_cost: .*is spent.*raise it and run the same command"):
        endpoint(server, tmp_path, prompt_price=1000.0, max_cost=0.001)(ROWS[:1], [pool])
    assert not server.requests, "not even one request is within the limit"
    config = dataclasses.replace(backend.config, max_cost=2.0)
    limited = endpoint(server, tmp_path, **{**vars(config), "concurrency": 4})
    with pytest.raises(UserError, match=r"max_cost"):
        limited(ROWS[:1], [pool])
    assert 1.5 < limited.usage()["cost"] <= 2.0 + 1e-9
    paid = len(server.requests)
    richer = endpoint(server, tmp_path, **{**vars(config), "max_cost": 20.0})
    assert (richer(ROWS[:1], [pool])[0] == 0.75).all()
    assert len(server.requests) == 30 and richer.usage()["from_cache"] == paid


def test_signals_stop_between_answers(server, tmp_path):
    from contextlib import contextmanager

    class Stop:
        received = None

    stop = Stop()

    @contextmanager
    def stopping():
        yield stop

    def respond(request, number):
        if number == 4:
            stop.received = "SIGTERM"
        time.sleep(0.02)
        return completion("4")

    server.respond = respond
    pool = [f"answer {number}" for number in range(60)]
    with pytest.raises(Interrupted, match="SIGTERM"):
        endpoint(server, tmp_path, concurrency=2, stopping=stopping)(ROWS[:1], [pool])
    asked = len(server.requests)
    assert asked < 40
    backend = endpoint(server, tmp_path, concurrency=2)
    assert np.isfinite(backend(ROWS[:1], [pool])[0]).all()
    assert len(server.requests) == 60 and backend.usage()["from_cache"] == asked, "every answer was kept"


def test_long_work_says_how_far_it_is(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.1)

    def respond(request, number):
        time.sleep(0.3)
        return completion("4")

    server.respond = respond
    lines = []
    backend = endpoint(server, tmp_path, concurrency=1, prompt_price=1.0)
    backend.report = lines.append
    backend(ROWS[:1], [["a", "b", "c", "d"]])
    assert lines and all(line.startswith("judge-1: ") and " of 4 answers, cost " in line for line in lines)


def test_nothing_shows_the_key(server, tmp_path, caplog, capsys):
    import logging

    caplog.set_level(logging.DEBUG)
    server.respond = lambda request, number: completion(f"your key is {KEY}" if number == 0 else "4")
    backend = endpoint(server, tmp_path, concurrency=1)
    backend(ROWS, POOLS)
    assert KEY not in json.dumps(server.requests[1]["body"]), "not even back to the server"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    printed = capsys.readouterr()
    assert KEY not in caplog.text + printed.out + printed.err + repr(backend.usage()) + repr(backend.config)


@pytest.mark.parametrize("env", ["JUDGE_KEY", ""])
def test_a_server_is_told_no_more_than_the_question(server, tmp_path, monkeypatch, env):
    """OpenAI's client would send the user's account at OpenAI and the machine's platform to any server."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-openai-alone")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert endpoint(server, tmp_path, api_key_env=env)(ROWS[:1], [["a dog."]])[0] == [0.5]
    (request,) = server.requests
    told = {name.lower(): value for name, value in request["headers"].items()}
    assert set(told) <= {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"),
        *(["authorization"] if env else []),
    }
    assert told.get("authorization") == (f"Bearer {KEY}" if env else None)
    assert "of-openai" not in json.dumps(told) + json.dumps(request["body"])


def test_a_missing_client_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs OpenAI's client.*pip install 'm3po-jax\[judge\]'"):
        endpoint(server, tmp_path)


def test_errors_inside_a_success_are_sent_again(server, tmp_path):
    hidden = {"error": {"code": 503, "message": "overloaded"}}
    server.respond = lambda request, number: hidden if number < 2 else completion("4")
    backend = endpoint(server, tmp_path)
    assert backend(ROWS[:1], [["a dog."]])[0] == [0.75] and backend.usage()["retries"] == 2
    server.respond = lambda request, number: hidden
    with pytest.raises(Interrupted, match=r"gives no answer \(status 503 \(overloaded\)\)"):
        endpoint(server, tmp_path, max_retries=1)(ROWS[:1], [["a cat."]])


def test_expected_grades_from_log_probs(server, tmp_path):
    rivals = {" 4": np.log(0.6), "2": np.log(0.2), "x": -1.0}
    tops = [{"token": token, "logprob": log_prob} for token, log_prob in rivals.items()]
    logprobs = {
        "content": [
            {"token": "Grade", "top_logprobs": []},
            {"token": " 4", "logprob": np.log(0.6), "top_logprobs": tops},
        ]
    }
    server.respond = lambda request, number: completion("Grade 4", logprobs=logprobs)
    (scores,) = endpoint(server, tmp_path, logprobs=True)(ROWS[:1], [["a dog."]])
    assert scores == [pytest.approx(((4 * 0.6 + 2 * 0.2) / 0.8 - 1) / 4)]
    assert server.requests[0]["body"]["top_logprobs"] == 20
    (again,) = endpoint(server, tmp_path, logprobs=True)(ROWS[:1], [["a dog."]])
    assert again == scores and len(server.requests) == 1, "the cache keeps them"


ODD_LOGPROBS = [
    None,
    {},
    {"content": None},
    {"content": [{"token": "5", "logprob": None, "top_logprobs": None}]},
    {"content": [{"token": "5", "logprob": -0.1, "top_logprobs": [{"token": "5", "logprob": None}]}]},
    {"content": [{"logprob": -0.1}]},
    {"content": 3},
    [1],
    {"tokens": ["5"], "token_logprobs": [-0.1], "top_logprobs": [{"5": -0.1}]},
]


@pytest.mark.parametrize("logprobs", ODD_LOGPROBS, ids=str)
def test_log_probs_of_another_shape_leave_the_text(server, tmp_path, logprobs):
    server.respond = lambda request, number: completion("5", logprobs=logprobs)
    assert endpoint(server, tmp_path, logprobs=True)(ROWS[:1], [["a cat."]])[0] == [1.0]


def test_more_of_the_request(server, tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 7, "seed": 3}
    endpoint(server, tmp_path, extra_body=extra)(ROWS[:1], [["a dog."]])
    body = server.requests[0]["body"]
    assert "max_tokens" not in body and body["max_completion_tokens"] == 7 and body["seed"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": ""}, r"base_url: not the address"),
        ({"base_url": "ftp://host/v1"}, r"base_url: not the address"),
        ({"base_url": "https://"}, r"base_url: not the address"),
        ({"base_url": "https://host:port/v1"}, r"base_url: not the address"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, r"base_url: has credentials"),
        ({"base_url": f"https://host/v1?key={KEY}"}, r"base_url: has credentials"),
        ({"base_url": "http://host/v1"}, r"base_url: would send the key unencrypted"),
        ({"api_key_env": KEY}, r"api_key_env: not the name of an environment variable"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, r"NO_SUCH_VARIABLE is not set"),
        ({"model": ""}, r"endpoint\.model"),
        ({"concurrency": 0}, r"endpoint\.concurrency"),
        ({"timeout_s": 0.0}, r"endpoint\.timeout_s"),
        ({"max_reasks": -1}, r"endpoint\.max_reasks"),
        ({"max_cost": 1.0}, r"endpoint\.max_cost: a limit without prices"),
        ({"extra_body": {"stream": True}}, r"extra_body\.stream: asks for answers in pieces"),
        ({"extra_body": {"n": 3}}, r"extra_body\.n: asks for several answers"),
    ],
)
def test_wrong_settings_show_no_secret(server, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        endpoint(server, tmp_path, **settings)
    assert KEY not in str(caught.value)


def test_plain_http_is_for_this_machine_or_without_a_key():
    known = EndpointConfig(base_url="http://judge:8000/v1", model="m")
    check_endpoint(known)
    check_endpoint(dataclasses.replace(known, api_key_env="K", allow_insecure=True))
    for host in ("localhost", "127.0.0.1", "[::1]"):
        check_endpoint(dataclasses.replace(known, base_url=f"http://{host}:8000/v1", api_key_env="K"))


def test_a_key_that_no_header_can_carry(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "two words\n")
    with pytest.raises(UserError, match="does not hold a key") as caught:
        endpoint(server, tmp_path)
    assert "two words" not in str(caught.value)


def test_the_cache_serves_threads(tmp_path):
    cache = AnswerCache(tmp_path, "run")

    def write(start):
        for number in range(start, start + 50):
            cache.put(str(number), {"content": "ü\ud800"}, prompt_tokens=1, completion_tokens=1, cost=0.5)

    threads = [threading.Thread(target=write, args=(50 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = AnswerCache(tmp_path, "run")
    assert (
        again.spent
        == cache.spent
        == {"requests": 200, "prompt_tokens": 200, "completion_tokens": 200, "cost": 100.0, "guessed": 0}
    )
    assert all(again.get(str(number)) == {"content": "ü\ud800"} for number in range(200))
