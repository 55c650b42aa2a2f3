"""The `score` stage: candidates in; alignment scores, confidence variants and M3P-Scores out."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m3po_jax.config import ScoreConfig, SelectConfig
from m3po_jax.data import tables
from m3po_jax.data.padding import pad_answers
from m3po_jax.data.schema import SCORE_FIXED, Prompt, PromptTokens
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.hosts.agreement import agreed, barrier, is_writer
from m3po_jax.hosts.signals import stoppable
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.calibration import calibration
from m3po_jax.pipeline.console import progress
from m3po_jax.pipeline.generate import Shard, begin_shards, prompt_batches
from m3po_jax.pipeline.score_counts import count_scores, counts_line, is_open
from m3po_jax.scoring.alignment import Backend, Judged, Reference, judge_pools
from m3po_jax.scoring.confidence import confidence_variants
from m3po_jax.scoring.endpoint import answer_limit
from m3po_jax.scoring.m3p import m3p_scores
from m3po_jax.scoring.reasons import OUTAGES
from m3po_jax.workspace.records import settings
from m3po_jax.workspace.shards import ScoreFolder, ShardFolder

NEED_BLANK_IMAGE = frozenset({"prior", "visual"})


def pools(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Candidate rows grouped by prompt, in file order, candidates by number."""
    return [
        (key, sorted(group, key=lambda row: row["candidate"]))
        for key, group in groupby(rows, key=lambda row: row["id"])
    ]


def blank_log_probs(
    scorer: Scorer, prompts: Sequence[Prompt], groups: Sequence[Sequence[Mapping[str, Any]]], processor: Processor
) -> list[list[np.ndarray]]:
    """Log-probs of each candidate's tokens with the image blanked: what the language prior says."""
    scored: list[list[np.ndarray]] = []
    for batch in prompt_batches(prompts, processor, scorer.batch_size, images=False):
        in_batch = groups[len(scored) : len(scored) + len(batch.ids)]
        answers = [[np.asarray(row["token_ids"], np.int32) for row in group] for group in in_batch]
        log_probs = scorer.log_probs(batch, *pad_answers(answers), blank_images=True)
        scored += [[log_probs[b, k, : len(t)] for k, t in enumerate(group)] for b, group in enumerate(answers)]
    return scored


def score_rows(
    key: str,
    rows: Sequence[Mapping[str, Any]],
    mas: Mapping[str, np.ndarray],
    blank: Sequence[np.ndarray] | None,
    config: ScoreConfig,
    select: SelectConfig,
    abstained: Sequence[str | None] = (),
) -> list[dict[str, Any]]:
    """Score rows of one prompt's pool.

    Args:
        mas: ``mas``, and one array for every backend.
        abstained: Why a candidate has no MAS.
    """
    variants = confidence_variants(
        config.confidence, [row["token_logprobs"] for row in rows], [row["text"] for row in rows], blank
    )
    chosen = chosen_columns(np.asarray(mas["mas"], float), np.asarray(variants[select.confidence], float), select)
    return [
        {
            "id": key,
            "candidate": row["candidate"],
            "mas": mas["mas"][i],
            **{name: values[i] for name, values in chosen.items()},
            "abstained": abstained[i] if abstained else None,
            **{name: values[i] for name, values in mas.items() if name != "mas"},
            **{f"confidence_{name}": values[i] for name, values in variants.items()},
        }
        for i, row in enumerate(rows)
    ]


def chosen_columns(mas: np.ndarray, confidence: np.ndarray, select: SelectConfig) -> dict[str, np.ndarray]:
    """The columns of a prompt's pool that `select` decides and the judge does not; M3P-Scores are NaN without MAS."""
    if np.isfinite(mas).all():
        preferred, dispreferred = m3p_scores(mas, confidence, select.lambda_preferred, select.lambda_dispreferred)
    else:
        preferred = dispreferred = np.full(len(mas), np.nan)
    return {"confidence": confidence, "m3p_preferred": preferred, "m3p_dispreferred": dispreferred}


def choose_columns(folder: ShardFolder, shard: Path, select: SelectConfig) -> None:
    """Writes a finished shard again with the columns of another `select`; nothing is asked of the judge."""
    with tables.open_parquet(shard) as file:
        schema = file.schema_arrow
    rows: list[dict[str, Any]] = []
    for _, pool in pools(tables.read_rows(shard)):
        number = lambda name, pool=pool: np.array([np.nan if r[name] is None else r[name] for r in pool])  # noqa: E731
        chosen = chosen_columns(number("mas"), number(f"confidence_{select.confidence}"), select)
        rows += [{**row, **{name: values[i] for name, values in chosen.items()}} for i, row in enumerate(pool)]
    tables.write_table(shard, rows, schema, record=folder.noting(shard.name))


def score_schema(config: ScoreConfig, backend: Backend) -> pa.Schema:
    """The columns of a score shard: the fixed ones, and one for each backend and confidence variant."""
    columns = [f"mas_{backend.name}", *backend.columns]
    columns += [f"confidence_{name}" for name in config.confidence]
    schema = SCORE_FIXED
    for name in columns:
        schema = schema.append(pa.field(name, pa.float64()))
    return schema


def judge_candidates(
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    prompts: Mapping[str, Prompt],
    backend: Backend,
    where: str,
) -> Judged:
    """What a backend says of pools of candidates.

    Args:
        groups: As of `pools`.
        prompts: By id.
        where: The candidates' file.

    Raises:
        UserError: candidates of an unknown prompt.
    """
    unknown = [key for key, _ in groups if key not in prompts]
    if unknown:
        raise UserError(
            f"candidates of a prompt that the data does not have ({unknown[0]!r})",
            where=where,
            remedy="the data changed; run `m3po generate` again",
        )
    return judge_pools(backend, asked_prompts(groups, prompts), [[row["text"] for row in g] for _, g in groups])


def asked_prompts(
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], prompts: Mapping[str, Prompt]
) -> list[Prompt]:
    """The prompts of pools, with the token ids that their candidates were drawn for."""
    return [dataclasses.replace(prompts[key], tokens=PromptTokens.of_row(rows[0])) for key, rows in groups]


def rows_of_pools(
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    prompts: Mapping[str, Prompt],
    judged: Judged,
    name: str,
    config: ScoreConfig,
    select: SelectConfig,
    processor: Processor,
    scorer: Scorer | None,
) -> list[dict[str, Any]]:
    """Score rows of pools that are judged, in the order of their candidates.

    Args:
        name: Of the backend.
        scorer: As of `score`.
    """
    blank: list[list[np.ndarray]] | None = None
    if NEED_BLANK_IMAGE.intersection(config.confidence):
        assert scorer is not None
        blank = blank_log_probs(scorer, asked_prompts(groups, prompts), [rows for _, rows in groups], processor)
    scored: list[dict[str, Any]] = []
    for i, (key, rows) in enumerate(groups):
        mas = {"mas": judged.scores[i], f"mas_{name}": judged.scores[i]}
        mas |= {column: scores[i] for column, scores in judged.columns.items()}
        scored += score_rows(key, rows, mas, blank[i] if blank else None, config, select, judged.reasons[i])
    return scored


def score(
    candidates: ShardFolder,
    prompts: Mapping[str, Prompt],
    backend: Backend,
    config: ScoreConfig,
    select: SelectConfig,
    out: ScoreFolder,
    *,
    inputs: str,
    processor: Processor,
    made_from: Mapping[str, Any] | None = None,
    scorer: Scorer | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores every candidate shard into a shard of the same number; shards that exist are kept.

    A shard in which a server has left candidates without an answer is not written: the next command asks for them.

    Args:
        prompts: By id.
        inputs: A hash of what the scores depend on beside the candidates and `config`: the judge.
        made_from: The same by name, for the record.
        scorer: Needed for the confidence variants ``prior`` and ``visual``.
        warnings: Of the judge; they stand on the calibration page.

    Raises:
        UserError: no candidates, a candidate of an unknown prompt, a variant that was not asked for.
        Interrupted: stopped, or a server left candidates without an answer.
    """
    started = time.monotonic()
    for name in {select.confidence, select.confidence_dispreferred} - {""}:
        if name not in config.confidence:
            raise UserError(
                f"select.confidence {name!r} is not computed", where="score.confidence", remedy=f"add {name!r} to it"
            )
    sources = tables.shards(candidates.folder)
    if not sources:
        raise UserError("no candidates", where=str(candidates.folder), remedy="run `m3po generate` first")
    candidate_sums = candidates.shard_checksums()
    shards = [
        Shard(out.folder / tables.shard_name(i, tables.content_hash(value, inputs)), i, i + 1)
        for i, value in enumerate(candidate_sums)
    ]
    recorded = dict(made_from or {"inputs": inputs}) | settings("score", config)
    # What the judge never sees changes columns in place.
    derived = {
        f"select.{name}": getattr(select, name) for name in ("confidence", "lambda_preferred", "lambda_dispreferred")
    }
    there = begin_shards(out, recorded, shards, derived)
    limit = answer_limit(config.endpoint)
    # What a server has left without an answer that it could give now is asked again.
    done = agreed([exists and not is_open(shard.path, limit) for shard, exists in zip(shards, there, strict=True)])
    if is_writer() and done != there:
        out.reopen()
    todo = [(path, shard) for path, shard, exists in zip(sources, shards, done, strict=True) if not exists]
    if is_writer() and (record := out.read()) is not None and record.derived != derived:
        out.derive({})  # killed before the last one, all are written again
        for shard in [shard for shard, exists in zip(shards, done, strict=True) if exists]:
            choose_columns(out, shard.path, select)
        out.derive(derived)
    barrier("columns are chosen")
    schema = score_schema(config, backend)
    waiting, notes = Counter[str](), dict[str, str]()
    for path, shard in stoppable(progress(todo, "score", len(todo)), "scoring"):
        groups = pools(tables.read_rows(path))
        judged = judge_candidates(groups, prompts, backend, str(path))
        notes |= judged.notes
        outages = Counter(why for pool in judged.reasons for why in pool if why in OUTAGES)
        if outages:
            waiting += outages
            continue
        scored = rows_of_pools(groups, prompts, judged, backend.name, config, select, processor, scorer)
        if is_writer():
            tables.write_table(shard.path, scored, schema, record=out.noting(shard.path.name))
    barrier("scored")
    if waiting:
        total = sum(1 for _ in tables.read_rows(candidates.folder, columns=["id"]))
        counts = {"rows": total, "scored": total - waiting.total(), "abstained": waiting}
        raise Interrupted(f"scoring: {counts_line(counts, notes)}; paid answers are kept and the rest is asked again")
    outcome: dict[str, Any] = {"seconds": time.monotonic() - started}
    if is_writer():
        measured = calibration(
            candidates.folder,
            out.folder,
            prompts,
            select.confidence,
            circular=isinstance(backend, Reference),
            seed=select.seed,
        )
        measured["judges"] = backend.usages()
        said = [{"about": "judge", "tone": "warn", "text": f"{line[:1].upper()}{line[1:]}."} for line in warnings]
        measured["verdict"] = [*measured["verdict"], *said]
        out.save_calibration(measured)
        outcome |= {"verdict": measured["verdict"], "judges": measured["judges"]}
    outcome |= count_scores(tables.read_rows(out.folder, columns=["mas", "abstained"]))
    if is_writer():
        details = {name: value for name, value in outcome.items() if name not in ("verdict", "judges")}
        if outcome["judges"]:
            details["details"] = {judge["judge"]: judge for judge in outcome["judges"]}
        out.finish(details)
    barrier("scores are recorded")
    return outcome | {"notes": notes}
