"""Reward models in a run: their prompts, the arms rm_dpo and rlhf, and a trained one as a judge elsewhere."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mini_run import ROOT, rows, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.config import MeshConfig, ScoreConfig
from m3po_jax.data import tables
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.pipeline.arms import arm_recipe
from m3po_jax.pipeline.backends import judge_identities
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.reward import held_out, is_reward_prompt, load_reward, uses_own_reward
from m3po_jax.recipes import load_recipe

ARMS = {
    "rm_dpo": {},
    "rlhf": {"train.batch_size": 2, "train.rl.num_ppo_epochs": 2},
    "rlhf_ppo": {"train.objective": "rlhf", "train.batch_size": 2, "train.rl.algorithm": "ppo"},
}
CHANGES: dict[str, Any] = {
    "train": {"max_steps": 2},
    "score": {"confidence": ["mean"]},
    "evaluate": {"stop_bias": [], "contrast_alpha": []},
    "reward": {"learning_rate": 0.01, "lora_rank": 0, "max_steps": 3, "pairs_per_prompt": 4},
}


def recipe_with(folder: Path, data: Path, arms: dict[str, Any], **changes: Any) -> Path:
    """The mini recipe with these arms alone, and one benchmark."""
    path = write_recipe(folder, data, **(CHANGES | changes))
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | {"arms": arms}
    content["evaluate"]["benchmarks"].pop("questions")
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_with(folder, write_data(folder / "data", 15), ARMS)
    assert main(["run", "--config", str(recipe)]) == 0
    return folder / "runs" / "mini"


def ids_of(folder: Path) -> list[str]:
    return [row["id"] for row in rows(folder)]


def ids(folder: Path) -> set[str]:
    return set(ids_of(folder))


def test_each_side_of_the_split_learns_from_its_own_prompts(finished: Path) -> None:
    theirs = ids(finished / "round-1/reward/pairs")
    ours = ids(finished / "arms/rm_dpo/round-1/pairs")
    assert theirs and all(is_reward_prompt(key, 0.5) for key in theirs)
    assert ours and not any(is_reward_prompt(key, 0.5) for key in ours)
    # The recipe's own system is no user of the reward model, and learns from both sides.
    assert ids(finished / "round-1/pairs") & theirs


def test_a_prompt_teaches_the_reward_model_several_pairs(finished: Path) -> None:
    theirs = rows(finished / "round-1/reward/pairs")
    counts = collections.Counter(row["id"] for row in theirs)
    assert max(counts.values()) == 4 and len(counts) < len(theirs)
    assert len({(row["id"], row["chosen_candidate"], row["rejected_candidate"]) for row in theirs}) == len(theirs)
    assert all(row["chosen_mas"] > row["rejected_mas"] for row in theirs)
    assert max(collections.Counter(ids_of(finished / "arms/rm_dpo/round-1/pairs")).values()) == 1


def test_accuracy_is_told_wherever_one_looks(finished: Path) -> None:
    folder = finished / "round-1/reward"
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["accuracy_low"] <= results["accuracy"] <= results["accuracy_high"] <= 1
    pairs = len(rows(folder / "pairs"))
    assert results["held_out_pairs"] >= 1 and results["held_out_pairs"] + results["train_pairs"] == pairs
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_accuracy"] == results["accuracy"] and [line["step"] for line in lines] == [1, 2, 3, 3]
    stages = {stage["stage"]: stage for stage in json.loads((finished / "manifest.json").read_text())["stages"]}
    assert stages["reward"]["accuracy"] == results["accuracy"]


def test_the_reward_model_learns_as_a_whole_and_the_policy_by_adapters(finished: Path) -> None:
    known = json.loads((finished / "round-1/reward/reward.json").read_text())
    assert known["train"]["lora"]["lora_rank"] == 0 and known["train"]["objective"] == "reward"
    sizes = {
        path: sum(file.stat().st_size for file in (finished / path).rglob("*") if file.is_file())
        for path in ("round-1/reward/checkpoints", "arms/rm_dpo/round-1/checkpoints")
    }
    assert sizes["round-1/reward/checkpoints"] > 2 * sizes["arms/rm_dpo/round-1/checkpoints"], sizes


def test_rm_dpo_pairs_are_the_extremes_of_the_rewards(finished: Path) -> None:
    scores: dict[str, dict[int, float]] = {}
    for row in rows(finished / "arms/rm_dpo/round-1/scores"):
        assert row["mas"] == row["mas_reward"] and 0 < row["mas"] < 1
        scores.setdefault(row["id"], {})[row["candidate"]] = row["mas"]
    for pair in rows(finished / "arms/rm_dpo/round-1/pairs"):
        pool = scores[pair["id"]]
        assert pool[pair["chosen_candidate"]] == max(pool.values())
        assert pool[pair["rejected_candidate"]] == min(pool.values())
    first = json.loads((finished / "arms/rm_dpo/round-1/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize("arm", ["rlhf", "rlhf_ppo"])
def test_rlhf_trains_and_is_evaluated(finished: Path, arm: str) -> None:
    folder = finished / "arms" / arm / "round-1"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert abs(lines[0]["objective/kl"]) < 1e-3 and lines[0]["val/ratio"] == pytest.approx(1, abs=1e-3)
    assert ("loss/value_avg" in lines[0]) == (arm == "rlhf_ppo")
    assert not tables.shards(folder / "pairs")
    # What the comparison charges the arm with: 2 prompts × 4 answers of each of its rollouts.
    stages = json.loads((finished / "manifest.json").read_text())["stages"]
    noted = next(stage for stage in stages if stage["stage"] == "train" and stage["arm"] == arm)
    rollouts = {line["episode"]: line["completions/mean_length"] for line in lines}
    assert noted["judge_calls"] == 8 * len(rollouts) and len(rollouts) == (1 if arm == "rlhf" else 2)
    assert noted["generated_tokens"] == pytest.approx(8 * sum(rollouts.values()), abs=0.51)
    assert (folder / "evaluation/scenes/results.json").exists()
    names = [row["name"] for row in json.loads((finished / "evaluation.json").read_text())["tables"][0]["rows"]]
    assert names == ["base", *ARMS, "m3po"]
    assert arm in (finished / "report.html").read_text(encoding="utf-8")


def test_a_second_call_does_nothing_new(finished: Path) -> None:
    watched = [path for path in finished.rglob("*") if path.suffix in (".parquet", ".jsonl", ".npz")]
    watched += [*finished.rglob("done.json"), *finished.rglob("reward.json")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    assert main(["run", "--config", str(finished.parents[1] / "mini.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in watched} == before


@pytest.mark.parametrize("arm", ["rlhf_ppo"])
def test_the_value_head_stays_behind(finished: Path, tmp_path: Path, arm: str) -> None:
    recipe = str(finished.parents[1] / "mini.yaml")
    assert main(["export", "--config", recipe, "--arm", arm, "--format", "peft", "--output", str(tmp_path)]) == 0
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        names = list(file.keys())
    assert names and all("lora_" in name for name in names)


def test_a_trained_reward_model_judges_another_run(finished: Path, tmp_path: Path) -> None:
    """By its own verb on pairs from a file, then as MAS: the same rewards as in the run that trained it."""
    data = finished.parents[1] / "data" / "prompts.jsonl"
    judge = {"backend": "reward", "model": str(finished), "confidence": ["mean"]}
    recipe = str(recipe_with(tmp_path, data, {}, score=judge))
    for verb in ("generate", "score"):
        assert main([verb, "--config", recipe]) == 0
    there = {(row["id"], row["candidate"]): row["mas"] for row in rows(finished / "arms/rm_dpo/round-1/scores")}
    here = {(row["id"], row["candidate"]): row["mas"] for row in rows(tmp_path / "runs/mini/round-1/scores")}
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert value == pytest.approx(there[key], abs=1e-5)


def test_a_reward_model_is_known_by_its_weights_and_by_the_base_it_adapts(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "round-1/reward", tmp_path / "reward"))
    before = judge_identities(ScoreConfig(backend="reward", model=str(folder)))
    assert before == judge_identities(ScoreConfig(backend="ensemble", members=[f"reward={finished}", "claims"]))
    largest = max((folder / "checkpoints").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert judge_identities(ScoreConfig(backend="reward", model=str(folder))) != before
    described = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(described | {"base": "0" * 16}))
    with pytest.raises(UserError, match=r"trained from has changed.*train the reward model again"):
        load_reward(str(folder), make_mesh(MeshConfig()))


def test_train_verb_on_pairs_from_a_file(finished: Path, tmp_path: Path) -> None:
    data = finished.parents[1] / "data" / "prompts.jsonl"
    pairs = str(finished / "round-1/pairs")
    recipe = str(recipe_with(tmp_path, data, {}))
    settings = ["train.objective=reward", f"reward.pairs={pairs}", "reward.holdout=0.4", "name=judge"]
    assert main(["train", "--config", recipe, *settings]) == 0
    results = json.loads((tmp_path / "runs/judge/round-1/reward/results.json").read_text())
    assert results["held_out_pairs"] == round(0.4 * len(ids(finished / "round-1/pairs")))
    assert main(["run", "--config", recipe, *settings]) == 2  # nothing to evaluate
    assert main(["export", "--config", recipe, *settings]) == 2


def test_the_split_depends_on_ids_alone() -> None:
    keys = [f"row-{i}" for i in range(2000)]
    sides = [is_reward_prompt(key, 0.3) for key in keys]
    assert 0.25 < np.mean(sides) < 0.35
    assert all(is_reward_prompt(key, 0.6) for key, side in zip(keys, sides, strict=True) if side)
    test = held_out(keys, 0.1)
    assert len(test) == 200 and held_out(keys[::-1] + keys[:5], 0.1) == test
    assert len(held_out(["a", "b"], 0.01)) == 1 == len(held_out(["a", "b"], 0.99))
    with pytest.raises(UserError, match="too few"):
        held_out(["a", "a"], 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.split=0"], "reward.split"),
        (["reward.holdout=1"], "reward.holdout"),
        (["reward.rule=best"], r"reward\.rule: unknown value 'best'"),
        (["reward.pairs_per_prompt=0"], "reward.pairs_per_prompt: must be in"),
        (["reward.rule=m3p", "reward.pairs_per_prompt=4"], "4 pairs of a prompt by the rule 'm3p'"),
        (["arms={rlhf: {train.rl.rloo_k: 1}}"], "rloo_k"),
        (["arms={rlhf: {reward.split: 0.1}}"], "share one reward model"),
        (["score.backend=reward"], "another judge"),
        (["train.objective=reward", "train.reward_margin=-1"], "reward_margin"),
    ],
)
def test_settings_that_cannot_be_meant(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(None, ["arms={rlhf: {}}", *overrides]))


@pytest.mark.parametrize("name", ["quickstart", "llava15_7b_m3po", "llava15_7b_single_gpu", "llava15_13b_m3po_pod"])
def test_every_recipe_may_have_the_arms(name: str) -> None:
    from m3po_jax.pipeline.mock import shrink

    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml", ["arms={rlhf: {train.rl.algorithm: ppo}, rm_dpo: {}}"])
    for made in (recipe, shrink(recipe)):
        check_recipe(made)
        rm_dpo = arm_recipe(made, "rm_dpo")
        assert uses_own_reward(rm_dpo.train, rm_dpo.score) and not uses_own_reward(made.train, made.score)


def test_a_missing_reward_model_is_one_line(finished: Path, tmp_path: Path) -> None:
    from m3po_jax.workspace.reward import RewardFolder

    with pytest.raises(UserError, match="no trained reward model"):
        RewardFolder.find(str(tmp_path))
    assert RewardFolder.find(str(finished)).folder == RewardFolder.find(str(finished / "round-1/reward")).folder
