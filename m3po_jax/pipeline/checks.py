"""Settings that contradict each other, found before anything runs."""

from __future__ import annotations

from m3po_jax.config import Recipe, override
from m3po_jax.errors import UserError
from m3po_jax.generation.settings import sampling_config
from m3po_jax.selection import check_config
from m3po_jax.training.objectives import check_objective


def arm_recipe(recipe: Recipe, arm: str | None) -> Recipe:
    """The recipe of a comparison arm; None is the main one."""
    return recipe if arm is None else override(recipe, recipe.arms[arm], f"arms.{arm}")


def check_recipe(recipe: Recipe) -> None:
    """Checks the main recipe and every arm's.

    Raises:
        UserError: names the key.
    """
    if recipe.rounds < 1:
        raise UserError(f"{recipe.rounds} rounds", where="rounds", remedy="at least 1")
    _check_one(recipe)
    for arm in recipe.arms:
        try:
            _check_one(arm_recipe(recipe, arm))
        except UserError as error:
            raise UserError(str(error), where=f"arms.{arm}") from None


def _check_one(recipe: Recipe) -> None:
    check_config(recipe.select)
    sampling_config(recipe.generate, 0)
    if recipe.train.objective == "preference":
        check_objective(recipe.train)
    elif recipe.train.objective != "sft":
        raise UserError(
            f"objective {recipe.train.objective!r} is not an arm's",
            where="train.objective",
            remedy="preference, or sft on the chosen answers",
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
