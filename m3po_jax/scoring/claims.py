"""Splitting an answer into claims that can be judged one by one.

A dual encoder reads a few words at a time and a judge answers one question at a time, so a long answer is judged
claim by claim (METHOD section 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from m3po_jax.evaluation import chair

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_POLARITY = re.compile(r"^\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """One statement about the image.

    Attributes:
        negated: The answer denies it.
        short: It comes from a yes/no answer, which mentions nothing else: recall has no meaning there.
    """

    text: str
    negated: bool = False
    short: bool = False


def split_claims(instruction: str, answer: str, vocabulary: chair.Vocabulary | None) -> list[Claim]:
    """The claims of an answer, in order.

    With a vocabulary of objects a claim is an object that the answer mentions, once; a yes/no answer asserts or
    denies the objects that its question names. Without one, a claim is a sentence, and a yes/no answer is joined
    to its question.
    """
    polarity = _POLARITY.match(answer)
    negated = bool(polarity) and polarity.group(1).lower() == "no"  # type: ignore[union-attr]
    if vocabulary is not None:
        text = instruction if polarity else answer
        return [Claim(name, negated, bool(polarity)) for name in dict.fromkeys(vocabulary.mentions(text))]
    if polarity:
        return [Claim(instruction.strip(), negated, True)]
    sentences = [part.strip() for part in _SENTENCE.split(answer)]
    return [Claim(part) for part in sentences if any(letter.isalnum() for letter in part)]


def object_vocabulary(names: Sequence[str]) -> chair.Vocabulary | None:
    """A vocabulary of plain object names, None for an empty list."""
    return chair.vocabulary(dict.fromkeys(names, ())) if names else None
