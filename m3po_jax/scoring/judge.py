"""A vision-language model as judge: how it is asked, and the judge of single claims (docs/judges.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from m3po_jax.data.collation import PromptRow, collate_tree
from m3po_jax.data.model_images import joined
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.scoring.alignment import Backend, Scores, check_aggregate, check_template, pool_scores
from m3po_jax.scoring.claims import Claim, object_vocabulary, split_claims
from m3po_jax.scoring.reasons import NO_IMAGE
from m3po_jax.scoring.shown_images import shared_images

STATEMENT_QUESTION = "{claim} Is this statement about the image correct? Answer yes or no."
OBJECT_QUESTION = "Is there {article} {claim} in the image? Answer yes or no."
PLAIN_QUESTION = "{claim} Answer yes or no."
SPELLINGS = {answer: (answer, answer.capitalize(), answer.upper()) for answer in ("yes", "no")}
# Questions that share one pass over their image; each costs a branch of its own in the attention.
QUESTIONS_A_ROW = 8

ImageKey = tuple[Image, ...]


def choice_tokens(
    processor: Processor, spellings: Mapping[str, Sequence[str]]
) -> tuple[list[int], dict[str, list[int]]]:
    """How a model of this tokenizer writes each of a few answers.

    Returns:
        (lead, ids): tokens that come before any answer (often none: a tokenizer may make a token of the space that
        follows the prompt), and for each answer the ids of all its spellings that are one token, perhaps none.
    """
    text = processor.text
    written = {
        spelling: [int(token) for token in processor.encode_answer(spelling)[:-1]]
        for texts in spellings.values()
        for spelling in texts
    }
    # The first tokens that all answers share decide nothing.
    lead = []
    for column in zip(*written.values(), strict=False):
        if len(set(column)) > 1:
            break
        lead.append(column[0])
    single_tokens: dict[str, list[int]] = {}
    for answer, texts in spellings.items():
        ids = set()
        for spelling in texts:
            for tokens in (written[spelling][len(lead) :], text.encode(spelling), text.encode(f" {spelling}")):
                if len(tokens) == 1 and text.decode(tokens).strip().lower() == answer:
                    ids.add(int(tokens[0]))
        single_tokens[answer] = sorted(ids)
    return lead, single_tokens


def answer_tokens(processor: Processor) -> tuple[list[int], list[int], list[int]]:
    """(lead, yes, no) as `choice_tokens` finds them.

    Raises:
        UserError: yes or no has no spelling of one token.
    """
    lead, single_tokens = choice_tokens(processor, SPELLINGS)
    for answer, ids in single_tokens.items():
        if not ids:
            raise UserError(
                f"the judge's tokenizer has no single token for {answer!r}",
                where="score.model",
                remedy="take another judge, or score.backend=similarity",
            )
    return lead, single_tokens["yes"], single_tokens["no"]


@dataclass(frozen=True)
class Question:
    """Several continuations of one prompt, each asked for its next token.

    Attributes:
        prompt: Its images are shown.
        prefix: Token ids that all branches share, images included.
        branches: Token ids that follow it, one array for each.
    """

    prompt: Prompt
    prefix: np.ndarray
    branches: list[np.ndarray]


def ask(
    scorer: Scorer, processor: Processor, questions: Sequence[Question], choices: Sequence[int]
) -> list[Float[np.ndarray, "branches choices"]]:
    """Probability of each of `choices` as the next token after every branch of every question.

    A question is cut into rows of at most `QUESTIONS_A_ROW` branches; each row encodes its images and prefix once.
    """
    longest = max((len(question.branches) for question in questions), default=0)
    # A power of two, so that few programs are compiled.
    width = min(QUESTIONS_A_ROW, 1 << max(longest - 1, 0).bit_length())
    rows = [
        (index, start)
        for index, question in enumerate(questions)
        for start in range(0, len(question.branches), width)
    ]
    probabilities = [np.zeros((len(question.branches), len(choices))) for question in questions]
    # Rows of equally many images lie together: a batch holds as many as its widest row.
    rows.sort(key=lambda row: len(questions[row[0]].prompt.images))
    for _, same in itertools.groupby(rows, key=lambda row: len(questions[row[0]].prompt.images)):
        part = list(same)
        for first in range(0, len(part), scorer.batch_size):
            block = part[first : first + scorer.batch_size]
            cut = [
                Question(questions[i].prompt, questions[i].prefix, questions[i].branches[start : start + width])
                for i, start in block
            ]
            for (index, start), row, values in zip(
                block, cut, _ask_batch(scorer, processor, cut, width, choices), strict=True
            ):
                probabilities[index][start : start + width] = values[: len(row.branches)]
    return probabilities


def _ask_batch(
    scorer: Scorer, processor: Processor, block: Sequence[Question], width: int, choices: Sequence[int]
) -> Float[np.ndarray, "rows width choices"]:
    """One batch; what stands in unused branches means nothing."""
    rows = []
    shown = shared_images(processor, [question.prompt for question in block], scorer.own_rows)
    for index, (question, images) in enumerate(zip(block, shown, strict=True)):
        branches = [*question.branches, *[np.zeros(0, np.int32)] * (width - len(question.branches))]
        joint = joined(images, processor.image_buckets)
        rows.append(PromptRow(question.prompt.id, question.prefix, joint, tuple(branches), place=index))
    tree = collate_tree(rows)
    batch = tree.prompts([row.id for row in rows])
    return scorer.choice_probabilities(batch, choices, tree.branch_ids, tree.branch_mask).astype(np.float64)


class Claims(Backend):
    """Asks a judge one yes/no question per claim: score = clip((1 + P(yes) − P(no)) / 2, 0, 1).

    P is of the full vocabulary and sums the spellings of each answer, so a judge that answers neither scores a
    claim 0.5. A denied claim counts as 1 − score; `alignment.aggregate_claims` makes one score of an answer's
    claims. All questions about one image (of all candidates, and of all prompts of a call with that image) share
    its encoding and the prompt up to it, as branches; none is asked twice in a call. Prompts without an image
    abstain.

    Args:
        scorer: Runs the judge.
        processor: The judge's own.
        aggregate: See `aggregate_claims`; ``soft_f1`` asks for every object of the vocabulary, of every image.
        vocabulary: The objects that claims are about; without it, claims are sentences.
        template: Question about a claim: ``{claim}`` is replaced by the sentence or object, ``{article}`` by "a"
            or "an". Empty: `OBJECT_QUESTION` with a vocabulary, else `STATEMENT_QUESTION`. A claim that is a
            yes/no question itself is always asked by `PLAIN_QUESTION`.
    """

    name, abstention = "claims", NO_IMAGE

    def __init__(
        self,
        scorer: Scorer,
        processor: Processor,
        *,
        aggregate: str = "mean",
        vocabulary: Sequence[str] = (),
        template: str = "",
    ):
        check_aggregate(aggregate, vocabulary)
        self.template = template or (OBJECT_QUESTION if vocabulary else STATEMENT_QUESTION)
        check_template(self.template, "score.judge_template")
        self.scorer, self.processor, self.aggregate = scorer, processor, aggregate
        self.objects, self.vocabulary = list(vocabulary), object_vocabulary(vocabulary)
        self.lead, self.yes, self.no = answer_tokens(processor)

    def question(self, claim: Claim) -> str:
        """What the judge is asked about a claim; ``<image>`` in the claim (a model wrote it) stays text."""
        text = claim.text.replace(IMAGE_PLACEHOLDER, " ").strip()
        article = "an" if text[:1].lower() in tuple("aeiou") else "a"
        template = PLAIN_QUESTION if claim.question else self.template
        return template.replace("{article}", article).replace("{claim}", text)

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        claims = [
            [split_claims(prompt.instruction, answer, self.vocabulary) for answer in pool]
            for prompt, pool in zip(prompts, pools, strict=True)
        ]
        vocabulary = [Claim(name) for name in self.objects] if self.aggregate == "soft_f1" else []
        wanted: dict[ImageKey, dict[str, None]] = {}
        shown: dict[ImageKey, Prompt] = {}
        for prompt, pool in zip(prompts, claims, strict=True):
            if prompt.images:
                shown.setdefault(prompt.images, prompt)
                asked = itertools.chain(vocabulary, *pool)
                wanted.setdefault(prompt.images, {}).update((self.question(claim), None) for claim in asked)
        answers = self._ask([(shown[key], list(questions)) for key, questions in wanted.items()])
        scores: Scores = []
        for prompt, pool in zip(prompts, claims, strict=True):
            if not prompt.images:
                scores.append(np.full(len(pool), np.nan))
                continue
            of_image = answers[prompt.images]
            mass = sum(of_image[self.question(claim)] for claim in vocabulary) if vocabulary else None
            scores.append(
                pool_scores(pool, lambda claim, of=of_image: of[self.question(claim)], self.aggregate, mass)
            )
        return scores

    def _ask(self, wanted: Sequence[tuple[Prompt, list[str]]]) -> dict[ImageKey, dict[str, float]]:
        """Scores of every question, by image."""
        asked = [Question(prompt, *self._encode(prompt, questions)) for prompt, questions in wanted]
        by_image: dict[ImageKey, dict[str, float]] = {}
        count = len(self.yes)
        for (prompt, questions), p in zip(
            wanted, ask(self.scorer, self.processor, asked, [*self.yes, *self.no]), strict=True
        ):
            values = np.clip((1.0 + p[:, :count].sum(-1) - p[:, count:].sum(-1)) / 2.0, 0.0, 1.0)
            by_image[prompt.images] = dict(zip(questions, values.tolist(), strict=True))
        return by_image

    def _encode(self, prompt: Prompt, questions: Iterable[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Token ids up to the last image, which all questions share, and what follows it for each."""
        prefix, branches = np.zeros(0, np.int32), []
        for question in questions:
            asked = Prompt(prompt.id, prompt.images, question, where=prompt.where or f"id {prompt.id!r}")
            ids = self.processor.encode_prompt(asked)
            split = int(np.flatnonzero(ids == self.processor.image_token_id)[-1]) + 1
            prefix = ids[:split]
            branches.append(np.array([*ids[split:], *self.lead], np.int32))
        return prefix, branches
