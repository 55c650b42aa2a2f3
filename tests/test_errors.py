"""Lines for the person at the terminal: what somebody else wrote is shown, and does nothing."""

from __future__ import annotations

import base64
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from m3po_jax.cli import main
from m3po_jax.errors import Interrupted, UserError, harmless, shortened
from m3po_jax.pipeline import console

SHOWN = [
    ("a\x1b[31mred\x1b[0m", r"a\x1b[31mred\x1b[0m"),
    ("a\x1b]0;title\x07", r"a\x1b]0;title\x07"),
    ("a\x9b2J", r"a\x9b2J"),
    ("nul\x00", r"nul\x00"),
    ("back\x08\x7f", r"back\x08\x7f"),
    ("gnp\u202eexe.", r"gnp\u202eexe."),
    ("\u2066x\u2069", r"\u2066x\u2069"),
    ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
    ("lone \ud800", r"lone \ud800"),
    ("tag \U000e0041", r"tag \U000e0041"),
]
PLAIN = ["größer ≥ 4 · 評価 …", "क्‍ष 👩‍🔧", "[red]no markup[/red]", r"a\x1b as text"]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_control_codes_are_shown_and_not_sent(text, shown, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, force_terminal=True, width=200, highlight=False))
    console.say(text)
    assert harmless(text) == shown and written.getvalue() == f"{shown}\n"
    for error in (UserError(text, where=text, remedy=text), Interrupted(text)):
        assert shown in str(error) and text not in str(error)
    str(UserError(text)).encode("utf-8")


@pytest.mark.parametrize("text", PLAIN)
def test_letters_of_all_languages_stay(text):
    assert harmless(text) == text == str(UserError(text))


def test_a_line_end_forges_no_line():
    assert harmless("a\nm3po: all is well\r") == r"a\nm3po: all is well\r"
    assert str(UserError("a\nb\u2028c", where="x\r\ny")) == "x y: a b c"
    assert str(Interrupted("a\nb")) == "a b" and str(Interrupted()) == ""


@given(st.text())
def test_any_text_is_one_printable_line(text):
    shown = harmless(text)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1 and harmless(shown) == shown


def test_the_command_line_shows_them_too(capsys):
    assert main(["select", "--config", "no\x1b[2J\u202esuch.yaml"]) == 2
    printed = capsys.readouterr().err
    assert r"no\x1b[2J\u202esuch.yaml" in printed and "\x1b" not in printed and "\u202e" not in printed


def test_a_progress_bar_takes_no_markup(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, force_terminal=True, width=200))
    assert list(console.progress([1, 2], "validate [/x]\x1b[2J", 2)) == [1, 2]
    assert r"validate [/x]\x1b[2J" in written.getvalue()


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
