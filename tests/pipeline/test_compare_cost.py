"""What a system costs, from the records of its run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from m3po_jax.config import Recipe
from m3po_jax.pipeline.compare import collect
from m3po_jax.workspace.directory import RunDirectory


def test_rollouts_count_as_generated_tokens_and_judge_calls(tmp_path: Path):
    recipe = Recipe(output_dir=str(tmp_path), name="run")
    directory = RunDirectory.of(recipe.output_dir, recipe.name)
    folder = directory.cell(1).of("rlhf").folder
    folder.mkdir(parents=True)
    log = [
        {"step": 1, "episode": 8.0, "completions/mean_length": 10.0, "num_tokens": 100.0},
        {"step": 2, "episode": 16.0, "completions/mean_length": 5.0, "num_tokens": 180.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    stages = [
        {"stage": "generate", "arm": None, "round": 1, "seconds": 3.0, "tokens": 999},
        {"stage": "score", "arm": None, "round": 1, "seconds": 2.0, "rows": 77},
        {"stage": "train", "arm": "rlhf", "round": 1, "seconds": 5.0, "steps": 2},
    ]
    (directory.root / "manifest.json").write_text(json.dumps({"stages": stages}))
    run = SimpleNamespace(
        recipe=recipe,
        directory=directory,
        arm_recipe=lambda arm: replace(recipe, train=replace(recipe.train, batch_size=4)),
        candidates_owner=lambda cell: cell.of(None),
        scores_owner=lambda cell: cell.of(None),
    )
    cost = collect.compute(run, "rlhf")
    assert (cost["generated_tokens"], cost["judge_calls"]) == (8 * 10 + 8 * 5, 16)
    assert (cost["optimizer_steps"], cost["batch_size"], cost["trained_tokens"]) == (2, 4, 180)
    assert (cost["pairs"], cost["train_seconds"], cost["generate_seconds"]) == (0, 5.0, 0)
    (folder / "pairs").mkdir()  # an arm that reads pairs pays for the shared candidates and scores
    cost = collect.compute(run, "rlhf")
    assert (cost["generated_tokens"], cost["judge_calls"]) == (120 + 999, 16 + 77)
