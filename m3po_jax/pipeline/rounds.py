"""What a later round takes over: pairs of earlier rounds, and a reference that is not the round's generator.

The log-probs that were recorded while a round's candidates were drawn are those of that round's generator. They serve
as the reference where that generator is the reference; everywhere else the reference model is asked once, and its
log-probs stand in the pairs as recorded ones do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from m3po_jax.config import RoundConfig
from m3po_jax.data import pair_rows, tables
from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import PAIR
from m3po_jax.hosts.agreement import barrier, from_writer, is_writer
from m3po_jax.pipeline.caches import fill
from m3po_jax.pipeline.generate import prompt_batches
from m3po_jax.scoring.engine import Scorer, pad_answers
from m3po_jax.workspace.records import DONE, Artifact, Record
from m3po_jax.workspace.shards import now

REFERENCES = ("previous", "base")
SIDES = ("chosen", "rejected")


def earlier_count(own: int, earlier: int, share: float) -> int:
    """How many of `earlier` pairs make up `share` of a mixture with `own` pairs, as far as there are so many."""
    return min(earlier, math.floor(own * share / (1 - share) + 0.5))


def mix(rounds: Sequence[tuple[int, pa.Table]], share: float, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """(round, pair) of a round's training set: all pairs of the last table, and some of the earlier ones.

    Which ones depends on (seed, round, prompt id) alone.
    """

    def rank(item: tuple[int, dict[str, Any]]) -> bytes:
        name = f"mix\0{seed}\0{item[0]}\0{item[1]['id']}"
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()

    *before, own = [[(number, row) for row in table.to_pylist()] for number, table in rounds]
    pool = sorted((item for table in before for item in table), key=rank)
    return own + pool[: earlier_count(len(own), len(pool), share)]


def reference_log_probs(
    scorer: Scorer,
    processor: Processor,
    rows: Sequence[Mapping[str, Any]],
    features: PromptFeatures | None = None,
) -> list[dict[str, Any]]:
    """The rows with `scorer`'s log-probs of their answers in place of the recorded ones.

    Args:
        features: Cached features of the scorer's vision tower; what is missing is computed and stored first.
    """
    prompts = [pair_rows.pair_prompt(row, f"pair {row['id']!r}") for row in rows]
    if features is not None:
        fill(features, prompts)
    answers = [[np.asarray(row[f"{side}_token_ids"], np.int32) for side in SIDES] for row in rows]
    made: list[dict[str, Any]] = []
    for chosen, batch in prompt_batches(
        prompts, processor, scorer.batch_size, features=features, needed=scorer.own_rows
    ):
        own = answers[len(made) : len(made) + len(chosen)]
        found = scorer.log_probs(batch, *pad_answers(own))
        for b, pair in enumerate(own):
            row = dict(rows[len(made)])
            row |= {
                f"reference_{side}_logprobs": found[b, k, : len(pair[k])].tolist() for k, side in enumerate(SIDES)
            }
            made.append(row)
    return made


def training_pairs(
    rounds: Sequence[tuple[int, pa.Table]],
    config: RoundConfig,
    out: Artifact,
    *,
    inputs: Mapping[str, Any],
    seed: int,
    processor: Processor,
    scorer: Callable[[], Scorer],
    features: Callable[[], PromptFeatures | None] = lambda: None,
) -> pa.Table:
    """Pairs to train a later round on, with the reference's log-probs; written to `out` once.

    Args:
        rounds: (number, pairs) of the rounds that take part, in order; the round to train is the last.
        inputs: What they are made from, by name: the pairs, the reference model's weights, the settings.
        scorer: Of the reference model; called only if its log-probs are needed.
        features: Of its vision tower, from the cache; likewise.
    """
    path = out.folder / tables.shard_name(0, tables.content_hash(inputs))
    if from_writer(lambda: out.status(inputs).state) != DONE:
        items = mix(rounds, config.mix_previous, seed)
        # The round whose recorded log-probs are the reference's own.
        recorded = 1 if config.reference == "base" else rounds[-1][0]
        unknown = [position for position, (number, _) in enumerate(items) if number != recorded]
        rows = [row for _, row in items]
        if unknown:
            asked = reference_log_probs(scorer(), processor, [rows[position] for position in unknown], features())
            for position, row in zip(unknown, asked, strict=True):
                rows[position] = row
        if is_writer():
            out.set_aside()
            sums: dict[str, str] = {}
            tables.write_table(path, rows, PAIR, record=partial(sums.__setitem__, path.name))
            out.write(Record(dict(inputs), sums, finished=now()))
        barrier("mixed")
    return pa.concat_tables([tables.open_parquet(path).read()])
