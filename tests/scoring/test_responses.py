"""What servers send: answers in every shape, refusals, and errors wherever they are put."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.scoring.responses import Denied, Passing, Reply, Unusable, read_response


def read(value, status=200, clean=lambda text: text):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_response(status, data, clean)


def answered(message, **choice):
    return {"choices": [{"message": {"role": "assistant", **message}, **choice}]}


CONTENTS = [
    ("4", "4"),
    (None, ""),
    ([{"type": "text", "text": "4"}], "4"),
    ([{"type": "text", "text": "Grade: "}, {"type": "text", "text": "4"}], "Grade: 4"),
    ([{"type": "output_text", "text": "4"}], "4"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "2?"}]}, {"type": "text", "text": "4"}], "4"),
    ([{"type": "reasoning", "text": "2?"}, "4"], "4"),
    ({"type": "text", "text": "4"}, "4"),
    ([], ""),
]


@pytest.mark.parametrize(("content", "text"), CONTENTS, ids=str)
def test_the_text_of_a_message(content, text):
    reply = read(answered({"content": content, "reasoning_content": "The grade is 3"}))
    assert reply == Reply(text, (), False, None, None, True), "reasoning in a field of its own is no answer"


@pytest.mark.parametrize("content", [4, True, [4], [{"type": "text", "text": 4}], [{"type": "text"}]], ids=str)
def test_a_content_that_is_no_text(content):
    with pytest.raises(Unusable, match="malformed_response: a content that is no text"):
        read(answered({"content": content}))


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_cut_answers(finish):
    assert read(answered({"content": "4"}, finish_reason=finish)).cut
    assert not read(answered({"content": "4"}, finish_reason="stop")).cut


REFUSALS = [
    (answered({"content": None, "refusal": "I cannot help with that"}), "I cannot help with that"),
    (answered({"content": "", "refusal": "No."}, finish_reason="stop"), "No."),
    (answered({"content": [{"type": "refusal", "refusal": "No."}]}), "No."),
    (answered({"content": "Grade: 4"}, finish_reason="content_filter"), "finish_reason content_filter"),
    (answered({"content": None}, finish_reason="SAFETY"), "finish_reason safety"),
    ({"error": {"message": "blocked", "code": "content_filter"}}, "blocked"),
    ({"error": {"message": "blocked", "type": "DataInspectionFailed"}}, "blocked"),
    (
        {"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}},
        "too long",
    ),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSALS, ids=lambda value: str(value)[:60])
def test_refusals_with_status_200_concern_one_request(body, sentence):
    with pytest.raises(Unusable) as caught:
        read(body)
    assert caught.value.reason == "refused" and sentence in caught.value.detail


def error(message="boom", **names):
    return {"error": {"message": message, **names}}


ERRORS = [
    (200, error(code=429), Passing, "status 429 (boom)"),
    (200, error(code="429"), Passing, "status 429 (boom)"),
    (200, error(code=503), Passing, "status 503 (boom)"),
    (200, error(type="overloaded_error"), Passing, "status 429 (boom)"),
    (200, error(status="RESOURCE_EXHAUSTED"), Passing, "status 429 (boom)"),
    (200, error(), Passing, "status 200 (boom)"),
    (200, {"error": "upstream is gone"}, Passing, "upstream is gone"),
    (200, {"object": "error", "message": "busy", "code": 503}, Passing, "status 503 (busy)"),
    (200, [error(code=429)], Passing, "status 429 (boom)"),
    (
        200,
        {"choices": [{"error": {"code": 502, "message": "lost"}, "finish_reason": "error"}]},
        Passing,
        "502 (lost)",
    ),
    (200, error(code=401), Denied, "status 401 (boom)"),
    (200, error(code="invalid_api_key"), Denied, "boom"),
    (200, error(code=400), Unusable, "refused_400"),
    (200, error(code=403, message="Your input was flagged", metadata={"reasons": ["violence"]}), Unusable, "flagged"),
    (429, error(), Passing, "status 429 (boom)"),
    (429, error(code="insufficient_quota"), Denied, "boom"),
    (408, {}, Passing, "status 408"),
    (500, {"detail": "it broke"}, Passing, "status 500 (it broke)"),
    (520, b"<html><head><title>520: unknown</title></head><body>x</body></html>", Passing, "520 (520: unknown)"),
    (529, error(type="overloaded_error"), Passing, "status 529 (boom)"),
    (401, error(), Denied, "status 401 (boom)"),
    (402, {"message": "no credit"}, Denied, "status 402 (no credit)"),
    (403, error(), Denied, "status 403 (boom)"),
    (403, error("flagged by moderation"), Unusable, "refused_403"),
    (404, {"object": "error", "message": "no such model"}, Denied, "status 404 (no such model)"),
    (307, b"", Denied, "status 307"),
    (400, error(code="content_filter"), Unusable, "refused_400: status 400 (boom)"),
    (
        400,
        {"object": "error", "message": "maximum context length is 4096 tokens", "code": 400},
        Unusable,
        "4096 tokens",
    ),
    (
        422,
        {"detail": [{"loc": ["body"], "msg": "field required"}]},
        Unusable,
        "refused_422: status 422 (field required)",
    ),
    (413, b"too\nlarge", Unusable, "status 413 (too large)"),
    (400, {"errors": [{"message": "one"}, {"message": "two"}]}, Unusable, "(one; two)"),
    (
        502,
        error("Provider returned error", metadata={"raw": "quota of the provider"}),
        Passing,
        "quota of the provider",
    ),
]


@pytest.mark.parametrize(("status", "body", "kind", "line"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_are_told_apart_and_told(status, body, kind, line):
    with pytest.raises(kind) as caught:
        read(body, status)
    assert type(caught.value) is kind and line in str(caught.value)


def test_what_a_server_says_is_short_and_without_the_key():
    with pytest.raises(Passing) as caught:
        read(error("SECRET " * 1000, code=500), clean=lambda text: text.replace("SECRET", "[key]"))
    assert "SECRET" not in str(caught.value) and len(str(caught.value)) < 350


def test_several_answers_have_to_say_the_same():
    def choices(*contents):
        return {"choices": [{"message": {"content": content}} for content in contents]}

    assert read(choices("4", "4")).content == "4"
    with pytest.raises(Unusable, match="no_grade: 2 answers that differ"):
        read(choices("4", "2"))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "error", "code", "usage", "logprobs", "text", "type", "detail"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(
    JSON | st.builds(answered, st.fixed_dictionaries({"content": JSON})),
    st.sampled_from([200, 204, 301, 400, 429, 500]),
)
def test_any_body_is_an_answer_or_a_failure_of_a_known_kind(body, status):
    try:
        reply = read(body, status)
    except (Unusable, Denied, Passing):
        return
    assert isinstance(reply.content, str) and 200 <= status < 300
