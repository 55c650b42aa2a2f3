"""The `generate` stage: prompts in, shards of candidates with raw log-probabilities out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from m3po_jax.config import GenerateConfig
from m3po_jax.data import batches, row_inputs, tables
from m3po_jax.data.collation import PromptBatch, PromptRow
from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.schema import CANDIDATE, Prompt
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import agreed, barrier, first_failure, is_writer, together
from m3po_jax.hosts.rows import Hosts, Shares
from m3po_jax.hosts.signals import stoppable
from m3po_jax.inference.answers import finish, repeats
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig, sampling_record
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.caches import fill
from m3po_jax.pipeline.console import progress, say
from m3po_jax.workspace.records import settings
from m3po_jax.workspace.shards import ShardFolder

LOADED_AHEAD = 16  # prompts whose images a host reads before the engine asks for them


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


def begin_shards(
    folder: ShardFolder, inputs: Mapping[str, Any], shards: Sequence[Shard], derived: Mapping[str, Any] | None = None
) -> list[bool]:
    """Which of `shards` are done, on every process alike; what does not belong to them is set aside, with a line.

    Args:
        inputs, derived: As of `workspace.records.Record`.
    """
    if is_writer():
        for line in folder.begin(inputs, [shard.path.name for shard in shards], derived):
            say(line, style="yellow")
    barrier("set aside")
    return agreed([shard.path.exists() for shard in shards])


@dataclass(frozen=True)
class _Chosen(Sequence[Prompt]):
    """Some prompts of a source, read when they are needed."""

    prompts: Sequence[Prompt]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[self.indices[index]]


def prompt_batches(
    prompts: Sequence[Prompt],
    processor: Processor,
    batch_size: int,
    *,
    features: PromptFeatures | None = None,
    images: bool = True,
    needed: Bool[np.ndarray, " b"] | None = None,
) -> Iterator[PromptBatch]:
    """Batches of prompts, in order, with the arrays that the engines take.

    Args:
        features: Cached features of the vision tower, which then stand for the images.
        images: False: no image is read; for passes that blank them.
        needed: Rows of a batch whose images this process needs (`inference.scorer.Scorer.own_rows`); None: all.

    Raises:
        UserError: a row that cannot be used; on all hosts before the same batch.
    """
    source = batches.prompt_batches(
        prompts, processor, batch_size=batch_size, features=features, images=images, needed=needed
    )
    for _ in range(0, len(prompts), batch_size):
        yield together(lambda: next(source))


def prompt_rows(
    prompts: Sequence[Prompt], processor: Processor, shares: Shares, features: PromptFeatures | None = None
) -> Iterator[PromptRow]:
    """What the engine takes, in order; threads read, decode and resize images ahead of it.

    Every process gets all prompts, with the images of those that `shares` deals to it.

    Args:
        features: Cached features of the vision tower, which then stand for the images.

    Raises:
        UserError: a row that cannot be used, when its turn comes; on all hosts at the same one.
    """
    hosts = jax.process_count()
    group = 1 if hosts == 1 else LOADED_AHEAD // 2 * hosts  # prompts about which processes agree at once

    def load(index: int, owners: Hosts) -> PromptRow:
        here = jax.process_index() in owners
        return row_inputs.prompt_row(processor, prompts[index], features, needed=here, place=index, hosts=owners)

    pool = ThreadPoolExecutor(4)
    numbers = iter(range(len(prompts)))
    loading: deque[Future[PromptRow]] = deque()

    def load_ahead() -> None:
        for index in islice(numbers, LOADED_AHEAD * hosts - len(loading)):
            loading.append(pool.submit(load, index, shares.deal()))

    try:
        load_ahead()
        while loading:
            ready: list[PromptRow] = []
            failure = None
            try:
                for future in [loading.popleft() for _ in range(min(group, len(loading)))]:
                    ready.append(future.result())
            except UserError as error:
                failure = len(ready), error
            failure = first_failure(failure)
            for row in ready if failure is None else ready[: failure[0]]:
                load_ahead()
                yield row
            if failure is not None:
                raise failure[1]
    finally:
        pool.shutdown(cancel_futures=True)


def candidate_row(
    answered: PromptRow, k: int, ended: bool, processor: Processor, stop: Sequence[str], sampling: str
) -> dict[str, Any]:
    """The CANDIDATE row of candidate `k`, without its prompt's tokens; `ended`: it has an end token."""
    ids = answered.answers[k]
    answer = finish(ids, ended, processor.decode, stop)
    return {
        "id": answered.id,
        "candidate": k,
        "text": answer.text,
        "token_ids": ids[: answer.length].tolist(),
        "token_logprobs": answered.log_probs[k][: answer.length].tolist(),
        "finish_reason": answer.finish_reason,
        "sampling": sampling,
    }


@dataclass
class Tally:
    """Tokens that are kept, and candidates that were drawn again."""

    tokens: int = 0
    resampled: int = 0


def _agree(rows: Sequence[dict[str, Any]]) -> None:
    """Gives candidates of the same tokens the same log-probs, those of the first.

    They differ by rounding, which depends on what was decoded beside them, and would break a tie between
    duplicates one way today and the other way after a restart.
    """
    first: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        row["token_logprobs"] = first.setdefault(tuple(row["token_ids"]), row["token_logprobs"])


def candidate_pools(
    prompts: Sequence[Prompt],
    generator: Generator,
    processor: Processor,
    config: GenerateConfig,
    tally: Tally,
    features: PromptFeatures | None = None,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Place of a prompt and its CANDIDATE rows, for every prompt, as they get ready.

    A duplicate, that is the text of another candidate of its prompt, is drawn again, up to `resample_duplicates`
    times, while other prompts are at work. What a candidate becomes depends on its prompt, the seed and the
    settings alone: streams belong to (seed, prompt id, candidate, attempt), and neither order nor batch of prompts
    enters. A greedy candidate would come out the same, so it is never drawn again.

    Raises:
        UserError: a bad row or image; after the candidates of all prompts before it.
    """
    prompts = TokenisedPrompts(prompts, processor.tokenise)
    k_all = range(generator.sampling.num_candidates)
    records = [sampling_record(config, generator.sampling, k) for k in k_all]
    random = [k for k in k_all if records[k]["temperature"] > 0]
    flying: dict[int, list[dict[str, Any]]] = {}  # rows so far of prompts whose candidates are not all final
    again: deque[PromptRow] = deque()
    shares = Shares(generator.mesh)

    def source() -> Iterator[PromptRow | None]:
        fresh, failure = prompt_rows(prompts, processor, shares, features), None
        more = True
        while more or again or flying:
            if again:
                yield again.popleft()
            elif not more:
                yield None  # a prompt that is at work may have duplicates
            else:
                try:
                    prompt = next(fresh)
                except StopIteration:
                    more = False
                except UserError as error:
                    more, failure = False, error
                else:
                    flying[prompt.place] = [{}] * len(k_all)
                    yield prompt
        if failure is not None:
            raise failure

    for answered in generator.stream(source(), len(prompts)):
        rows, attempt = flying[answered.place], answered.attempt
        drawn = k_all if answered.wanted is None else answered.wanted
        mark = {} if attempt == 0 else {"attempt": attempt}
        for k in drawn:
            sampling = json.dumps(records[k] | mark)
            rows[k] = candidate_row(
                answered, k, generator.ended(answered.answers[k]), processor, config.stop, sampling
            )
        repeated: list[int] = []
        if attempt < config.resample_duplicates:
            repeated = repeats([row["text"] for row in rows], drawn if attempt else random)
        if repeated:
            tally.resampled += len(repeated)
            again.append(dataclasses.replace(answered, wanted=tuple(repeated), attempt=attempt + 1))
            continue
        del flying[answered.place]
        shares.answered(answered.hosts)
        _agree(rows)
        tally.tokens += sum(len(row["token_ids"]) for row in rows)
        tokens = processor.tokenise(prompts[answered.place]).value()
        yield answered.place, [row | {"prompt_tokens": tokens} for row in rows]


def generate(
    prompts: Sequence[Prompt],
    generator: Generator,
    processor: Processor,
    config: GenerateConfig,
    out: ShardFolder,
    *,
    inputs: str,
    made_from: Mapping[str, Any] | None = None,
    features: PromptFeatures | None = None,
) -> dict[str, Any]:
    """Writes the candidates of every prompt; shards that exist are kept.

    Args:
        generator: Made with `inference.settings.sampling_config(config, seed)`.
        inputs: A hash of what the candidates depend on beside `config`: model, template, data, seed.
        made_from: The same by name, for the record.
        features: Cached features of the generator's vision tower; what is missing is computed and stored first.

    Returns:
        Counts for the manifest. `occupancy` is the share of the device's token slots that made tokens that are
        kept; the rest idled while the last answers ended, or followed a stop string.

    Raises:
        UserError: a bad row, image or model; shards whose prompts come before it are written.
        Interrupted: a signal arrived; finished shards stay.
    """
    started = time.monotonic()
    sampling = sampling_text(config, generator.sampling)
    shards = plan_shards(
        out.folder, len(prompts), config.shard_rows, tables.content_hash(inputs, sampling, config.num_candidates)
    )
    recorded = dict(made_from or {"inputs": inputs}) | settings("generate", config) | {"sampling": sampling}
    done = begin_shards(out, recorded, shards)
    todo = [shard for shard, exists in zip(shards, done, strict=True) if not exists]
    tally, slot_steps = Tally(), generator.slot_steps
    # Prompts run on across shards, so that the device idles at the end of the run only; a shard is written as soon
    # as all of its prompts are answered.
    places = [(shard, i) for shard in todo for i in range(shard.start, shard.stop)]
    unwritten: dict[Path, dict[int, list[dict[str, Any]]]] = {}
    if places:
        chosen = _Chosen(prompts, [i for _, i in places])
        if features is not None:
            fill(features, chosen)
        pools = candidate_pools(chosen, generator, processor, config, tally, features)
        shown = progress(stoppable(pools, "generating"), "generate", len(places))
        for index, rows in shown:
            shard, place = places[index]
            waiting = unwritten.setdefault(shard.path, {})
            waiting[place] = rows
            if len(waiting) == shard.stop - shard.start:
                del unwritten[shard.path]
                if is_writer():
                    whole = [row for i in sorted(waiting) for row in waiting[i]]
                    tables.write_table(shard.path, whole, CANDIDATE, record=out.noting(shard.path.name))
    slot_steps = generator.slot_steps - slot_steps
    barrier("generated")
    counts = candidate_counts(out.folder)
    details = {
        "seconds": time.monotonic() - started,
        "rows": counts["candidates"],
        "shards": len(shards),
        "shards_done_before": len(shards) - len(todo),
        "compilations": generator.compilations,
        "occupancy": round(tally.tokens / slot_steps, 4) if slot_steps else None,
        "resampled": tally.resampled if config.resample_duplicates else None,
        **counts,
    }
    if is_writer():
        out.finish({name: value for name, value in details.items() if value is not None})
    barrier("candidates are recorded")
    return details


def sampling_text(config: GenerateConfig, sampling: SamplingConfig) -> str:
    """How candidates are drawn, as JSON: one object where all candidates agree, else a list with one for each."""
    records = [sampling_record(config, sampling, k) for k in range(config.num_candidates)]
    return json.dumps(records[0] if all(record == records[0] for record in records) else records)


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
