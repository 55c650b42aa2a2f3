"""What a later round takes over: pairs of earlier rounds, and a reference that is not the round's generator.

The log-probs that were recorded while a round's candidates were drawn are those of that round's generator. They serve
as the reference where that generator is the reference; everywhere else the reference model is asked once, and its
log-probs stand in the pairs as recorded ones do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from m3po_jax.config import RoundConfig
from m3po_jax.data import tables
from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.padding import pad_answers
from m3po_jax.data.pair_rows import PairPrompts, PairRows
from m3po_jax.data.schema import PAIR
from m3po_jax.data.stored_pairs import StoredPairs
from m3po_jax.hosts.agreement import barrier, from_writer, is_writer
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.caches import fill
from m3po_jax.pipeline.generate import prompt_batches
from m3po_jax.workspace.records import DONE, Artifact, Record
from m3po_jax.workspace.shards import now

REFERENCES = ("previous", "base")
SIDES = ("chosen", "rejected")


def earlier_count(current: int, earlier: int, share: float) -> int:
    """How many of `earlier` pairs make up `share` of a mixture with `current` pairs, as far as there are so many."""
    return min(earlier, math.floor(current * share / (1 - share) + 0.5))


def mix(rounds: Sequence[tuple[int, Sequence[str]]], share: float, seed: int) -> list[tuple[int, int]]:
    """A round's training set: all pairs of the last round, and some of the earlier ones.

    Args:
        rounds: (number, ids of its pairs).

    Returns:
        (place in `rounds`, place among its pairs) of each.

    Which ones depends on (seed, round, prompt id) alone.
    """

    def rank(item: tuple[int, int]) -> bytes:
        number, ids = rounds[item[0]]
        name = f"mix\0{seed}\0{number}\0{ids[item[1]]}"
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()

    *before, current = [[(place, index) for index in range(len(ids))] for place, (_, ids) in enumerate(rounds)]
    pool = sorted((item for items in before for item in items), key=rank)
    return current + pool[: earlier_count(len(current), len(pool), share)]


def reference_log_probs(
    scorer: Scorer,
    processor: Processor,
    pairs: PairRows,
    features: PromptFeatures | None = None,
) -> list[dict[str, Any]]:
    """`scorer`'s log-probs of the answers of each pair, as the fields that take the place of the recorded ones.

    Args:
        features: Cached features of the scorer's vision tower; what is missing is computed and stored first.
    """
    prompts = PairPrompts(pairs)
    if features is not None:
        fill(features, prompts)
    answers = [[np.asarray(row[f"{side}_token_ids"], np.int32) for side in SIDES] for row in pairs.without_images()]
    rows: list[dict[str, Any]] = []
    for batch in prompt_batches(prompts, processor, scorer.batch_size, features=features, needed=scorer.own_rows):
        in_batch = answers[len(rows) : len(rows) + len(batch.ids)]
        log_probs = scorer.log_probs(batch, *pad_answers(in_batch))
        for b, pair in enumerate(in_batch):
            rows.append(
                {
                    f"reference_{side}_logprobs": log_probs[b, k, : len(pair[k])].tolist()
                    for k, side in enumerate(SIDES)
                }
            )
    return rows


class _Mixed(PairRows):
    """Pairs of several rounds as one sequence."""

    def __init__(self, rounds: Sequence[PairRows], items: Sequence[tuple[int, int]]):
        self.rounds, self.items = rounds, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place, number = self.items[index]
        return self.rounds[place][number]

    def without_images(self) -> Iterator[dict[str, Any]]:
        texts = [list(pairs.without_images()) for pairs in self.rounds]
        return (texts[place][number] for place, number in self.items)

    def ids(self) -> list[str]:
        ids = [pairs.ids() for pairs in self.rounds]
        return [ids[place][number] for place, number in self.items]

    def take(self, numbers: Sequence[int]) -> _Mixed:
        return _Mixed(self.rounds, [self.items[number] for number in numbers])


def training_pairs(
    rounds: Sequence[tuple[int, PairRows]],
    config: RoundConfig,
    out: Artifact,
    *,
    inputs: Mapping[str, Any],
    seed: int,
    processor: Processor,
    scorer: Callable[[], Scorer],
    features: Callable[[], PromptFeatures | None] = lambda: None,
) -> PairRows:
    """Pairs to train a later round on, with the reference's log-probs; written to `out` once.

    Args:
        rounds: (number, pairs) of the rounds that take part, in order; the round to train is the last.
        inputs: What they are made from, by name: the pairs, the reference model's weights, the settings.
        scorer: Of the reference model; called only if its log-probs are needed.
        features: Of its vision tower, from the cache; likewise.
    """
    path = out.folder / tables.shard_name(0, tables.content_hash(inputs))
    if from_writer(lambda: out.status(inputs).state) != DONE:
        items = mix([(number, pairs.ids()) for number, pairs in rounds], config.mix_previous, seed)
        mixed = _Mixed([pairs for _, pairs in rounds], items)
        # The round whose recorded log-probs are the reference's own.
        recorded = 1 if config.reference == "base" else rounds[-1][0]
        unknown = [position for position, (place, _) in enumerate(items) if rounds[place][0] != recorded]
        asked: dict[int, dict[str, Any]] = {}
        if unknown:
            computed = reference_log_probs(scorer(), processor, mixed.take(unknown), features())
            asked = dict(zip(unknown, computed, strict=True))
        if is_writer():
            out.set_aside()
            sums: dict[str, str] = {}
            rows = (row | asked.get(position, {}) for position, row in enumerate(mixed))  # one row group at a time
            tables.write_table(path, rows, PAIR, record=partial(sums.__setitem__, path.name))
            out.write(Record(dict(inputs), sums, finished=now()))
        barrier("mixed")
    return StoredPairs.open([path])
