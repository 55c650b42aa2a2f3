"""Answers on the host: cut at stop strings, and told from their duplicates.

The device knows tokens, not text: it decodes on to the end token or the limit, and what follows a stop string is
dropped here. Stop strings therefore make answers shorter, not generation faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Answer:
    """One answer: its text, how many of its tokens make that text, and why it ended.

    Attributes:
        finish_reason: ``stop`` (the end token), ``length`` (the limit) or ``stop_string``.
    """

    text: str
    length: int
    finish_reason: str


def finish(
    token_ids: Int[np.ndarray, " t"],
    finished: bool,
    decode: Callable[[Int[np.ndarray, " t"]], str],
    stop: Sequence[str] = (),
) -> Answer:
    """The answer in `token_ids`, cut before the earliest stop string; the stop string is not part of it.

    Of the tokens the fewest are kept that make the text. One that holds both the text's end and the beginning of
    the stop string stays whole, and at least one token stays, so that every answer has a confidence.

    Args:
        token_ids: up to the end token, that included.
        finished: the end token was drawn.
        decode: tokens to text; drops special tokens and outer white space.
    """
    text = decode(token_ids)
    starts = [at for at in (text.find(string) for string in stop) if at >= 0]
    if not starts:
        return Answer(text, len(token_ids), "stop" if finished else "length")
    kept = text[: min(starts)].strip()
    # A token can be part of a character, so that the text of a prefix is not always a prefix of the text.
    enough = (n for n in range(1, len(token_ids)) if decode(token_ids[:n]).startswith(kept))
    return Answer(kept, next(enough, len(token_ids)), "stop_string")


def repeats(texts: Sequence[str], fresh: Collection[int]) -> list[int]:
    """Those of the `fresh` candidates whose text another one has: all others come first, then `fresh` in order."""
    taken = {text for k, text in enumerate(texts) if k not in fresh}
    repeated = []
    for k in sorted(fresh):
        if texts[k] in taken:
            repeated.append(k)
        taken.add(texts[k])
    return repeated
