"""The `generate` stage: prompts in, shards of candidates with raw log-probabilities out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.config import GenerateConfig
from m3po_jax.data import batches, tables
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import CANDIDATE, Prompt
from m3po_jax.data.sources import PromptSource
from m3po_jax.generation.engine import Generated, Generator, Pending, PromptBatch
from m3po_jax.pipeline.console import progress
from m3po_jax.pipeline.rundir import is_writer
from m3po_jax.pipeline.stopping import agreed, barrier, stoppable


@dataclass(frozen=True)
class Shard:
    """A run of prompts and the file that holds what a stage makes of them."""

    path: Path
    start: int
    stop: int


def plan_shards(out: Path, count: int, rows: int, inputs: str) -> list[Shard]:
    """Shards of `rows` prompts; a name depends on everything that its content depends on."""
    starts = range(0, count, rows)
    return [
        Shard(
            out / tables.shard_name(i, tables.content_hash(inputs, start, min(start + rows, count))),
            start,
            min(start + rows, count),
        )
        for i, start in enumerate(starts)
    ]


def remove_stale(out: Path, shards: Sequence[Shard]) -> None:
    """Deletes shards that other inputs made: the next stage reads the whole folder."""
    if is_writer():
        wanted = {shard.path.name for shard in shards}
        for path in tables.shards(out):
            if path.name not in wanted:
                path.unlink()


def prompt_batches(
    prompts: Sequence[Prompt], processor: Processor, batch_size: int
) -> Iterator[tuple[list[Prompt], PromptBatch]]:
    """Batches of prompts, in order, with the arrays that the engines take."""
    source = batches.prompt_batches(prompts, processor, batch_size=batch_size)
    for batch in source:
        real = [int(i) for i in batch.row_index if i >= 0]
        n = len(real)
        pixels = None if batch.pixel_values is None else batch.pixel_values[:n]
        chosen = [prompts[i] for i in real]
        yield chosen, PromptBatch([p.id for p in chosen], batch.prefix_ids[:n], batch.prefix_mask[:n], pixels)


def answers(
    generator: Generator, prompts: Sequence[Prompt], processor: Processor, batch_size: int
) -> Iterator[tuple[list[Prompt], Generated]]:
    """Generated batches in order; the host prepares the next batch while the device works on this one."""
    pending: tuple[list[Prompt], Pending] | None = None
    for rows, batch in prompt_batches(prompts, processor, batch_size):
        submitted = (rows, generator.submit(batch))
        if pending is not None:
            yield pending[0], generator.collect(pending[1])
        pending = submitted
    if pending is not None:
        yield pending[0], generator.collect(pending[1])


def candidate_rows(
    prompts: Sequence[Prompt], made: Generated, processor: Processor, sampling: str
) -> list[dict[str, Any]]:
    """CANDIDATE rows of one batch."""
    rows = []
    for b, prompt in enumerate(prompts):
        for k in range(made.token_ids.shape[1]):
            length = int(made.lengths[b, k])
            ids = made.token_ids[b, k, :length]
            rows.append(
                {
                    "id": prompt.id,
                    "candidate": k,
                    "text": processor.decode(ids),
                    "token_ids": ids.tolist(),
                    "token_logprobs": made.log_probs[b, k, :length].tolist(),
                    "finish_reason": "stop" if made.finished[b, k] else "length",
                    "sampling": sampling,
                }
            )
    return rows


def generate(
    prompts: PromptSource,
    generator: Generator,
    processor: Processor,
    config: GenerateConfig,
    out: Path,
    *,
    inputs: str,
) -> dict[str, Any]:
    """Writes the candidates of every prompt; shards that exist are kept.

    Args:
        inputs: A hash of what the candidates depend on beside `config`: model, template, data, seed.

    Returns:
        Counts for the manifest.

    Raises:
        UserError: a bad row, image or model; nothing finished is lost.
        Interrupted: a signal arrived; finished shards stay.
    """
    started = time.monotonic()
    sampling = json.dumps(
        {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": generator.sampling.seed,
        }
    )
    shards = plan_shards(
        out, len(prompts), config.shard_rows, tables.content_hash(inputs, sampling, config.num_candidates)
    )
    remove_stale(out, shards)
    done = agreed([shard.path.exists() for shard in shards])
    todo = [shard for shard, exists in zip(shards, done, strict=True) if not exists]
    for shard in progress(todo, "generate", len(todo)):
        rows: list[dict[str, Any]] = []
        part = [prompts[i] for i in range(shard.start, shard.stop)]
        made = answers(generator, part, processor, config.batch_size)
        for chosen, generated in stoppable(made, "generating"):
            rows += candidate_rows(chosen, generated, processor, sampling)
        if is_writer():
            tables.write_table(shard.path, rows, CANDIDATE)
    barrier("generated")
    counts = candidate_counts(out)
    return {
        "seconds": time.monotonic() - started,
        "rows": counts["candidates"],
        "shards": len(shards),
        "shards_done_before": len(shards) - len(todo),
        "compilations": generator.compilations,
        **counts,
    }


def candidate_counts(out: Path) -> dict[str, Any]:
    """Candidates, how many are distinct within their prompt, and how many were cut by the length limit."""
    pools: dict[str, set[str]] = {}
    candidates = cut = tokens = 0
    for row in tables.read_rows(out, columns=["id", "text", "finish_reason", "token_ids"]):
        pools.setdefault(row["id"], set()).add(row["text"])
        candidates += 1
        cut += row["finish_reason"] == "length"
        tokens += len(row["token_ids"])
    return {
        "prompts": len(pools),
        "candidates": candidates,
        "distinct": int(np.sum([len(texts) for texts in pools.values()])) if pools else 0,
        "cut": cut,
        "tokens": tokens,
    }
