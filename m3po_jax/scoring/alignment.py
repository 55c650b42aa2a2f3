"""Multimodal Alignment Scores: functions from (image, instruction, candidates) to [0, 1] (docs/judges.md).

A backend scores the whole candidate pool of a batch of prompts; NaN means that it abstains, and the selection
drops the prompt. Only the orchestration is here: models run in `models/` and `inference/scorer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.data.dual_inputs import DualEncoderProcessor
from m3po_jax.data.padding import bucket
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.short_answer import normalize
from m3po_jax.hosts.rows import own_rows
from m3po_jax.hosts.sharding import shard_batch, to_host, use_mesh
from m3po_jax.scoring.claims import Claim, object_vocabulary, polarity, split_claims
from m3po_jax.scoring.reasons import ABSTAINED, NO_IMAGE, NO_REFERENCE
from m3po_jax.scoring.shown_images import shared_images

Scores = list[np.ndarray]
AGGREGATES = ("mean", "min", "soft_f1")
UNITS = ("whole", "claim")
# Texts whose embeddings are kept between calls; sentences of free text are rarely met again.
KEPT_TEXTS = 50_000


Reasons = list[list[str | None]]


@dataclass(frozen=True)
class Judged:
    """What a backend says of a batch of pools.

    Attributes:
        scores: One array per prompt.
        reasons: Why a score is NaN, None where it is not; one list per prompt.
        columns: Further scores by column name, such as an ensemble's members.
        notes: More about a reason, such as what a server said last.
    """

    scores: Scores
    reasons: Reasons
    columns: Mapping[str, Scores] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class Backend(ABC):
    """Scores pools of candidates. One that says no more than scores implements `__call__`, another one `judged`.

    Attributes:
        name: Its column is ``mas_<name>``.
        columns: The names of further columns, which `judged` gives.
        abstention: Why it gives no score, where it has a single reason.
    """

    name: str
    columns: Sequence[str] = ()
    abstention: str = ABSTAINED

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        """One array of scores in [0, 1] per prompt, one entry per candidate; NaN where it abstains."""

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        """Scores, and why a candidate has none."""
        scores = self(prompts, pools)
        why = self.abstention
        return Judged(scores, [[None if has_score else why for has_score in np.isfinite(row)] for row in scores])

    def usages(self) -> list[dict[str, Any]]:
        """What was asked of servers and paid, an entry for each."""
        return []


def judge_pools(backend: Backend, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
    """What a backend says of pools, a score for every candidate.

    Raises:
        UserError: it gave another number of scores or reasons.
    """
    judged = backend.judged(prompts, pools)
    expected = [len(pool) for pool in pools]
    parts: dict[str, Sequence[Any]] = {"scores": judged.scores, "reasons": judged.reasons, **judged.columns}
    for what, rows in parts.items():
        counts = [len(row) for row in rows]
        if counts != expected:
            raise UserError(f"{what} of {counts} candidates, not {expected}", where=f"backend {backend.name}")
    return judged


def aggregate_claims(probabilities: Sequence[float], rule: str, vocabulary_mass: float | None = None) -> float:
    """Claim probabilities to one score.

    ``mean`` and ``min`` are over the claims made. ``soft_f1`` is the harmonic mean of the claims' mean probability
    (soft precision) and their share of `vocabulary_mass`, the summed probability of every claim that could have
    been made (soft recall): unlike precision it does not reward brevity. No claim scores 0 under each rule.
    """
    if not len(probabilities):
        return 0.0
    values = np.asarray(probabilities, np.float64)
    if rule == "mean":
        return float(values.mean())
    if rule == "min":
        return float(values.min())
    if rule == "soft_f1":
        assert vocabulary_mass is not None
        precision, recall = values.mean(), min(values.sum() / max(vocabulary_mass, 1e-9), 1.0)
        return float(2 * precision * recall / max(precision + recall, 1e-9))
    raise UserError(f"unknown rule {rule!r}{nearest(rule, AGGREGATES)}", where="score.aggregate")


def check_aggregate(rule: str, vocabulary: Sequence[str]) -> None:
    """UserError unless `rule` is one of `AGGREGATES` and has what it needs."""
    if rule not in AGGREGATES:
        raise UserError(f"unknown rule {rule!r}{nearest(rule, AGGREGATES)}", where="score.aggregate")
    if rule == "soft_f1" and not vocabulary:
        raise UserError("soft_f1 needs the claims that could be made", where="score.vocabulary")


def check_template(template: str, where: str) -> None:
    """UserError unless the template says where a claim goes."""
    if "{claim}" not in template:
        raise UserError(f"no {{claim}} in {template!r}", where=where)


def pool_scores(
    pool: Sequence[Sequence[Claim]], probability: Callable[[Claim], float], rule: str, mass: float | None
) -> np.ndarray:
    """One score per candidate from its claims; a denied claim counts as 1 − p, a short answer by its mean."""
    scores = []
    for claims in pool:
        values = [1.0 - probability(c) if c.negated else probability(c) for c in claims]
        scores.append(aggregate_claims(values, "mean" if claims and claims[0].short else rule, mass))
    return np.array(scores, np.float64)


@partial(jax.jit, static_argnums=0)
def _image_embeddings(graph: Any, state: Any, pixels: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).encode_image(pixels)


@partial(jax.jit, static_argnums=0)
def _text_embeddings(graph: Any, state: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).encode_text(ids, mask)


@partial(jax.jit, static_argnums=0)
def _pair_logits(graph: Any, state: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).logits(images, texts)


class Similarity(Backend):
    """A CLIP or SigLIP dual encoder, on whole answers or claim by claim.

    SigLIP's score is its probability, sigmoid(logit), and so is that of a model whose bias was trained; CLIP's is
    CLIPScore, min(2.5 · max(cos, 0), 1) (Hessel et al., arXiv:2104.08718). Of several images the best counts.

    Args:
        unit: ``claim``, or ``whole``: each answer as it stands, cut to the model's text window; `aggregate`,
            `vocabulary` and `template` do not apply to it.
        aggregate: See `aggregate_claims`.
        vocabulary: The objects that claims are about; without it, claims are sentences.
        template: Text that stands for one claim, with ``{claim}`` in it.
        batch_size: Images, and texts, of one pass.
    """

    name, abstention = "similarity", NO_IMAGE

    def __init__(
        self,
        model: Any,
        processor: DualEncoderProcessor,
        mesh: Mesh,
        *,
        unit: str = "claim",
        aggregate: str = "mean",
        vocabulary: Sequence[str] = (),
        template: str = "{claim}",
        batch_size: int = 32,
    ):
        if unit not in UNITS:
            raise UserError(f"unknown unit {unit!r}{nearest(unit, UNITS)}", where="score.unit")
        check_aggregate(aggregate, vocabulary)
        check_template(template, "score.claim_template")
        self.processor, self.mesh, self.unit = processor, mesh, unit
        self.aggregate = "mean" if unit == "whole" else aggregate
        self.objects = list(vocabulary)
        self.vocabulary = object_vocabulary(vocabulary)
        self.template, self.batch_size = template, bucket(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
        self.graph, self.state = nnx.split(model)
        self.probabilistic = model.config.kind == "siglip" or model.config.pooling == "patches"
        self.texts: dict[str, np.ndarray] = {}

    def _embed_texts(self, texts: Sequence[str]) -> None:
        """Adds the embeddings of unseen texts to the cache, in batches of one compiled shape."""
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            ids, mask = self.processor.encode_texts(part + part[-1:] * (self.batch_size - len(part)))
            embedded = to_host(_text_embeddings(self.graph, self.state, *shard_batch((ids, mask), self.mesh)))
            self.texts.update(zip(part, embedded[: len(part)], strict=True))

    def _scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Scores in [0, 1] of texts against one prompt's images ([m, n, e]); the best image counts."""
        matrix = np.stack([self.texts[text] for text in texts])
        if not (np.isfinite(matrix).all() and np.isfinite(images).all()):
            raise UserError(
                "the dual encoder's embeddings are not finite",
                where="score.model",
                remedy="check its weights",
            )
        if not self.probabilistic:
            return np.clip(2.5 * np.max(images[:, 0] @ matrix.T, axis=0), 0.0, 1.0)
        # Padded to a few sizes, so that the product is compiled a handful of times.
        width = max(8, 1 << (len(texts) - 1).bit_length())
        padded = np.concatenate([matrix, np.repeat(matrix[-1:], width - len(texts), axis=0)])
        logits = to_host(_pair_logits(self.graph, self.state, images, padded))[:, : len(texts)].max(axis=0)
        return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))

    def _claims(self, prompt: Prompt, answer: str) -> list[Claim]:
        if self.unit == "claim":
            return split_claims(prompt.instruction, answer, self.vocabulary)
        return [Claim(answer)] if any(letter.isalnum() for letter in answer) else []

    def _render(self, text: str) -> str:
        return self.template.replace("{claim}", text) if self.unit == "claim" else text

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        claims = [
            [self._claims(prompt, answer) for answer in pool] for prompt, pool in zip(prompts, pools, strict=True)
        ]
        if len(self.texts) > KEPT_TEXTS:
            self.texts.clear()
        with use_mesh(self.mesh):
            self._embed_texts([self._render(c.text) for pool in claims for answer in pool for c in answer])
            if self.aggregate == "soft_f1":
                self._embed_texts([self._render(name) for name in self.objects])
            scores: Scores = []
            for start in range(0, len(prompts), self.batch_size):
                part = prompts[start : start + self.batch_size]
                embedded = self._embed_images(part)
                for images, pool in zip(embedded, claims[start : start + self.batch_size], strict=True):
                    scores.append(self._score_pool(images, pool))
            return scores

    def _embed_images(self, prompts: Sequence[Prompt]) -> list[np.ndarray | None]:
        """The embeddings [m, n, e] of each prompt's m images, None where it has none."""
        counts = [len(prompt.images) for prompt in prompts]
        total = sum(counts)
        if not total:
            return [None] * len(prompts)
        count = bucket(total, self.batch_size)
        # A prompt's images are read together, where at least one of them is needed.
        of_rows = np.resize(own_rows(self.batch_size, self.mesh), count)
        ends = np.cumsum(counts)
        needed = [bool(of_rows[end - n : end].any()) for end, n in zip(ends, counts, strict=True)]
        pixels = shared_images(self.processor, prompts, needed)
        flat = np.concatenate(pixels)
        padded = np.concatenate([flat, np.repeat(flat[-1:], count - total, axis=0)])
        parts = [
            to_host(
                _image_embeddings(self.graph, self.state, shard_batch(padded[i : i + self.batch_size], self.mesh))
            )
            for i in range(0, count, self.batch_size)
        ]
        embedded, of_prompts, offset = np.concatenate(parts), [], 0
        for images in pixels:
            of_prompts.append(embedded[offset : offset + len(images)] if len(images) else None)
            offset += len(images)
        return of_prompts

    def _score_pool(self, images: np.ndarray | None, pool: Sequence[Sequence[Claim]]) -> np.ndarray:
        if images is None:
            return np.full(len(pool), np.nan)
        texts = list(dict.fromkeys(self._render(claim.text) for answer in pool for claim in answer))
        by_text = dict(zip(texts, self._scores(images, texts), strict=True)) if texts else {}
        mass = None
        if self.aggregate == "soft_f1":
            mass = float(self._scores(images, [self._render(name) for name in self.objects]).sum())
        return pool_scores(pool, lambda claim: float(by_text[self._render(claim.text)]), self.aggregate, mass)


class Reference(Backend):
    """Agreement with what the data says: listed objects (F1 of mentions) or the reference answer.

    A caption (``metadata["kind"]``) of an image with listed objects is scored by the objects it names; a yes/no
    reference by whether the answer says the same; any other by exact match, normalised as in VQA; an empty one not at
    all. For data with
    annotations, and as an upper bound for learned backends; not a judge of free text.
    """

    name, abstention = "reference", NO_REFERENCE

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = object_vocabulary(vocabulary)

    def objects(self, prompt: Prompt) -> set[str]:
        """What the image shows, where the vocabulary makes it count.

        Raises:
            UserError: the row lists something else than names.
        """
        named = prompt.metadata.get("objects") or []
        if self.vocabulary is None:
            return set()
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise UserError("metadata.objects is not a list of texts", where=prompt.where or f"id {prompt.id!r}")
        return set(named)

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        scores: Scores = []
        for prompt, pool in zip(prompts, pools, strict=True):
            objects = self.objects(prompt)
            if self.vocabulary is not None and objects and prompt.metadata.get("kind") == "caption":
                scores.append(np.array([self._object_f1(answer, objects) for answer in pool], np.float64))
            elif prompt.reference is not None and (wanted := plain(prompt.reference)):
                scores.append(np.array([agrees(prompt.instruction, answer, wanted) for answer in pool], np.float64))
            else:
                scores.append(np.full(len(pool), np.nan))
        return scores

    def _object_f1(self, answer: str, objects: set[str]) -> float:
        assert self.vocabulary is not None
        named = set(self.vocabulary.mentions(answer))
        return 2 * len(named & objects) / (len(named) + len(objects)) if named else 0.0


def agrees(instruction: str, answer: str, wanted: str) -> bool:
    """Whether a short answer says what the reference does; `wanted` is normalised."""
    if wanted in ("yes", "no") and (said := polarity(instruction, answer)):
        return said == wanted
    return plain(answer) == wanted


def plain(text: str) -> str:
    """A short answer normalised as in VQA; one that is an article alone ("A", an option's letter) keeps it."""
    letters = "".join(letter for letter in text.lower() if letter.isalnum())
    return normalize(text) or letters
