"""The `generate` stage: prompts in, shards of candidates with raw log-probabilities out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.config import GenerateConfig
from m3po_jax.data import batches, tables
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import CANDIDATE, Prompt
from m3po_jax.data.sources import PromptSource
from m3po_jax.generation.answers import finish, repeats
from m3po_jax.generation.engine import Generated, Generator, Pending, PromptBatch
from m3po_jax.generation.settings import sampling_record
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
    generator: Generator,
    prompts: Sequence[Prompt],
    processor: Processor,
    batch_size: int,
    *,
    wanted: Mapping[str, Sequence[int]] | None = None,
    attempt: int = 0,
) -> Iterator[tuple[list[Prompt], Generated]]:
    """Generated batches in order; the host prepares the next batch while the device works on this one.

    Args:
        wanted: prompt id -> the candidates to draw, from the streams of `attempt`; None: all.
    """
    pending: tuple[list[Prompt], Pending] | None = None
    for rows, batch in prompt_batches(prompts, processor, batch_size):
        mask = None
        if wanted is not None:
            mask = np.zeros((len(rows), generator.sampling.num_candidates), bool)
            for row, prompt in enumerate(rows):
                mask[row, list(wanted[prompt.id])] = True
        submitted = (rows, generator.submit(batch, mask, attempt))
        if pending is not None:
            yield pending[0], generator.collect(pending[1])
        pending = submitted
    if pending is not None:
        yield pending[0], generator.collect(pending[1])


def candidate_row(
    prompt: Prompt, made: Generated, b: int, k: int, processor: Processor, stop: Sequence[str], sampling: str
) -> dict[str, Any]:
    """The CANDIDATE row of candidate `k` of the batch's prompt number `b`."""
    ids = made.token_ids[b, k, : int(made.lengths[b, k])]
    answer = finish(ids, bool(made.finished[b, k]), processor.decode, stop)
    return {
        "id": prompt.id,
        "candidate": k,
        "text": answer.text,
        "token_ids": ids[: answer.length].tolist(),
        "token_logprobs": made.log_probs[b, k, : answer.length].tolist(),
        "finish_reason": answer.finish_reason,
        "sampling": sampling,
    }


@dataclass
class Tally:
    """What the device did: tokens that are kept, tokens it could have drawn meanwhile, candidates drawn again."""

    tokens: int = 0
    slot_steps: int = 0
    resampled: int = 0


def make_candidates(
    prompts: Sequence[Prompt],
    generator: Generator,
    processor: Processor,
    config: GenerateConfig,
    tally: Tally,
) -> list[dict[str, Any]]:
    """CANDIDATE rows of all prompts; duplicates are drawn again, up to `resample_duplicates` times.

    A duplicate has the text of another candidate of its prompt. What a candidate becomes depends on its prompt,
    the seed and the settings alone: streams belong to (seed, prompt id, candidate, attempt), and neither order nor
    batch of prompts enters. A greedy candidate would come out the same, so it is never drawn again.
    """
    sampling = generator.sampling
    records = [sampling_record(config, sampling, k) for k in range(sampling.num_candidates)]
    random = [k for k, record in enumerate(records) if record["temperature"] > 0]
    pools: dict[str, list[dict[str, Any]]] = {prompt.id: [{}] * sampling.num_candidates for prompt in prompts}
    wanted: dict[str, list[int]] = {}
    todo: list[Prompt] = list(prompts)
    for attempt in range(config.resample_duplicates + 1):
        again = {} if attempt == 0 else {"attempt": attempt}
        marks = [json.dumps(record | again) for record in records]
        made = answers(
            generator, todo, processor, config.batch_size, wanted=wanted if attempt else None, attempt=attempt
        )
        for chosen, generated in stoppable(made, "generating"):
            tally.slot_steps += generated.slot_steps
            for b, prompt in enumerate(chosen):
                for k in wanted[prompt.id] if attempt else range(sampling.num_candidates):
                    pools[prompt.id][k] = candidate_row(prompt, generated, b, k, processor, config.stop, marks[k])
        if attempt == config.resample_duplicates:
            break
        found = {
            prompt.id: repeats([row["text"] for row in pools[prompt.id]], wanted[prompt.id] if attempt else random)
            for prompt in todo
        }
        wanted = {id: duplicates for id, duplicates in found.items() if duplicates}
        todo = [prompt for prompt in todo if prompt.id in wanted]
        if not todo:
            break
        tally.resampled += sum(map(len, wanted.values()))
    rows = [row for prompt in prompts for row in pools[prompt.id]]
    tally.tokens += sum(len(row["token_ids"]) for row in rows)
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
        generator: Made with `generation.settings.sampling_config(config, seed)`.
        inputs: A hash of what the candidates depend on beside `config`: model, template, data, seed.

    Returns:
        Counts for the manifest. `occupancy` is the share of the device's token slots that made tokens that are
        kept; the rest waited for the longest answer of a batch, padded the last batch or followed a stop string.

    Raises:
        UserError: a bad row, image or model; nothing finished is lost.
        Interrupted: a signal arrived; finished shards stay.
    """
    started = time.monotonic()
    records = [sampling_record(config, generator.sampling, k) for k in range(config.num_candidates)]
    alike = all(record == records[0] for record in records)
    sampling = json.dumps(records[0] if alike else records)
    shards = plan_shards(
        out, len(prompts), config.shard_rows, tables.content_hash(inputs, sampling, config.num_candidates)
    )
    remove_stale(out, shards)
    done = agreed([shard.path.exists() for shard in shards])
    todo = [shard for shard, exists in zip(shards, done, strict=True) if not exists]
    tally = Tally()
    for shard in progress(todo, "generate", len(todo)):
        part = [prompts[i] for i in range(shard.start, shard.stop)]
        rows = make_candidates(part, generator, processor, config, tally)
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
        "occupancy": round(tally.tokens / tally.slot_steps, 4) if tally.slot_steps else None,
        "resampled": tally.resampled if config.resample_duplicates else None,
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
