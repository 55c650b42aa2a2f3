"""Reward models in a run: which prompts are theirs, training, accuracy, and a checkpoint as a judge.

A reward model's folder holds ``reward.json`` (what it is), ``pairs/`` (what it learned from), ``checkpoints/``,
``metrics.jsonl`` and ``results.json`` (its accuracy on held-out pairs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
)
from m3po_jax.data import pair_rows, tables
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.data.preference_files import FilePairs
from m3po_jax.errors import UserError
from m3po_jax.evaluation.bootstrap import bootstrap
from m3po_jax.hosts.agreement import barrier, is_writer
from m3po_jax.hosts.sharding import use_mesh
from m3po_jax.models.heads import attach_head
from m3po_jax.models.identity import files_identity, tree_identity
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import describe_policy
from m3po_jax.objectives.objective import Reads
from m3po_jax.objectives.registry import check_objective, objective_of
from m3po_jax.objectives.reward import Reward
from m3po_jax.pipeline.models import InputLimits, Policy, attach_adapter, load_policy, model_identity
from m3po_jax.pipeline.pair_files import with_identity
from m3po_jax.pipeline.train import batch_options
from m3po_jax.pipeline.trainings import begin_training, finish_training
from m3po_jax.recipes import from_plain
from m3po_jax.scoring.reward import HeadScorer, RewardBackend
from m3po_jax.selection import RANDOM_RULES, check_config
from m3po_jax.training.loop import load_trained, train
from m3po_jax.training.stage import without_free_settings
from m3po_jax.workspace.records import settings
from m3po_jax.workspace.reward import RewardFolder


@dataclasses.dataclass(frozen=True)
class TrainedReward:
    """A reward model that can be asked, and what is known of it (``results.json``).

    Attributes:
        trained: In this process, now.
    """

    judge: RewardBackend
    results: dict[str, Any]
    seconds: float
    trained: bool = False


def _place(kind: str, key: str) -> float:
    """A number in [0, 1) that belongs to a prompt's id."""
    digest = hashlib.sha256(f"{kind}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_reward_prompt(key: str, split: float) -> bool:
    """Whether a prompt belongs to the reward model: a function of its id, whatever else the data holds."""
    return _place("reward split", key) < split


@dataclasses.dataclass(frozen=True)
class SplitSide:
    """One side of the split: the reward model's prompts, or those of the systems that use it."""

    split: float
    rewards: bool

    def holds(self, key: str) -> bool:
        return is_reward_prompt(key, self.split) == self.rewards


def policy_part(train: TrainConfig, score: ScoreConfig, reward: RewardConfig) -> SplitSide | None:
    """The prompts that a system may learn from; None: all of them."""
    shares_prompts = uses_own_reward(train, score) and not reward.pairs
    return SplitSide(reward.split, rewards=False) if shares_prompts else None


def held_out(ids: Sequence[str], share: float) -> set[str]:
    """The prompts whose pairs measure the accuracy: those of least hash, at least one and never all.

    Raises:
        UserError: fewer than two prompts.
    """
    ordered = sorted(set(ids), key=lambda key: (_place("reward holdout", key), key))
    if len(ordered) < 2:
        raise UserError(
            f"{len(ordered)} prompts with a pair: too few to train a reward model and to measure it",
            where="reward",
            remedy="raise reward.split, add prompts, or loosen select.*",
        )
    return set(ordered[: min(max(round(share * len(ordered)), 1), len(ordered) - 1)])


def judges_by_own_reward(score: ScoreConfig) -> bool:
    """Whether MAS comes from the run's own reward model (a model after `score.backend: reward` is another one)."""
    alone = score.backend == "reward" and not score.model
    return alone or (score.backend == "ensemble" and "reward" in score.members)


def uses_own_reward(train: TrainConfig, score: ScoreConfig) -> bool:
    """Whether a system needs the reward model of its run."""
    return objective_of(train).reads is Reads.PROMPTS or judges_by_own_reward(score)


def reward_train_config(train: TrainConfig, reward: RewardConfig) -> TrainConfig:
    """The training settings of a recipe's reward model: those of `train`, with what `reward` replaces."""
    changes: dict[str, Any] = {
        name: getattr(reward, name)
        for name in ("learning_rate", "batch_size", "epochs", "max_steps")
        if getattr(reward, name) is not None
    }
    if reward.epochs is not None and reward.max_steps is None:
        changes["max_steps"] = None
    if reward.lora_rank is not None:
        changes["lora"] = dataclasses.replace(train.lora, lora_rank=reward.lora_rank)
    # What names metrics of another objective, or belongs to one, means nothing here.
    return dataclasses.replace(
        train, objective=Reward.name, keep_best=0, weights="last", harm_metrics_steps=0, **changes
    )


def pair_rule(select: SelectConfig, reward: RewardConfig) -> SelectConfig:
    """How the reward model's pairs are made."""
    return dataclasses.replace(select, rule=reward.rule, max_pairs=None, budget=1.0)


def check_reward_config(train: TrainConfig, select: SelectConfig, reward: RewardConfig) -> None:
    """Raises UserError for settings of `reward` that cannot be meant."""
    check_config(pair_rule(select, reward))
    check_objective(reward_train_config(train, reward))
    if reward.pairs_per_prompt > 1 and reward.rule not in RANDOM_RULES:
        raise UserError(
            f"{reward.pairs_per_prompt} pairs of a prompt by the rule {reward.rule!r}",
            where="reward.pairs_per_prompt",
            remedy=f"1, or more by one of the rules {', '.join(RANDOM_RULES)}",
        )


def start_reward(policy: Policy, lora: LoRAConfig, seed: int) -> Any:
    """The policy's weights with fresh adapters and a fresh head; the policy stays as it is."""
    model = attach_adapter(policy, lora, seed)
    return attach_head(nnx.merge(*nnx.split(model)), seed)


def reward_of_pairs(
    recipe: Recipe,
    policy: Policy,
    pairs: PairRows,
    out: RewardFolder,
    mesh: Mesh,
    *,
    where: str,
    image_root: Path,
    seed: int,
    force: bool = False,
) -> TrainedReward:
    """Trains a reward model on pairs, measures it on held-out ones, and writes its folder.

    A finished one is loaded; an unfinished one goes on.

    Args:
        pairs: All pairs of a prompt stay on one side.
        where: Of the pairs, for messages.
        image_root: Folder that their image paths are relative to.
        force: As of `trainings.begin_training`.

    Raises:
        UserError: too few pairs, or anything that training stops at.
    """
    started = time.monotonic()
    config = reward_train_config(recipe.train, recipe.reward)
    ids = pairs.ids()
    test = held_out(ids, recipe.reward.holdout)
    learned = pairs.take([number for number, key in enumerate(ids) if key not in test])
    processor = dataclasses.replace(policy.processor, image_root=image_root)
    start = start_reward(policy, config.lora, recipe.seed)
    source = objective_of(config).batches_of_pairs(
        learned, processor, where=where, **batch_options(config, seed, mesh)
    )
    if isinstance(pairs, FilePairs):
        source = with_identity(source, pairs)
    inputs = {
        "model": policy.identity,
        "model.param_dtype": recipe.model.param_dtype,
        "pairs": source.fingerprint,
        "reward.holdout": recipe.reward.holdout,
        "seed": seed,
        **settings("train", without_free_settings(config)),
    }
    finished = begin_training(out.folder, inputs, force=force)
    with use_mesh(mesh):
        result = train(
            start,
            source,
            config,
            output_dir=out.folder,
            mesh=mesh,
            seed=seed,
            remat=recipe.model.remat,
            made_from=inputs,
        )
        scorer = HeadScorer(result.model, mesh, batch_size=recipe.score.batch_size)
        judge = RewardBackend(scorer, policy.processor)
        results = out.results() if finished else None
        if results is None:
            unseen = pairs.take([number for number, key in enumerate(ids) if key in test])
            results = {
                **measure(RewardBackend(scorer, processor), unseen, processor, seed=recipe.seed),
                "train_pairs": len(learned),
                "steps": result.steps,
                "identity": tables.content_hash(
                    policy.identity, source.fingerprint, dataclasses.asdict(config), seed
                )[:16],
            }
            _write(out, recipe.model, config, results, base=policy.identity, seed=recipe.seed)
    seconds = time.monotonic() - started
    if not finished:
        finish_training(out.folder, inputs, seconds, **results)
    return TrainedReward(judge, results, seconds, trained=not finished)


def measure(judge: RewardBackend, pairs: PairRows, processor: Processor, *, seed: int) -> dict[str, Any]:
    """Accuracy of a reward model on pairs (a tie is half right), with a bootstrap interval over prompts."""
    answers = []
    for row in pairs.without_images():
        texts = {side: pair_rows.message_text(row[side]) for side in ("chosen", "rejected")}
        answers.append(
            [row.get(f"{side}_token_ids") or processor.encode_answer(text) for side, text in texts.items()]
        )
    rewards = np.array(judge.of_tokens(pair_rows.PairPrompts(pairs), answers))
    gaps = rewards[:, 0] - rewards[:, 1]
    right = np.where(gaps == 0, 0.5, gaps > 0)
    interval = bootstrap(pairs.ids(), np.stack([right, np.ones_like(right)], axis=1), seed=seed)
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": interval["low"],
        "accuracy_high": interval["high"],
        "held_out_pairs": len(pairs),
        "margin": float(gaps.mean()),
        "mean_reward": float(rewards.mean()),
    }


def _write(
    out: RewardFolder, model: ModelConfig, config: TrainConfig, results: dict[str, Any], *, base: str, seed: int
) -> None:
    if is_writer():
        log, *_ = out.logs(enabled=True)
        if not any("eval_accuracy" in line for line in log.lines(results["steps"])):
            measured = {name: results[name] for name in ("accuracy", "margin", "mean_reward")}
            log.write(results["steps"], {f"eval_{name}": value for name, value in measured.items()})
        description = {
            "base": base,
            "model": dataclasses.asdict(model),
            "train": dataclasses.asdict(config),
            "seed": seed,
        }
        out.save(description, results)
    barrier("measured")


def trained_identity(path: str) -> str:
    """A hash of a trained reward model: what it is, its checkpoints, and the model that it was trained from.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    reward = RewardFolder.find(path)
    model = from_plain(ModelConfig, reward.description()["model"], str(reward.folder))
    base = describe_policy(model)
    facts = files_identity(reward.folder, reward.facts)
    return tables.content_hash(facts, tree_identity(reward.checkpoints), model_identity(base))[:16]


def load_reward(
    path: str,
    mesh: Mesh,
    *,
    image_root: str | Path = ".",
    batch_size: int = 16,
    max_image_pixels: int = DataConfig.max_image_pixels,
) -> RewardBackend:
    """A trained reward model as an alignment backend, from its folder or its run directory.

    Raises:
        UserError: no reward model there, or not the weights that it was trained from.
    """
    reward = RewardFolder.find(path)
    folder, description = reward.folder, reward.description()
    model_config = from_plain(ModelConfig, description["model"], str(folder))
    train_config = from_plain(TrainConfig, description["train"], str(folder))
    seed = description["seed"]
    limits = InputLimits(max_image_pixels=max_image_pixels)
    policy = load_policy(model_config, seed, mesh, limits, image_root=image_root)
    if policy.identity != description.get("base"):
        raise UserError(
            f"the model that it was trained from has changed ({model_config.path})",
            where=str(folder),
            remedy="put the earlier files back, or train the reward model again",
        )
    with use_mesh(mesh):
        start = start_reward(policy, train_config.lora, seed)
        model = load_trained(start, train_config, output_dir=folder, mesh=mesh).model
    return RewardBackend(HeadScorer(model, mesh, batch_size=batch_size), policy.processor)


def accuracy_line(results: dict[str, Any]) -> str:
    """The accuracy as the log says it."""
    low, high = results["accuracy_low"], results["accuracy_high"]
    interval = "" if low is None else f" ({low:.0%} to {high:.0%})"
    hint = "; no better than a coin: what learns from it learns noise" if low is not None and low <= 0.5 else ""
    pairs = f"{results['held_out_pairs']} held-out pairs"
    return f"reward model: {results['accuracy']:.0%}{interval} of {pairs} ranked right{hint}"
