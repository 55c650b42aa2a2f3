"""Messages for users: one line, whatever the value that it tells of."""

import base64

import pytest

from m3po_jax.errors import UserError, shortened


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, "word " * 20_000, base64.b64encode(bytes(range(256)) * 500).decode(), "a'b" * 9999, "\n" * 999],
)
def test_long_values_are_cut_wherever_they_stand(value):
    for what in (f"no image {value!r} here", f"unknown key {value}", f"expected one of [{value!r}, {value!r}]"):
        error = UserError(what, where=f"a.jsonl:3 (id {value!r})", remedy=f"replace {value!r}")
        assert len(str(error)) < 1700 and "\n" not in str(error)
        assert str(error).startswith("a.jsonl:3 (id ")
    cut = shortened(f"no image {value!r} here")
    assert len(cut) < 100 and cut.startswith("no image ") and cut.endswith(" here")


def test_what_is_not_long_stays_as_it_is():
    path = "/tmp/" + "folder-of-a-long-name/" * 9 + "x.png"
    for text in (
        f"no image file {path!r} under /{path}",
        "the server's answer isn't what the recipe's key says it is, and its reader mustn't be told less",
        f"{'x' * 78!r} is short enough",
    ):
        assert shortened(text) == text
        assert str(UserError(text)) == text
        assert UserError(text, where=path, remedy=text).where == path


def test_a_message_written_again_is_the_same():
    error = UserError(f"bad {'y' * 500!r}", where="x", remedy="z")
    assert str(UserError(error.what, where=error.where, remedy=error.remedy)) == str(error)
