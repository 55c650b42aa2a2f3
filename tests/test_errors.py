"""Lines for the person at the terminal: what somebody else wrote is shown, and does nothing."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from m3po_jax.cli import main
from m3po_jax.errors import Interrupted, UserError, harmless
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
