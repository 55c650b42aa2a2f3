"""Splitting an answer into claims that can be judged one by one.

A dual encoder reads a few words at a time and a judge answers one question at a time, so a long answer is judged
claim by claim (docs/judges.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from m3po_jax.evaluation import chair

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_BULLET = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+", re.MULTILINE)
_POLARITY = re.compile(r"^\W*(yes|no)\b", re.IGNORECASE)
_STANDS_ALONE = re.compile(r"\s*(?:$|[,.;:!\n–—-])")
_OPEN_QUESTION = re.compile(r"\b(?:what|which|who|whom|whose|where|when|why|how)\b", re.IGNORECASE)
SHORT_WORDS = 4  # an answer of up to so many words means nothing without its question


@dataclass(frozen=True)
class Claim:
    """One statement about the image.

    Attributes:
        negated: The answer denies it.
        short: It comes from a short answer to a question, which claims nothing else: recall has no meaning there.
        question: The text is a yes/no question, not a statement.
    """

    text: str
    negated: bool = False
    short: bool = False
    question: bool = False


def polarity(instruction: str, answer: str) -> str | None:
    """``yes`` or ``no`` where the answer answers a yes/no question, else None ("No people are to be seen.")."""
    polarity = _POLARITY.match(answer)
    if polarity is None or ("?" not in instruction and "yes or no" not in instruction.lower()):
        return None
    if _STANDS_ALONE.match(answer[polarity.end() :]) or not _OPEN_QUESTION.search(instruction):
        return polarity.group(1).lower()
    return None


def sentences(text: str) -> list[str]:
    """Sentences and list items that have a letter or digit, in order, without bullets and numbering."""
    parts = (part.strip() for part in _SENTENCE.split(_BULLET.sub("", text)))
    return [part for part in parts if any(letter.isalnum() for letter in part)]


def split_claims(instruction: str, answer: str, vocabulary: chair.Vocabulary | None) -> list[Claim]:
    """The claims of an answer, in order.

    With a vocabulary of objects a claim is an object that the answer mentions, once; a yes/no answer asserts or
    denies the objects that its question names. Without one, a claim is a sentence; a yes/no answer asserts or
    denies its question, whatever else it says being further claims, and another short answer to a question is
    joined to it.
    """
    said = polarity(instruction, answer)
    if vocabulary is not None:
        text = instruction if said else answer
        return [Claim(name, said == "no", said is not None) for name in dict.fromkeys(vocabulary.mentions(text))]
    parts = sentences(answer)
    # What follows the last question mark says how to answer ("Answer with a single word.").
    question = instruction[: instruction.rfind("?") + 1].strip()
    if said:
        rest = parts[1:]
        return [Claim(question or instruction.strip(), said == "no", not rest, True), *map(Claim, rest)]
    if question and len(parts) == 1 and len(parts[0].split()) <= SHORT_WORDS:
        return [Claim(f"{question} {parts[0]}", short=True)]
    return [Claim(part) for part in parts]


def object_vocabulary(names: Sequence[str]) -> chair.Vocabulary | None:
    """A vocabulary of plain object names, None for an empty list."""
    return chair.vocabulary(dict.fromkeys(names, ())) if names else None
