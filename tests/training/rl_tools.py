"""A policy that answers the tiny prompts, and rewards that its answers can be trained towards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from training_tools import EOS_ID, TinyProcessor, base_config, tiny_model

from m3po_jax.config import RLConfig, TrainConfig
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.scorer import Scorer
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.heads import attach_head
from m3po_jax.scoring.reward import HeadScorer
from m3po_jax.training.rollouts import RolloutSource

LIKED, TOKENS = tuple(range(20, 36)), 6


def prompts(count: int = 6) -> list[Prompt]:
    return [Prompt(f"row-{i}", (Image(path=str(10 * i)),), "what" + "?" * (i % 3)) for i in range(count)]


def share_of_liked(batch: Any, token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The share of an answer's tokens that are liked: about a quarter at first."""
    return (np.isin(token_ids, LIKED) & mask).sum(-1) / mask.sum(-1)


def rl_config(rl: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    config = base_config(objective="rlhf", max_steps=4, learning_rate=0.02, lr_schedule="constant", **changes)
    return replace(config, rl=replace(RLConfig(kl_coef=0.0), **(rl or {})))


def policy(config: TrainConfig) -> Any:
    model = tiny_model(config)
    return attach_head(model) if config.rl.algorithm == "ppo" else model


def source(
    config: TrainConfig, model: Any, mesh: Any, folder: Path, reward: Any = share_of_liked, count: int = 6
) -> RolloutSource:
    sampling = SamplingConfig(num_candidates=config.rl.rloo_k, max_new_tokens=TOKENS, seed=5)
    return RolloutSource(
        prompts(count),
        TinyProcessor(),
        Generator(
            model, eos_token_id=EOS_ID, pad_token_id=0, mesh=mesh, sampling=sampling, batch_size=4, prefix_bucket=16
        ),
        reward,
        Scorer(model, mesh, batch_size=4, prefix_bucket=16),
        config.rl,
        config.batch_size,
        seed=11,
        folder=folder,
        values=HeadScorer(model, mesh, batch_size=4) if config.rl.algorithm == "ppo" else None,
    )
