"""A vision-language model as judge of single claims, and ensembles of backends (METHOD section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.data.batches import TreeRow, collate_tree
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError
from m3po_jax.generation.engine import PromptBatch
from m3po_jax.models.safetensors_io import open_directory
from m3po_jax.scoring.alignment import Backend, Scores, check_aggregate, pool_scores
from m3po_jax.scoring.calibration import correlation
from m3po_jax.scoring.claims import Claim, object_vocabulary, split_claims
from m3po_jax.scoring.engine import Scorer
from m3po_jax.scoring.m3p import z_scores

STATEMENT_QUESTION = "{claim} Is this statement about the image correct? Answer yes or no."
OBJECT_QUESTION = "Is there {article} {claim} in the image? Answer yes or no."
PLAIN_QUESTION = "{claim} Answer yes or no."
SPELLINGS = {answer: (answer, answer.capitalize(), answer.upper()) for answer in ("yes", "no")}
# Questions that share one pass over their image; each costs a branch of its own in the attention.
QUESTIONS_A_ROW = 8

ImageKey = tuple[Image, ...]


def answer_tokens(processor: Processor) -> tuple[list[int], list[int], list[int]]:
    """How a model of this tokenizer writes yes and no.

    Returns:
        (lead, yes, no): tokens that come before either answer (often none: a tokenizer may make a token of the
        space that follows the prompt), and the ids of all spellings of yes and of no that are one token.

    Raises:
        UserError: yes or no has no spelling of one token.
    """
    text = processor.text
    written = {
        spelling: [int(token) for token in processor.encode_answer(spelling)[:-1]]
        for spellings in SPELLINGS.values()
        for spelling in spellings
    }
    # The first tokens that all answers share decide nothing.
    lead = []
    for column in zip(*written.values(), strict=False):
        if len(set(column)) > 1:
            break
        lead.append(column[0])
    found: dict[str, list[int]] = {}
    for answer, spellings in SPELLINGS.items():
        ids = set()
        for spelling in spellings:
            for tokens in (written[spelling][len(lead) :], text.encode(spelling), text.encode(f" {spelling}")):
                if len(tokens) == 1 and text.decode(tokens).strip().lower() == answer:
                    ids.add(int(tokens[0]))
        if not ids:
            raise UserError(
                f"the judge's tokenizer has no single token for {answer!r}",
                where="score.model",
                remedy="take another judge, or score.backend=similarity",
            )
        found[answer] = sorted(ids)
    return lead, found["yes"], found["no"]


class Claims:
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

    name = "claims"

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
        if "{claim}" not in self.template:
            raise UserError(f"no {{claim}} in {template!r}", where="score.judge_template")
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
        known = self._ask([(shown[key], list(questions)) for key, questions in wanted.items()])
        scores: Scores = []
        for prompt, pool in zip(prompts, claims, strict=True):
            if not prompt.images:
                scores.append(np.full(len(pool), np.nan))
                continue
            of_image = known[prompt.images]
            mass = sum(of_image[self.question(claim)] for claim in vocabulary) if vocabulary else None
            scores.append(
                pool_scores(pool, lambda claim, of=of_image: of[self.question(claim)], self.aggregate, mass)
            )
        return scores

    def _ask(self, wanted: Sequence[tuple[Prompt, list[str]]]) -> dict[ImageKey, dict[str, float]]:
        """Scores of every question, by image."""
        longest = max((len(questions) for _, questions in wanted), default=0)
        # A power of two, so that few programs are compiled.
        width = min(QUESTIONS_A_ROW, 1 << max(longest - 1, 0).bit_length())
        rows = [
            (prompt, questions[start : start + width])
            for prompt, questions in wanted
            for start in range(0, len(questions), width)
        ]
        found: dict[ImageKey, dict[str, float]] = {prompt.images: {} for prompt, _ in wanted}
        # Rows of equally many images lie together: a batch holds as many as its widest row.
        rows.sort(key=lambda row: len(row[0].images))
        for _, same in itertools.groupby(rows, key=lambda row: len(row[0].images)):
            part = list(same)
            for start in range(0, len(part), self.scorer.batch_size):
                block = part[start : start + self.scorer.batch_size]
                for (prompt, questions), values in zip(block, self._probabilities(block, width), strict=True):
                    found[prompt.images].update(zip(questions, values.tolist(), strict=False))
        return found

    def _probabilities(self, block: Sequence[tuple[Prompt, list[str]]], width: int) -> np.ndarray:
        """Scores [rows, width] of one batch; what stands in unused branches means nothing."""
        rows = []
        for index, (prompt, questions) in enumerate(block):
            prefix, branches = self._encode(prompt, questions)
            branches += [np.zeros(0, np.int32)] * (width - len(branches))
            rows.append(
                TreeRow(prefix, self.processor.pixel_values(prompt), tuple(branches), (math.nan,) * width, index)
            )
        tree = collate_tree(rows)
        batch = PromptBatch(
            [prompt.id for prompt, _ in block],
            np.asarray(tree.prefix_ids),
            np.asarray(tree.prefix_mask),
            None if tree.pixel_values is None else np.asarray(tree.pixel_values),
        )
        p = self.scorer.choice_probabilities(
            batch, [*self.yes, *self.no], np.asarray(tree.branch_ids), np.asarray(tree.branch_mask)
        ).astype(np.float64)
        count = len(self.yes)
        return np.clip((1.0 + p[..., :count].sum(-1) - p[..., count:].sum(-1)) / 2.0, 0.0, 1.0)

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


class Ensemble:
    """Several backends as one, with equal say in the ranking; abstains where they disagree.

    The members' scores are z-scored within the pool and averaged, then put back on the members' own scale: the
    mean of their pool means plus the mean of their pool deviations times that average, clipped to [0, 1]. So one
    member (or several equal ones) gives its own scores, and absolute thresholds keep their meaning.

    A pool is NaN where a member abstains, or where two members that both see a contrast (standard deviation at
    least `min_contrast`) disagree: their rank correlation (Spearman) is below `min_correlation`, or each holds the
    other's best candidate for worse than its own best by more than `max_gap`.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Sequence[Backend],
        *,
        min_correlation: float = 0.0,
        max_gap: float = 0.25,
        min_contrast: float = 1e-3,
    ):
        if not members:
            raise UserError("an ensemble needs members", where="score.members", remedy="name at least one backend")
        self.members = list(members)
        self.min_correlation, self.max_gap, self.min_contrast = min_correlation, max_gap, min_contrast

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        scored = [member(prompts, pools) for member in self.members]
        return [self._join(np.stack(arrays)) for arrays in zip(*scored, strict=True)]

    def _join(self, scores: np.ndarray) -> np.ndarray:
        """Scores [members, candidates] to one per candidate."""
        if not np.isfinite(scores).all() or self._disagree(scores):
            return np.full(scores.shape[1], np.nan)
        if not scores.size:
            return np.zeros(0)
        z = np.mean([z_scores(row) for row in scores], axis=0)
        return np.clip(scores.mean() + scores.std(axis=1).mean() * z, 0.0, 1.0)

    def _disagree(self, scores: np.ndarray) -> bool:
        telling = [row for row in scores if row.size and row.std() >= self.min_contrast]
        for first, second in itertools.combinations(telling, 2):
            if correlation(_ranks(first), _ranks(second)) < self.min_correlation:  # NaN below three candidates
                return True
            # Of several best candidates a member prefers the one that the other likes most.
            a, b = np.lexsort((second, first))[-1], np.lexsort((first, second))[-1]
            if min(first[a] - first[b], second[b] - second[a]) > self.max_gap:
                return True
        return False


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean rank."""
    below, above = values[:, None] > values, values[:, None] < values
    return (below.sum(1) - above.sum(1)) / 2


_PATCH_EMBEDDING = "embeddings.patch_embedding.weight"


def shared_blind_spots(
    policy_directory: str | Path,
    judge_directory: str | Path,
    policy_raw_config: dict[str, Any],
    judge_raw_config: dict[str, Any],
) -> str | None:
    """A warning where the judge cannot see what the policy does not see, else None.

    That is where both are the same model, or have the same vision encoder: towers of one shape whose patch
    embeddings are (nearly) parallel, so that a fine-tuned copy counts. Without stored weights the shape decides.
    """
    policy, judge = Path(policy_directory), Path(judge_directory)
    if policy.resolve() == judge.resolve():
        return "the judge is the policy itself: it shares the policy's blind spots, and MAS cannot correct them"
    shape = _tower_shape(policy_raw_config)
    if shape is None or shape != _tower_shape(judge_raw_config):
        return None
    ours, theirs = _patch_embedding(policy), _patch_embedding(judge)
    if ours is None or theirs is None:
        return (
            "the judge's vision encoder has the policy's shape; if it is the same one, both share their blind spots"
        )
    if ours.shape != theirs.shape or _cosine(ours, theirs) < 0.99:
        return None
    return "the judge has the policy's vision encoder: what it does not see, MAS cannot correct"


def _tower_shape(raw: dict[str, Any]) -> tuple[Any, ...] | None:
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        return None
    return tuple(vision.get(name) for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"))


def _patch_embedding(directory: Path) -> np.ndarray | None:
    try:
        tensors = open_directory(directory)
        found = next((tensor for name, tensor in tensors.items() if name.endswith(_PATCH_EMBEDDING)), None)
        return None if found is None else found.read().astype(np.float64).ravel()
    except UserError:
        return None


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-30))
