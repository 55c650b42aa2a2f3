"""The alignment backend that a recipe names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from m3po_jax.config import ModelConfig, Recipe, ScoreConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.models.dual_encoder import DualEncoder
from m3po_jax.models.registry import Loaded, describe
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.models import Policy, load_dual_encoder, load_policy
from m3po_jax.pipeline.reward import load_reward
from m3po_jax.scoring.alignment import Backend, Reference, Similarity
from m3po_jax.scoring.engine import Scorer
from m3po_jax.scoring.judge import Claims, Ensemble, shared_blind_spots
from m3po_jax.scoring.reward import Reward

BACKENDS = ("similarity", "claims", "reference", "reward", "ensemble")


def make_backend(
    score: ScoreConfig,
    mesh: Mesh,
    *,
    policy: Policy | None = None,
    image_root: str | Path = ".",
    model_config: ModelConfig | None = None,
    judge_template: str = "",
    own_reward: Callable[[], Reward] | None = None,
) -> Backend:
    """Builds `score.backend` and loads its model.

    ``similarity`` needs `score.model`, a CLIP or SigLIP directory. ``claims`` asks `score.model`, or the policy
    itself where that is empty. ``ensemble`` joins `score.members`, each ``NAME`` or ``NAME=MODEL`` (without MODEL:
    `score.model`). A judge that shares the policy's vision encoder is used, with a warning on standard error.

    Args:
        policy: The model that is aligned; needed where it judges itself, and for the warning.
        image_root: Folder that image paths are relative to.
        model_config: Data types, conversation template, image fit and prompt limit of a judge of its own.
        judge_template: See `judge.Claims`; empty: its own.
        own_reward: Gives the run's own reward model, where `score.model` names none.

    Raises:
        UserError: an unknown backend (the nearest one is named), a missing or unsuitable model.
    """
    if score.backend not in BACKENDS:
        raise UserError(f"unknown backend {score.backend!r}{nearest(score.backend, BACKENDS)}", where="score.backend")
    if score.backend == "reference":
        return Reference(score.vocabulary)
    if score.backend == "reward":
        return _reward(score, mesh, image_root, own_reward)
    if score.backend == "ensemble":
        return _ensemble(
            score,
            mesh,
            policy=policy,
            image_root=image_root,
            model_config=model_config,
            judge_template=judge_template,
            own_reward=own_reward,
        )
    if score.backend == "similarity":
        return _similarity(score, mesh, policy, image_root)
    return _claims(score, mesh, policy, image_root, model_config or ModelConfig(), judge_template)


def _similarity(score: ScoreConfig, mesh: Mesh, policy: Policy | None, image_root: str | Path) -> Similarity:
    if not score.model:
        raise UserError("similarity needs a dual encoder", where="score.model", remedy="name a CLIP or SigLIP model")
    if describe(score.model).family.model_class is not DualEncoder:
        raise UserError(
            "not a dual encoder", where=f"score.model {score.model!r}", remedy="take a CLIP or SigLIP model"
        )
    loaded, processor = load_dual_encoder(score.model, mesh, image_root=image_root, image_fit="")
    _warn(policy, loaded)
    return Similarity(
        loaded.model,
        processor,
        mesh,
        unit=score.unit,
        aggregate=score.aggregate,
        vocabulary=score.vocabulary,
        template=score.claim_template,
        batch_size=score.batch_size,
    )


def _claims(
    score: ScoreConfig,
    mesh: Mesh,
    policy: Policy | None,
    image_root: str | Path,
    model_config: ModelConfig,
    judge_template: str,
) -> Claims:
    if score.model:
        if not hasattr(describe(score.model).family.model_class, "image_features"):
            raise UserError(
                "not a vision-language model, which the claims backend asks",
                where=f"score.model {score.model!r}",
                remedy="take one, or score.backend=similarity",
            )
        config = dataclasses.replace(model_config, path=score.model, init="pretrained", vision_tower="")
        judge = load_policy(Recipe(model=config), mesh, image_root=image_root)
    elif policy is not None:
        processor = dataclasses.replace(policy.processor, image_root=Path(image_root))
        judge = dataclasses.replace(policy, processor=processor)
    else:
        raise UserError("the claims backend needs a judge", where="score.model", remedy="name a model directory")
    _warn(policy, judge.loaded)
    return Claims(
        Scorer(judge.model, mesh, batch_size=score.batch_size),
        judge.processor,
        aggregate=score.aggregate,
        vocabulary=score.vocabulary,
        template=judge_template,
    )


def _reward(
    score: ScoreConfig, mesh: Mesh, image_root: str | Path, own_reward: Callable[[], Reward] | None
) -> Reward:
    if score.model:
        return load_reward(score.model, mesh, image_root=image_root, batch_size=score.batch_size)
    if own_reward is None:
        raise UserError("no reward model", where="score.model", remedy="name a folder of a trained one")
    return own_reward()


def _warn(policy: Policy | None, judge: Loaded) -> None:
    if policy is None:
        return
    base = policy.loaded
    warning = shared_blind_spots(base.directory, judge.directory, base.raw_config, judge.raw_config)
    if warning:
        say(f"score.model: {warning}", style="yellow")


def _ensemble(
    score: ScoreConfig,
    mesh: Mesh,
    *,
    policy: Policy | None,
    image_root: str | Path,
    model_config: ModelConfig | None,
    judge_template: str,
    own_reward: Callable[[], Reward] | None,
) -> Ensemble:
    members: list[Backend] = []
    known = [name for name in BACKENDS if name != "ensemble"]
    for member in score.members:
        name, _, model = member.partition("=")
        if name not in known:
            raise UserError(f"unknown backend {name!r}{nearest(name, known)}", where="score.members")
        own = dataclasses.replace(score, backend=name, model=model or score.model, members=[])
        members.append(
            make_backend(
                own,
                mesh,
                policy=policy,
                image_root=image_root,
                model_config=model_config,
                judge_template=judge_template,
                own_reward=own_reward,
            )
        )
    if len(members) < 2:
        raise UserError("an ensemble has at least two members", where="score.members", remedy="name two backends")
    return Ensemble(members)
