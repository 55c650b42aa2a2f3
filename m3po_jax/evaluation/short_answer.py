"""Exact match of short answers, normalised as in the official VQA evaluation (Antol et al., 2015)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_reference,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, join, text_field

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# Official oddity: the look-behind is mistyped there and never holds, so that only a following digit keeps a
# full stop.
_FULL_STOP = re.compile(r"\.(?!\d)")
# Official oddity: the flags argument lands on the count, so that at most 32 full stops go.
_FULL_STOPS = 32
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# An apostrophe left out is put back.
_CONTRACTED = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def without_punctuation(text: str) -> str:
    """Marks go, or become spaces where they stand between words and no comma stands in a number; so do full stops."""
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        glued = f"{mark} " not in text and f" {mark}" not in text and not has_digit_comma
        result = result.replace(mark, " " if glued else "")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS)


def normalize(text: str) -> str:
    """Lower-case without articles and punctuation, number words as digits, contractions with apostrophes."""
    plain = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def llava_normalize(text: str) -> str:
    """What LLaVA makes of a prediction before it submits it: `EvalAIAnswerProcessor` of its m4c_evaluator.py.

    Before the official normalisation, of which it has a copy, commas and question marks go and "'s" becomes a word.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize(text)


def short_answers(answers: Iterable[Record], references: Iterable[Record]) -> dict[str, Any]:
    """Exact-match accuracy of short answers, in all and by type.

    Args:
        answers: ``{"id", "text"}``.
        references: ``{"id", "reference"}``; ``category`` (the type of answer) and ``image`` may be added.

    Returns:
        ``summary`` and ``categories`` (n, correct, accuracy; None of nothing, with `degenerate` saying so)
        and ``items``.

    Raises:
        UserError: when ids do not match, or a field is no text.
    """
    items: list[dict[str, Any]] = []
    for answer, reference in join(answers, references):
        text, expected = text_field(answer), text_field(reference, "reference")
        parsed = normalize(text)
        items.append(
            {
                "id": str(reference["id"]),
                "image": reference.get("image"),
                "category": reference.get("category") or "all",
                "text": text,
                "parsed": parsed,
                "reference": expected,
                "correct": parsed == normalize(expected),
            }
        )
    names = sorted({item["category"] for item in items})
    return {
        "summary": accuracy(items),
        "categories": {name: accuracy([item for item in items if item["category"] == name]) for name in names},
        "items": items,
    }


def sums(item: Item) -> list[float]:
    """What an answer adds: whether it is right, and 1."""
    return [bool(item["correct"]), 1]


def rates(sums: Sums) -> Rates:
    """Accuracy from `sums`."""
    return {"accuracy": ratio(sums[..., 0], sums[..., 1])}


def accuracy(items: Sequence[Item]) -> dict[str, Any]:
    """How many of the items are correct."""
    return {
        "n": len(items),
        "correct": sum(bool(item["correct"]) for item in items),
        "accuracy": values(sums, rates, items).get("accuracy"),
        "degenerate": [] if items else ["there are no questions"],
    }


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    return short_answers(answers, [as_label(prompt, reference=prompt.reference) for prompt in prompts])


METRIC = Metric(
    rules={"vqa": "equal after the normalisation of GT-Vision-Lab/VQA's vqaEval.py"},
    needs="`reference`",
    missing=needs_reference,
    score=_score,
    sums=sums,
    rates=rates,
    columns=(Column("accuracy", "Acc", "higher", "share of right answers (%)"),),
    deciding=("accuracy",),
)
