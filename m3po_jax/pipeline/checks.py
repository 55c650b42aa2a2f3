"""Settings that contradict each other, found before anything runs."""

from __future__ import annotations

import dataclasses

from m3po_jax.config import Recipe
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.registry import check as check_benchmark
from m3po_jax.generation.settings import sampling_config
from m3po_jax.pipeline.arms import VCD, arm_recipe
from m3po_jax.pipeline.models import check_trainable
from m3po_jax.pipeline.reward import check_reward_config, judges_by_own_reward, uses_own_reward
from m3po_jax.pipeline.rounds import check_rounds
from m3po_jax.scoring.chat import check_endpoint
from m3po_jax.selection import check_config
from m3po_jax.training.objectives import check_objective

SFT_ANSWERS = ("chosen", "reference")


def check_recipe(recipe: Recipe) -> None:
    """Checks the main recipe and every arm's.

    Raises:
        UserError: names the key.
    """
    if recipe.rounds < 1:
        raise UserError(f"{recipe.rounds} rounds", where="rounds", remedy="at least 1")
    _check_one(recipe)
    if judges_by_own_reward(recipe):
        raise UserError(
            "a reward model learns from scores of another judge",
            where="score.backend",
            remedy="name a trained one (score.model), or make this an arm of a recipe with another backend",
        )
    for arm in recipe.arms:
        if arm == VCD:
            raise UserError(
                "a decoding, not a trained arm", where=f"arms.{arm}", remedy="set evaluate.contrast_alpha"
            )
        try:
            own = arm_recipe(recipe, arm)
            _check_one(own)
            if own.reward != recipe.reward or own.train.objective == "reward":
                raise UserError(
                    "systems share one reward model", where="reward", remedy="set it for the whole recipe"
                )
        except UserError as error:
            raise UserError(str(error), where=f"arms.{arm}") from None


def _check_one(recipe: Recipe) -> None:
    check_rounds(recipe.round)
    check_config(recipe.select)
    check_trainable(recipe)
    for name, benchmark in recipe.evaluate.benchmarks.items():
        if check_benchmark(name, benchmark).judged:
            raise UserError(
                f"{benchmark.metric} scores a judge's reviews, which a run does not write",
                where=f"evaluate.benchmarks.{name}",
                remedy="score saved reviews: m3po evaluate --answers REVIEWS, with a recipe of its own",
            )
    named = [member.partition("=") for member in recipe.score.members]
    judges = [model for name, _, model in named if name == "endpoint"]
    if judges or recipe.score.backend == "endpoint":
        model = recipe.score.endpoint.model or next(filter(None, judges), "")
        check_endpoint(dataclasses.replace(recipe.score.endpoint, model=model))
    sampling_config(recipe.generate, 0)
    if uses_own_reward(recipe) or recipe.train.objective == "reward":
        check_reward_config(recipe)
    if recipe.train.objective in ("preference", "rlhf", "reward"):
        check_objective(recipe.train)
    elif recipe.train.objective != "sft":
        raise UserError(
            f"objective {recipe.train.objective!r} is not an arm's",
            where="train.objective",
            remedy="preference, rlhf or sft",
        )
    elif recipe.train.sft_answers not in SFT_ANSWERS:
        raise UserError(
            f"unknown answers {recipe.train.sft_answers!r}{nearest(recipe.train.sft_answers, SFT_ANSWERS)}",
            where="train.sft_answers",
        )
    longest, limit = recipe.generate.max_new_tokens, recipe.train.max_answer_tokens
    if longest > limit:
        raise UserError(
            f"generate.max_new_tokens = {longest} is more than train.max_answer_tokens = {limit}",
            where="train.max_answer_tokens",
            remedy="raise it: a longer candidate could not be trained on",
        )
    for name in sorted({recipe.select.confidence, recipe.select.confidence_dispreferred} - {""}):
        if name not in recipe.score.confidence:
            raise UserError(
                f"select uses the confidence variant {name!r}, which is not computed",
                where="score.confidence",
                remedy=f"add {name!r} to it",
            )
