"""How two harnesses read yes/no answers, beside the benchmarks' own scripts; what is neither is its third word."""

from __future__ import annotations

from m3po_jax.evaluation.short_answer import without_punctuation

UNKNOWN, OTHER = "unknown", "other"
VLMEVALKIT = "YOrN_Extraction of VLMEvalKit (2025): yes or no is a word of the answer, and the other is not"


def vlmevalkit(text: str) -> str:
    """``yes`` or ``no`` where it alone of both is a word of the answer without its punctuation, else ``unknown``."""
    words = without_punctuation(text.lower()).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else UNKNOWN


def lmms_eval_pope(text: str) -> str:
    """``yes`` or ``no`` where that is the whole answer, spaces and case aside, else ``other``."""
    said = text.lower().strip()
    return said if said in ("yes", "no") else OTHER


def lmms_eval_mme(text: str) -> str:
    """``yes`` or ``no`` within the first four characters (of an answer of one letter: y or n) once full stops and
    outer spaces are gone, else ``other``."""
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, OTHER)
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else OTHER
