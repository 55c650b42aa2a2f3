"""The `rlhf` arm: the policy learns from a reward model's opinion of its own answers, by RLOO or PPO."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import GenerateConfig, Recipe, RLConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.hosts.sharding import use_mesh
from m3po_jax.inference.scorer import Scorer
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.heads import attach_head, detach_head
from m3po_jax.objectives.rlhf import algorithm_of
from m3po_jax.pipeline.models import Policy, make_generator
from m3po_jax.pipeline.reward import TrainedReward
from m3po_jax.pipeline.train import Trained
from m3po_jax.scoring.reward import HeadScorer
from m3po_jax.training.loop import train
from m3po_jax.training.rollouts import RolloutSource
from m3po_jax.workspace.training import TrainingArtifact


def rollout_sampling(rl: RLConfig, generate: GenerateConfig, seed: int) -> SamplingConfig:
    """How rollouts are drawn: nothing is truncated, so that the sampled policy is the one that is trained."""
    return SamplingConfig(
        num_candidates=rl.rloo_k,
        temperature=rl.temperature,
        max_new_tokens=generate.max_new_tokens,
        suppress_token_ids=tuple(generate.suppress_tokens),
        seed=seed,
    )


def rollout_costs(training: TrainingArtifact) -> dict[str, int]:
    """Answers that the reward model was asked about, and their tokens, by its metrics; empty without rollouts.

    Rollouts without a line of their own (`train.log_steps`) count with the mean length of the others.
    """
    lines = [line for line in training.metrics() if "episode" in line]
    if not lines:
        return {}
    lengths = {line["episode"]: line["completions/mean_length"] for line in lines}
    answers = max(lengths)
    return {"judge_calls": int(answers), "generated_tokens": round(answers * sum(lengths.values()) / len(lengths))}


def train_rlhf(
    recipe: Recipe,
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: TrainedReward,
    out: Path,
    mesh: Mesh,
    *,
    start: Any,
    seed: int,
    made_from: Mapping[str, Any] | None = None,
) -> Trained:
    """RLOO or PPO from `start`, the policy's model with adapters (trained or not), on prompts of its own.

    The KL is measured to `start` with its adapters switched off. PPO's value head learns beside the adapters and is
    taken off the result.
    """
    started = time.monotonic()
    config, processor = recipe.train, policy.processor
    model = start
    size = min(recipe.generate.batch_size, recipe.score.batch_size)
    with use_mesh(mesh):
        values = None
        if algorithm_of(config.rl).learns_values:
            model = attach_head(nnx.merge(*nnx.split(start)), recipe.seed)
            values = HeadScorer(model, mesh, batch_size=size)
        sampling = rollout_sampling(config.rl, recipe.generate, seed)
        generator = make_generator(processor, model, mesh, sampling=sampling, batch_size=recipe.generate.batch_size)
        source: Any = RolloutSource(
            prompts,
            processor,
            generator,
            reward.judge.scorer.rewards,
            Scorer(start, mesh, batch_size=size),
            config.rl,
            config.batch_size,
            seed,
            TrainingArtifact(out).rollouts,
            values=values,
            identity=reward.results["identity"],
        )
        result = train(
            model,
            source,
            config,
            output_dir=out,
            mesh=mesh,
            seed=seed,
            remat=recipe.model.remat,
            made_from=made_from,
        )
    result = dataclasses.replace(result, model=detach_head(result.model))
    return Trained(result, policy.loaded, time.monotonic() - started)
