"""Reads what the seeds' runs left behind, as arrays and counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.data import tables
from m3po_jax.evaluation.bootstrap import image_sums
from m3po_jax.evaluation.metric import image_of
from m3po_jax.pipeline import summary
from m3po_jax.pipeline.evaluate import Benchmark
from m3po_jax.pipeline.run import Run
from m3po_jax.pipeline.rundir import read_json


def systems(run: Run, arms: list[str]) -> dict[str, tuple[str, Path]]:
    """name -> (kind, folder) of everything that the table may show of one seed."""
    config, folder = run.recipe.evaluate, run.directory.round
    found = {summary.BASE: ("base", folder(0))}
    found |= {name: ("frontier", folder(0, name)) for name in map(summary.stop_bias_name, config.stop_bias)}
    found |= {name: ("decoding", folder(0, name)) for name in map(summary.contrast_name, config.contrast_alpha)}
    return found | {arm: ("arm", folder(run.recipe.rounds, arm)) for arm in arms}


def items(folder: Path, benchmark: str) -> list[dict[str, Any]] | None:
    """A system's records of a benchmark; None where it has not been evaluated."""
    where = folder / "evaluation" / benchmark
    if read_json(where / "results.json") is None:
        return None
    return [row for _, row in tables.read_json_lines(where / "items.jsonl")]


def sums(
    folders: Mapping[int, Mapping[str, Path]], benchmarks: Mapping[int, Benchmark]
) -> tuple[list[str], dict[int, dict[str, np.ndarray]]]:
    """(images of all seeds, seed -> system -> [images, columns]) of one benchmark."""
    image_of_item = {
        seed: {prompt.id: image_of(prompt) for prompt in benchmark.prompts} for seed, benchmark in benchmarks.items()
    }
    images = list(dict.fromkeys(image for known in image_of_item.values() for image in known.values()))
    order = {image: position for position, image in enumerate(images)}
    found: dict[int, dict[str, np.ndarray]] = {}
    for seed, own in folders.items():
        metric = benchmarks[seed].metric
        for name, folder in own.items():
            records = items(folder, benchmarks[seed].name)
            if records:
                images_of = [image_of_item[seed][record["id"]] for record in records]
                found.setdefault(seed, {})[name] = image_sums(images_of, metric.table(records), order)
    return images, found


def _stages(run: Run, stage: str, arms: set[str | None], rounds: int) -> list[dict[str, Any]]:
    return [
        entry
        for entry in run.directory.manifest().get("stages", [])
        if entry["stage"] == stage and entry["arm"] in arms and 1 <= entry["round"] <= rounds
    ]


def compute(run: Run, arm: str) -> dict[str, float]:
    """What one arm of one seed costs, shared candidates and scores counted in full, and the seconds it took.

    ``generated_tokens`` and ``judge_calls`` (candidates scored) include the rollouts of an arm that draws and scores
    answers while it trains.
    """
    recipe, rounds = run.arm_recipe(arm), run.recipe.rounds
    trains = _stages(run, "train", {arm}, rounds)
    # An arm that reads no pair (SFT on references, policy gradients) needs no candidates either.
    reads = (run.directory.round(1, arm) / "pairs").is_dir()
    makers = {run.candidates_owner(1, arm), arm} if reads else set()
    judges = {run.scores_owner(1, arm), arm} if reads else set()
    generates, scores = _stages(run, "generate", makers, rounds), _stages(run, "score", judges, rounds)
    rollouts = [_rollouts(run, number, arm) for number in range(1, rounds + 1)]
    return {
        "pairs": sum(pair_count(run, number, arm) for number in range(1, rounds + 1)),
        "generated_tokens": sum(entry.get("tokens", 0) for entry in generates)
        + sum(tokens for tokens, _ in rollouts),
        "judge_calls": sum(entry.get("rows", 0) for entry in scores) + sum(episodes for _, episodes in rollouts),
        "trained_tokens": sum(_trained_tokens(run, number, arm) for number in range(1, rounds + 1)),
        "optimizer_steps": sum(entry.get("steps", 0) for entry in trains),
        "batch_size": recipe.train.batch_size,
        "train_seconds": sum(entry["seconds"] for entry in trains),
        "generate_seconds": sum(entry["seconds"] for entry in generates),
        "score_seconds": sum(entry["seconds"] for entry in scores),
    }


def _metrics(run: Run, round: int, arm: str) -> list[dict[str, Any]]:
    log = run.directory.round(round, arm) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def _rollouts(run: Run, round: int, arm: str) -> tuple[float, float]:
    """(tokens, answers) that a policy-gradient arm drew in a round, from its log, which has TRL's names for them."""
    tokens = answers = 0.0
    for row in _metrics(run, round, arm):
        if "episode" in row:
            tokens += (row["episode"] - answers) * row["completions/mean_length"]
            answers = row["episode"]
    return tokens, answers


def _trained_tokens(run: Run, round: int, arm: str) -> float:
    rows = _metrics(run, round, arm)
    return float(rows[-1].get("num_tokens", 0.0)) if rows else 0.0


def pair_count(run: Run, round: int, arm: str) -> int:
    return int((read_json(run.directory.round(round, arm) / "pairs" / "summary.json") or {}).get("pairs", 0))


_TRAINING = ("delta_logps/chosen", "delta_logps/rejected", "rewards/margins", "rewards/accuracies")
_PAIRS = ("chosen_mas", "rejected_mas", "mas_gap", "length_difference", "correlation")


def training(run: Run, arm: str) -> dict[str, float]:
    """Means over the last tenth of the last round's logged steps, and over its pairs; what there is of each."""
    folder = run.directory.round(run.recipe.rounds, arm)
    found: dict[str, float] = {}
    rows = _metrics(run, run.recipe.rounds, arm)
    tail = rows[-max(1, len(rows) // 10) :]
    for key in _TRAINING:
        values = [row[key] for row in tail if key in row]
        if values:
            found[key] = float(np.mean(values))
    pairs = read_json(folder / "pairs" / "summary.json") or {}
    return found | {key: float(pairs[key]) for key in _PAIRS if pairs.get(key) is not None}


def signals(run: Run) -> dict[str, float]:
    """AUROC of MAS and of each confidence variant in the shared candidates, and correlations within prompts.

    ``auroc/`` is over all answers, ``auroc_within/`` over answers of one prompt, among which selection chooses.
    """
    known = read_json(run.directory.round(1) / "scores" / "calibration.json") or {}
    found = {}
    for name, value in known.items():
        if isinstance(value, dict) and isinstance(value.get("auroc"), float):
            variant = f"confidence_{value['variant']}" if name == "confidence" and "variant" in value else name
            found[f"auroc/{variant}"] = value["auroc"]
            within = (value.get("within") or {}).get("auroc")
            if isinstance(within, float):
                found[f"auroc_within/{variant}"] = within
    for name, value in (known.get("correlation_mas_confidence") or {}).items():
        if isinstance(value, float):
            found[f"correlation/{name}"] = value
    return found
