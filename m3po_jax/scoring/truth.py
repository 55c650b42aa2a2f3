"""Which candidates are known to be right: from the data's own annotations, for calibration only."""

from __future__ import annotations

from m3po_jax.data.schema import Prompt
from m3po_jax.evaluation import chair
from m3po_jax.evaluation.short_answer import normalize
from m3po_jax.scoring.alignment import agrees
from m3po_jax.scoring.claims import SHORT_WORDS

OBJECTS, REFERENCE = "objects", "reference"
MEANINGS = {
    OBJECTS: "answers that name objects, and none that the image lacks",
    REFERENCE: "short answers that say what the reference says",
}


def objects_of(prompt: Prompt) -> list[str] | None:
    """The names of what the image shows, where the row lists them; other programs' `objects` are other things."""
    named = prompt.metadata.get("objects")
    return named if isinstance(named, list) and all(isinstance(name, str) for name in named) else None


def known_truth(prompt: Prompt, answer: str, vocabulary: chair.Vocabulary | None) -> tuple[str, bool] | None:
    """(kind of ground truth, whether the answer is right), None where nobody knows.

    A short reference answer is compared as in VQA (yes and no by what is said). Otherwise, where the image's objects
    are listed, an answer is right if it names no other object of the vocabulary; one that names none is unknown.
    """
    objects = objects_of(prompt)
    caption = prompt.metadata.get("kind") == "caption"
    wanted = normalize(prompt.reference) if prompt.reference is not None and not caption else ""
    if wanted and len(wanted.split()) <= SHORT_WORDS:
        return REFERENCE, agrees(prompt.instruction, answer, wanted)
    if vocabulary is not None and objects is not None:
        mentioned = vocabulary.mentions(answer)
        if mentioned:
            return OBJECTS, set(mentioned) <= set(objects)
    return None
