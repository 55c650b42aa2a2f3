"""The `select` stage: scored candidates in; preference pairs, drops with reasons and a summary out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3po_jax.config import SelectConfig
from m3po_jax.data import tables
from m3po_jax.data.images import read_encoded
from m3po_jax.data.pair_rows import prompt_messages
from m3po_jax.data.schema import Prompt, prompt_to_row
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import from_writer, is_writer, together
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.reward import SplitSide
from m3po_jax.selection_rows import select_rows
from m3po_jax.workspace.records import DONE, settings
from m3po_jax.workspace.selection import PairFolder
from m3po_jax.workspace.shards import ShardFolder

SHOWN_DROPS = 60


def joined_rows(
    candidates: ShardFolder, scores: ShardFolder, prompts: Mapping[str, Prompt]
) -> Iterator[dict[str, Any]]:
    """Candidate rows with their scores and their prompt's instruction and metadata.

    Raises:
        UserError: there is nothing, or candidates and scores do not belong together.
    """
    by_key = {(row["id"], row["candidate"]): row for row in tables.read_rows(scores.folder)}
    if not by_key:
        raise UserError("no scores", where=str(scores.folder), remedy="run `m3po score` first")
    prompt_tokens: tuple[str, Any] = ("", None)
    for row in tables.read_rows(candidates.folder):
        key = (row["id"], row["candidate"])
        if row["id"] != prompt_tokens[0]:
            prompt_tokens = row["id"], row.get("prompt_tokens")
        if key not in by_key:
            raise UserError(
                f"no score for candidate {key[1]} of {key[0]!r}",
                where=str(scores.folder),
                remedy="run `m3po score` again",
            )
        if row["id"] not in prompts:
            raise UserError(
                f"a candidate of a prompt that the data does not have ({row['id']!r})", where=str(candidates.folder)
            )
        prompt = prompts[row["id"]]
        # A selection holds all candidates: those of a prompt share one list of its tokens.
        shared = {"prompt_tokens": prompt_tokens[1], "instruction": prompt.instruction, "metadata": prompt.metadata}
        yield row | by_key[key] | shared


def select(
    candidates: ShardFolder,
    scores: ShardFolder,
    prompts: Mapping[str, Prompt],
    config: SelectConfig,
    out: PairFolder,
    *,
    image_root: Path,
    part: SplitSide | None = None,
    pairs_per_prompt: int = 1,
    data: str = "",
) -> dict[str, Any]:
    """Writes pairs, dropped prompts and a summary, which is returned.

    A folder made from the same scores by the same rules is kept.

    Args:
        part: Which prompts take part; None: all.
        pairs_per_prompt: Of a random rule, for a reward model; more than one: `selection.draw_pairs`.
        data: A hash of the prompts.
    """
    started = time.monotonic()
    contents = {"candidates": candidates.content(), "scores": scores.content()}
    recorded = selection_inputs(contents, config, data=data, part=part, pairs_per_prompt=pairs_per_prompt)
    inputs = tables.content_hash(recorded)
    status = from_writer(lambda: vars(out.status(recorded)))
    if status["state"] == DONE:
        return out.summary() | {"seconds": 0.0}
    rows = (row for row in joined_rows(candidates, scores, prompts) if part is None or part.holds(row["id"]))
    pairs, drops, summary = select_rows(
        rows,
        config,
        dispreferred_confidence=config.confidence_dispreferred,
        pairs_per_prompt=pairs_per_prompt,
        where=str(scores.folder),
    )
    summary |= {
        "inputs": inputs,
        "rule": config.rule,
        "kept": summary["pairs"],
        "drops": summary["dropped"],
        "correlation_mas_confidence": summary["correlation"],
    }

    def write() -> None:
        if (place := out.set_aside()) is not None:
            reason = f"{status['state']} ({status['reason']})" if status["reason"] else status["state"]
            say(f"{out.folder}: {reason}; set aside in {place}", style="yellow")
        out.save(
            recorded,
            # One row group at a time.
            (pair_with_prompt(pair, prompts[pair["id"]], image_root) for pair in pairs),
            drops,
            summary,
            prompt_rows(prompts, drops, image_root),
            started=started,
        )

    # The others read no image; they wait here, and hear of one that is gone.
    together(lambda: write() if is_writer() else None)
    return summary | {"seconds": time.monotonic() - started}


def selection_inputs(
    contents: Mapping[str, str], config: SelectConfig, *, data: str, part: SplitSide | None, pairs_per_prompt: int = 1
) -> dict[str, Any]:
    """What pairs are made from; arguments as of `select`.

    Args:
        contents: Hashes of ``candidates`` and ``scores``.
    """
    limits: dict[str, Any] = {} if part is None else {f"part.{name}": value for name, value in vars(part).items()}
    if pairs_per_prompt != 1:
        limits["pairs_per_prompt"] = pairs_per_prompt
    return {**contents, "data": data, **settings("select", config), **limits}


def pair_with_prompt(pair: Mapping[str, Any], prompt: Prompt, image_root: Path) -> dict[str, Any]:
    """A PAIR row as files have it: with its prompt's encoded images and conversation."""
    images = [
        {"bytes": read_encoded(image, root=image_root, where=prompt.where), "path": image.path}
        for image in prompt.images
    ]
    return {**pair, "images": images, "prompt": prompt_messages(prompt)}


def prompt_rows(
    prompts: Mapping[str, Prompt], drops: Sequence[Mapping[str, Any]], image_root: Path
) -> Iterator[dict[str, Any]]:
    """All prompts, for tracing rows back; images only of the dropped prompts that a report may show."""
    shown = {drop["id"] for drop in drops[:SHOWN_DROPS]}
    for prompt in prompts.values():
        row = prompt_to_row(prompt)
        for image, reference in zip(row["images"], prompt.images, strict=True):
            kept = prompt.id in shown
            image["bytes"] = read_encoded(reference, root=image_root, where=prompt.where) if kept else None
        yield row


def select_file(source: Path, target: Path, config: SelectConfig) -> dict[str, Any]:
    """Scored candidates as JSON lines in, pairs as JSON lines out, drops beside them.

    Raises:
        UserError: a missing or empty file, or a row that is no scored candidate.
    """
    rows = [row for _, row in tables.read_json_lines(source)]
    if not rows:
        raise UserError("no row", where=str(source), remedy="one scored candidate a line")
    pairs, drops, summary = select_rows(
        rows, config, dispreferred_confidence=config.confidence_dispreferred, where=str(source)
    )
    tables.write_json_lines(target, pairs)
    tables.write_json_lines(target.with_suffix(".drops.jsonl"), drops)
    return summary
