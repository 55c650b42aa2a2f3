"""The `select` stage: scored candidates in; preference pairs, drops with reasons and a summary out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m3po_jax.config import SelectConfig
from m3po_jax.data import tables
from m3po_jax.data.images import read_encoded
from m3po_jax.data.pair_rows import prompt_messages
from m3po_jax.data.schema import PAIR, PROMPT, Prompt, prompt_to_row
from m3po_jax.errors import UserError
from m3po_jax.hosts import together
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.reward import Part
from m3po_jax.pipeline.stopping import from_writer
from m3po_jax.selection_rows import select_rows
from m3po_jax.workspace.checksums import checksum
from m3po_jax.workspace.files import is_writer, read_json
from m3po_jax.workspace.layout import PROMPTS
from m3po_jax.workspace.records import DONE, Artifact, Record, settings
from m3po_jax.workspace.shards import ShardFolder, now

SHOWN_DROPS = 60


def joined_rows(candidates: Path, scores: Path, prompts: Mapping[str, Prompt]) -> Iterator[dict[str, Any]]:
    """Candidate rows with their scores and their prompt's instruction and metadata.

    Raises:
        UserError: there is nothing, or candidates and scores do not belong together.
    """
    by_key = {(row["id"], row["candidate"]): row for row in tables.read_rows(scores)}
    if not by_key:
        raise UserError("no scores", where=str(scores), remedy="run `m3po score` first")
    for row in tables.read_rows(candidates):
        key = (row["id"], row["candidate"])
        if key not in by_key:
            raise UserError(
                f"no score for candidate {key[1]} of {key[0]!r}", where=str(scores), remedy="run `m3po score` again"
            )
        if row["id"] not in prompts:
            raise UserError(
                f"a candidate of a prompt that the data does not have ({row['id']!r})", where=str(candidates)
            )
        prompt = prompts[row["id"]]
        yield row | by_key[key] | {"instruction": prompt.instruction, "metadata": prompt.metadata}


def select(
    candidates: Path,
    scores: Path,
    prompts: Mapping[str, Prompt],
    config: SelectConfig,
    out: Path,
    *,
    image_root: Path,
    part: Part | None = None,
    pairs_per_prompt: int = 1,
    data: str = "",
) -> dict[str, Any]:
    """Writes pairs (one parquet shard), ``drops.jsonl`` and ``summary.json``; the summary is returned.

    A folder made from the same scores by the same rules is kept.

    Args:
        part: Which prompts take part; None: all.
        pairs_per_prompt: Of a random rule, for a reward model; more than one: `selection.draw_pairs`.
        data: A hash of the prompts.
    """
    started = time.monotonic()
    recorded = selection_inputs(candidates, scores, config, data=data, part=part, pairs_per_prompt=pairs_per_prompt)
    inputs = tables.content_hash(recorded)
    path, folder = out / tables.shard_name(0, inputs), Artifact(out)
    status = from_writer(lambda: vars(folder.status(recorded)))
    if status["state"] == DONE:
        return read_json(out / "summary.json") | {"seconds": 0.0}
    rows = (row for row in joined_rows(candidates, scores, prompts) if part is None or part.holds(row["id"]))
    pairs, drops, summary = select_rows(
        rows,
        config,
        dispreferred_confidence=config.confidence_dispreferred,
        pairs_per_prompt=pairs_per_prompt,
        where=str(scores),
    )
    summary |= {
        "inputs": inputs,
        "rule": config.rule,
        "kept": summary["pairs"],
        "drops": summary["dropped"],
        "correlation_mas_confidence": summary["correlation"],
    }

    def write() -> None:
        if (place := folder.set_aside()) is not None:
            reason = f"{status['state']} ({status['reason']})" if status["reason"] else status["state"]
            say(f"{out}: {reason}; set aside in {place}", style="yellow")
        sums: dict[str, str] = {}
        if share_twin(path, candidates.parent):
            sums[path.name] = checksum(path) or ""
        else:
            rows = (pair | _shown(prompts[pair["id"]], image_root) for pair in pairs)  # one row group at a time
            tables.write_table(path, rows, PAIR, record=partial(sums.__setitem__, path.name))
        tables.write_json_lines(out / "drops.jsonl", drops, record=partial(sums.__setitem__, "drops.jsonl"))
        # Beside the folder, since it shows all prompts; the report reads it, and it is verified with the pairs.
        beside = f"../{PROMPTS}"
        shown = prompt_rows(prompts, drops, image_root)
        tables.write_table(out.parent / PROMPTS, shown, PROMPT, record=partial(sums.__setitem__, beside))
        tables.write_json(out / "summary.json", summary, record=partial(sums.__setitem__, "summary.json"))
        details = {"seconds": time.monotonic() - started, "rows": summary["pairs"]}
        folder.write(Record(recorded, sums, finished=now(), details=details))

    # The others read no image; they wait here, and hear of one that is gone.
    together(lambda: write() if is_writer() else None)
    return summary | {"seconds": time.monotonic() - started}


def share_twin(path: Path, round_folder: Path) -> bool:
    """Makes a pairs file a second name of one that the same round has elsewhere; False where there is none.

    Pairs carry their images, so that TRL and `datasets` open the file alone. Arms of one rule choose the same pairs
    (the name of a shard is a hash of all that it is made from), and their images need to be on the disk once.
    """
    run = round_folder.parent
    twins = [round_folder / "pairs" / path.name, *sorted(run.glob(f"arms/*/{round_folder.name}/pairs/{path.name}"))]
    for twin in twins:
        if twin.is_file() and twin.resolve() != path.resolve():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(twin, path)  # files of a run are replaced and never written to, so that the two stay alike
            except OSError:  # a file system without hard links
                return False
            return True
    return False


def selection_inputs(
    candidates: Path,
    scores: Path,
    config: SelectConfig,
    *,
    data: str = "",
    part: Part | None = None,
    pairs_per_prompt: int = 1,
    contents: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What pairs are made from; arguments as of `select`.

    Args:
        contents: Hashes of ``candidates`` and ``scores``; default: of what is there, verified.

    Raises:
        UserError: candidates or scores that are not what their stages wrote.
    """
    limits: dict[str, Any] = {} if part is None else {f"part.{name}": value for name, value in vars(part).items()}
    if pairs_per_prompt != 1:
        limits["pairs_per_prompt"] = pairs_per_prompt
    contents = contents or {
        "candidates": ShardFolder(candidates, "m3po generate").content(),
        "scores": ShardFolder(scores, "m3po score").content(),
    }
    return {
        **contents,
        "data": data,
        **settings("select", config),
        **limits,
    }


def _shown(prompt: Prompt, image_root: Path) -> dict[str, Any]:
    """What a pair shows of its prompt: the encoded images and the conversation."""
    images = [
        {"bytes": read_encoded(image, root=image_root, where=prompt.where), "path": image.path}
        for image in prompt.images
    ]
    return {"images": images, "prompt": prompt_messages(prompt)}


def prompt_rows(
    prompts: Mapping[str, Prompt], drops: Sequence[Mapping[str, Any]], image_root: Path
) -> Iterator[dict[str, Any]]:
    """All prompts, for tracing rows back; images only of the dropped prompts that a report may show."""
    shown = {drop["id"] for drop in drops[:SHOWN_DROPS]}
    for prompt in prompts.values():
        row = prompt_to_row(prompt)
        for image, own in zip(row["images"], prompt.images, strict=True):
            kept = prompt.id in shown
            image["bytes"] = read_encoded(own, root=image_root, where=prompt.where) if kept else None
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
