"""A vision-language model that grades answers by a rubric: the expected grade from its logits (docs/judges.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from m3po_jax.data.schema import Prompt
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError, nearest
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.scoring.alignment import Backend, Judged, Scores
from m3po_jax.scoring.judge import Question, ask, choice_tokens
from m3po_jax.scoring.reasons import NO_GRADE, NO_IMAGE, NO_REFERENCE

# The answer stands last: what comes before it is encoded once for all candidates of a prompt.
DEFAULT_RUBRIC = (
    "Grade how well an answer fits the image, from {lowest} to {highest}. {highest}: all that it says is to be seen "
    "in the image, and it does what is asked. {lowest}: it is wrong, or about something else. What is asked: "
    "{instruction} The answer: {answer} Reply with the grade alone."
)
PLACEHOLDERS = ("instruction", "answer", "reference", "lowest", "highest")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def check_rubric(rubric: str, grades: Sequence[int]) -> None:
    """UserError unless the rubric asks about the answer and there are grades to give."""
    where = "score.rubric"
    for name in _PLACEHOLDER.findall(rubric):
        if name not in PLACEHOLDERS:
            raise UserError(f"unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}", where=where)
    if rubric and "{answer}" not in rubric:
        raise UserError("no {answer} in the rubric", where=where, remedy="say where the answer goes")
    if len(set(grades)) < 2 or len(set(grades)) < len(grades) or list(grades) != sorted(grades):
        raise UserError(
            f"expected at least two ascending grades, not {list(grades)}",
            where="score.grades",
            remedy="[1, 2, 3, 4, 5]",
        )


def render_rubric(rubric: str, prompt: Prompt, answer: str, grades: Sequence[int]) -> str:
    """The rubric about one answer; ``<image>`` and braces in what a user or a model wrote stay text."""
    values: Mapping[str, str] = {
        "instruction": prompt.instruction.replace(IMAGE_PLACEHOLDER, " ").strip(),
        "answer": answer.replace(IMAGE_PLACEHOLDER, " ").strip(),
        "reference": (prompt.reference or "").replace(IMAGE_PLACEHOLDER, " ").strip(),
        "lowest": str(grades[0]),
        "highest": str(grades[-1]),
    }
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], rubric or DEFAULT_RUBRIC)


def grade_tokens(processor: Processor, grades: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """(lead, ids of each grade), see `judge.choice_tokens`; a grade counts as written after the prompt.

    Raises:
        UserError: a grade is not one token there. Its first digit alone would also stand for other grades.
    """
    names = [str(grade) for grade in grades]
    lead, spelled = choice_tokens(processor, {name: (name,) for name in names})
    for name in names:
        rest = [int(token) for token in processor.encode_answer(name)[:-1]][len(lead) :]
        if len(rest) != 1 or rest[0] not in spelled[name]:
            pieces = ", ".join(repr(processor.text.convert_ids_to_tokens(token)) for token in rest[:6])
            raise UserError(
                f"grade {name} is not one token of the judge's tokenizer ({pieces})",
                where="score.grades",
                remedy="take grades of one digit, such as [1, 2, 3, 4, 5], or another judge",
            )
    return lead, [spelled[name] for name in names]


class Judge(Backend):
    """Asks a judge for a grade: score = (E[grade] − lowest) / (highest − lowest).

    E is over the grade tokens, from the judge's next-token probabilities, each grade's spellings added up. All
    candidates of a prompt share one encoding of the image and of the rubric up to the first token in which they
    differ. A prompt without an image abstains, and so does one without a reference if the rubric asks for it, and
    an answer for which all grades together are less likely than `min_mass`: there the judge would say something else.

    Args:
        scorer: Runs the judge.
        processor: The judge's own.
        rubric: With ``{instruction}``, ``{answer}`` and, if wanted, ``{reference}``, ``{lowest}`` and ``{highest}``;
            empty: `DEFAULT_RUBRIC`.
        grades: Ascending integers, each one token for the judge.
        min_mass: Least probability of all grades together.
    """

    name = "judge"

    def __init__(
        self,
        scorer: Scorer,
        processor: Processor,
        *,
        rubric: str = "",
        grades: Sequence[int] = (1, 2, 3, 4, 5),
        min_mass: float = 0.05,
    ):
        check_rubric(rubric, grades)
        self.scorer, self.processor, self.rubric, self.grades = scorer, processor, rubric, list(grades)
        self.lead, self.tokens = grade_tokens(processor, self.grades)
        self.needs_reference = "{reference}" in rubric
        self.min_mass = min_mass

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return self.judged(prompts, pools).scores

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        """Scores, and why an answer has none."""
        scores: Scores = [np.full(len(pool), np.nan) for pool in pools]
        reasons: list[list[str | None]] = []
        asked: list[tuple[int, list[str]]] = []
        for index, (prompt, pool) in enumerate(zip(prompts, pools, strict=True)):
            why = NO_IMAGE if not prompt.images else None
            if why is None and self.needs_reference and not (prompt.reference or "").strip():
                why = NO_REFERENCE
            reasons.append([why] * len(pool))
            if why is None and pool:
                asked.append((index, list(dict.fromkeys(pool))))
        questions = [self._question(prompts[index], answers) for index, answers in asked]
        choices = [token for ids in self.tokens for token in ids]
        for (index, answers), p in zip(asked, ask(self.scorer, self.processor, questions, choices), strict=True):
            expected = dict(zip(answers, self._expected(p), strict=True))
            scores[index] = np.array([expected[answer] for answer in pools[index]], np.float64)
            reasons[index] = [None if np.isfinite(value) else NO_GRADE for value in scores[index]]
        return Judged(scores, reasons)

    def _expected(self, p: np.ndarray) -> np.ndarray:
        """Probabilities [answers, spellings] to scores [answers]."""
        ends = np.cumsum([len(ids) for ids in self.tokens])
        of_grade = np.stack([part.sum(-1) for part in np.split(p, ends[:-1], axis=-1)], axis=-1)
        mass = of_grade.sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = of_grade @ np.array(self.grades, np.float64) / mass
        score = (expected - self.grades[0]) / (self.grades[-1] - self.grades[0])
        return np.where((mass >= self.min_mass) & (mass > 0), np.clip(score, 0.0, 1.0), np.nan)

    def _question(self, prompt: Prompt, answers: Sequence[str]) -> Question:
        """One prompt's answers as branches behind the longest prefix that all of them share."""
        where = prompt.where or f"id {prompt.id!r}"
        encoded = []
        for answer in answers:
            text = render_rubric(self.rubric, prompt, answer, self.grades)
            encoded.append(self.processor.encode_prompt(Prompt(prompt.id, prompt.images, text, where=where)))
        shortest = min(map(len, encoded)) - 1  # a branch of its own for a lone answer too
        heads = np.stack([ids[:shortest] for ids in encoded])
        differ = np.flatnonzero((heads != heads[0]).any(axis=0))
        split = int(differ[0]) if differ.size else shortest
        return Question(
            prompt, encoded[0][:split], [np.array([*ids[split:], *self.lead], np.int32) for ids in encoded]
        )
