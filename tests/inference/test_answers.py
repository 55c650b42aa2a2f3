import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.inference.answers import finish, repeats

PIECES = {1: " a", 2: " cat", 3: ".", 4: ".\n\n", 5: "\n", 6: " USER", 7: ":", 9: ""}  # 9: the end token


def decode(ids):
    return "".join(PIECES[int(i)] for i in ids).strip()


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        ([1, 2, 3, 9], ["USER:"], ("a cat.", 4, "stop")),
        ([1, 2, 3, 5, 6, 7, 1, 9], ["\n USER:", "zebra"], ("a cat.", 3, "stop_string")),
        ([1, 2, 3, 5, 6, 7, 1, 9], ["USER", "cat"], ("a", 1, "stop_string")),  # the earlier, not the first listed
        ([1, 2, 4, 1, 2], ["\n\n"], ("a cat.", 3, "stop_string")),  # the token with both stays
        ([6, 7, 1, 2], ["USER:"], ("", 1, "stop_string")),  # an empty answer keeps a token
        ([1, 2, 5, 9], ["\n"], ("a cat", 4, "stop")),  # white space at the end is no text
        ([1, 2], [], ("a cat", 2, "length")),
    ],
)
def test_answers_end_at_stop_strings(ids, stop, expected):
    answer = finish(np.array(ids), ids[-1] == 9, decode, stop)
    assert (answer.text, answer.length, answer.finish_reason) == expected


@given(
    st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=20),
    st.lists(st.sampled_from(["\n", "cat", ". a", " U", ":"])),
)
def test_the_kept_tokens_are_the_fewest_that_make_the_text(ids, stop):
    answer = finish(np.array(ids), False, decode, stop)
    assert not any(string in answer.text for string in stop)
    assert decode(ids).startswith(answer.text) and 1 <= answer.length <= len(ids)
    if answer.finish_reason == "stop_string":
        assert decode(ids[: answer.length]).startswith(answer.text)
        assert answer.length == 1 or not decode(ids[: answer.length - 1]).startswith(answer.text)


def test_a_character_of_several_tokens_is_kept_whole():
    data = "né!".encode()

    def bytewise(ids):
        return bytes(int(i) for i in ids).decode("utf-8", "replace").strip()

    answer = finish(np.array(list(data)), False, bytewise, ["!"])
    assert (answer.text, answer.length) == ("né", 3)


def test_repeats_are_told_from_what_they_repeat():
    texts = ["x", "y", "x", "z", "y"]
    assert repeats(texts, range(5)) == [2, 4]
    assert repeats(texts, [0, 1]) == [0, 1]  # what is not fresh stays
    assert repeats(texts, []) == []


@given(st.lists(st.sampled_from("abc"), max_size=8), st.sets(st.integers(0, 7)))
def test_without_the_repeats_fresh_texts_are_distinct(texts, fresh):
    fresh = {k for k in fresh if k < len(texts)}
    left = [k for k in fresh if k not in repeats(texts, fresh)]
    others = {text for k, text in enumerate(texts) if k not in fresh}
    assert len({texts[k] for k in left}) == len(left) and others.isdisjoint(texts[k] for k in left)
    assert {texts[k] for k in left} | others == set(texts)
