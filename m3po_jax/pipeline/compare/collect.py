"""Reads what the seeds' runs left behind, as arrays and counts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from m3po_jax.evaluation.bootstrap import image_sums
from m3po_jax.evaluation.metric import image_of
from m3po_jax.pipeline import summary
from m3po_jax.pipeline.evaluate import Benchmark
from m3po_jax.pipeline.rlhf import rollout_costs
from m3po_jax.pipeline.run import Run
from m3po_jax.workspace.cell import Cell


def systems(run: Run, arms: list[str]) -> dict[str, tuple[str, Cell]]:
    """name -> (kind, cell) of everything that the table may show of one seed."""
    base, last = run.directory.cell(0), run.directory.cell(run.recipe.rounds)
    every = [(summary.BASE, "base", base), *summary.decodings(run.recipe.evaluate, base)]
    every += [(arm, "arm", last.of(arm)) for arm in arms]
    return {name: (kind, cell) for name, kind, cell in every}


def sums(
    cells: Mapping[int, Mapping[str, Cell]], benchmarks: Mapping[int, Benchmark]
) -> tuple[list[str], dict[int, dict[str, np.ndarray]]]:
    """(images of all seeds, seed -> system -> [images, columns]) of one benchmark."""
    image_of_item = {
        seed: {prompt.id: image_of(prompt) for prompt in benchmark.prompts} for seed, benchmark in benchmarks.items()
    }
    images = list(dict.fromkeys(image for of_seed in image_of_item.values() for image in of_seed.values()))
    order: dict[Hashable, int] = {image: position for position, image in enumerate(images)}
    tables: dict[int, dict[str, np.ndarray]] = {}
    for seed, of_seed in cells.items():
        metric = benchmarks[seed].metric
        for name, cell in of_seed.items():
            records = cell.evaluation(benchmarks[seed].name).items()
            if records:
                images_of = [image_of_item[seed][record["id"]] for record in records]
                tables.setdefault(seed, {})[name] = image_sums(images_of, metric.table(records), order)
    return images, tables


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
    cells = [run.directory.cell(number).of(arm) for number in range(1, rounds + 1)]
    trains = _stages(run, "train", {arm}, rounds)
    # An arm that reads no pair (SFT on references, policy gradients) needs no candidates either.
    reads = cells[0].selection.folder.is_dir()
    makers = {run.candidates_owner(cells[0]).arm, arm} if reads else set()
    judges = {run.scores_owner(cells[0]).arm, arm} if reads else set()
    generates, scores = _stages(run, "generate", makers, rounds), _stages(run, "score", judges, rounds)
    rollouts = [rollout_costs(cell.training) for cell in cells]
    return {
        "pairs": _total((cell.selection.summary() for cell in cells), "pairs"),
        "generated_tokens": _total(generates, "tokens") + _total(rollouts, "generated_tokens"),
        "judge_calls": _total(scores, "rows") + _total(rollouts, "judge_calls"),
        "trained_tokens": sum(_total(cell.training.metrics()[-1:], "num_tokens") for cell in cells),
        "optimizer_steps": _total(trains, "steps"),
        "batch_size": recipe.train.batch_size,
        "train_seconds": _total(trains, "seconds"),
        "generate_seconds": _total(generates, "seconds"),
        "score_seconds": _total(scores, "seconds"),
    }


def _total(entries: Iterable[Mapping[str, Any]], key: str) -> float:
    return sum(entry.get(key, 0) for entry in entries)


_TRAINING = ("delta_logps/chosen", "delta_logps/rejected", "rewards/margins", "rewards/accuracies")
_PAIRS = ("chosen_mas", "rejected_mas", "mas_gap", "length_difference", "correlation")


def training(run: Run, arm: str) -> dict[str, float]:
    """Means over the last tenth of the last round's logged steps, and over its pairs; what there is of each."""
    cell = run.directory.cell(run.recipe.rounds).of(arm)
    means: dict[str, float] = {}
    rows = cell.training.metrics()
    tail = rows[-max(1, len(rows) // 10) :]
    for key in _TRAINING:
        values = [row[key] for row in tail if key in row]
        if values:
            means[key] = float(np.mean(values))
    pairs = cell.selection.summary()
    return means | {key: float(pairs[key]) for key in _PAIRS if pairs.get(key) is not None}


def signals(run: Run) -> dict[str, float]:
    """AUROC of MAS and of each confidence variant in the shared candidates, and correlations within prompts.

    ``auroc/`` is over all answers, ``auroc_within/`` over answers of one prompt, among which selection chooses.
    """
    calibration = run.directory.cell(1).scores.calibration()
    numbers = {}
    for name, value in calibration.items():
        if isinstance(value, dict) and isinstance(value.get("auroc"), float):
            variant = f"confidence_{value['variant']}" if name == "confidence" and "variant" in value else name
            numbers[f"auroc/{variant}"] = value["auroc"]
            within = (value.get("within") or {}).get("auroc")
            if isinstance(within, float):
                numbers[f"auroc_within/{variant}"] = within
    for name, value in (calibration.get("correlation_mas_confidence") or {}).items():
        if isinstance(value, float):
            numbers[f"correlation/{name}"] = value
    return numbers
