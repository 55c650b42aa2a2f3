"""What a comparison consists of: one recipe a seed, and the arms that it trains."""

from __future__ import annotations

import dataclasses
from typing import Any

from m3po_jax.config import CompareConfig, Recipe
from m3po_jax.errors import UserError, nearest
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.arms import BASE, CONTRAST_ALPHA, SYSTEMS, VCD, arm_recipe, overrides_of
from m3po_jax.recipes import override, value_of
from m3po_jax.workspace.directory import ComparisonDirectory


@dataclasses.dataclass(frozen=True)
class EfficiencyPoint:
    """One point of the data-efficiency curve: the arm that trains it, on which share of which system's pairs."""

    arm: str
    system: str
    order: str  # value | random | all
    budget: float


def trained_arms(config: CompareConfig) -> list[str]:
    """The arms of the table that are trained, in the recipe's order."""
    return [arm for arm in dict.fromkeys(config.arms) if arm not in (BASE, VCD)]


def efficiency_points(config: CompareConfig) -> list[EfficiencyPoint]:
    """The arms behind the data-efficiency curve; with the whole budget both orders are one."""
    points = []
    for system in dict.fromkeys(config.efficiency_of or [config.main]):
        for budget in sorted(set(config.efficiency)):
            if budget == 1:
                points.append(EfficiencyPoint(f"{system}-all", system, "all", 1.0))
            else:
                points += [
                    EfficiencyPoint(f"{system}-{word}-{budget:g}", system, order, budget) for word, order in _ORDERS
                ]
    return points


_ORDERS = (("best", "value"), ("random", "random"))


def seed_recipe(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of one seed's run: its own candidates, order, adapters and whatever `compare.per_seed` names.

    Confidence variants that an arm needs are computed for all, so that arms share their scores.
    """
    config = recipe.compare
    changes = {key: _filled(key, text, seed) for key, text in config.per_seed.items()}
    recipe = override(recipe, changes, "compare.per_seed")
    recipe = dataclasses.replace(recipe, arms=_with_seed(recipe.arms, seed))
    arms = {arm: overrides_of(recipe, arm) for arm in trained_arms(recipe.compare)}
    for point in efficiency_points(recipe.compare):
        order = "random" if point.order == "random" else "value"
        budget = {"select.budget": point.budget, "select.budget_by": order}
        arms[point.arm] = overrides_of(recipe, point.system) | budget
    variants = list(recipe.score.confidence)
    for arm in arms:
        select = arm_recipe(dataclasses.replace(recipe, arms=arms), arm).select
        variants += [
            name for name in (select.confidence, select.confidence_dispreferred) if name not in ("", *variants)
        ]
    alphas = (recipe.evaluate.contrast_alpha or [CONTRAST_ALPHA]) if VCD in config.arms else []
    return dataclasses.replace(
        recipe,
        seed=seed,
        name=f"seed-{seed}",
        output_dir=str(ComparisonDirectory.of(recipe.output_dir, recipe.name).root),
        arms=arms,
        select=dataclasses.replace(recipe.select, seed=seed),
        score=dataclasses.replace(recipe.score, confidence=variants),
        evaluate=dataclasses.replace(recipe.evaluate, contrast_alpha=alphas),
        compare=CompareConfig(),
    )


def recorded(recipe: Recipe, original: Recipe) -> Recipe:
    """What a seed's directory is checked against: all but what may be added to a comparison later."""
    return dataclasses.replace(
        recipe,
        arms={},
        score=dataclasses.replace(recipe.score, confidence=original.score.confidence),
        evaluate=dataclasses.replace(recipe.evaluate, contrast_alpha=[]),
    )


def _filled(key: str, text: str, seed: int) -> Any:
    """The value that `text` stands for, read as the command line reads one."""
    try:
        filled = text.format(seed=seed)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"cannot fill {text!r}", where=f"compare.per_seed.{key}", remedy="{seed} is the only placeholder"
        ) from None
    return value_of(filled, filled, f"compare.per_seed.{key}")


def _with_seed(value: Any, seed: int) -> Any:
    """`value` with ``{seed}`` replaced in every text that it holds."""
    if isinstance(value, dict):
        return {key: _with_seed(item, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_seed(item, seed) for item in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def check_compare(recipe: Recipe) -> None:
    """Raises UserError where the comparison cannot be meant; names the key."""
    config = recipe.compare
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"{config.seeds}", where="compare.seeds", remedy="name different seeds")
    if not objective_of(recipe.train).uses_reference:
        raise UserError(
            f"the recipe's objective is {recipe.train.objective!r}",
            where="train.objective",
            remedy="preference: arms may have another one",
        )
    if recipe.train.pairs:
        raise UserError(
            "systems are compared on candidates of their own",
            where="train.pairs",
            remedy="`m3po run` trains the recipe's arms on pairs from a file",
        )
    for arm in trained_arms(recipe.compare):
        overrides_of(recipe, arm)
    names = [BASE, *trained_arms(recipe.compare)]
    if not names[1:]:
        raise UserError("no arm is trained", where="compare.arms", remedy="name at least one system to train")
    if config.main not in names[1:]:
        raise UserError(
            f"{config.main!r} is not compared", where="compare.main", remedy=f"one of {', '.join(names[1:])}"
        )
    for system in config.efficiency_of:
        if system not in names[1:]:
            raise UserError(
                f"{system!r} is not compared{nearest(system, names[1:])}",
                where="compare.efficiency_of",
                remedy=f"of {', '.join(names[1:])}",
            )
    names += [point.arm for point in efficiency_points(recipe.compare)]
    if recipe.evaluate.gate and BASE not in config.against:
        raise UserError(
            "the gate judges the main system against the base",
            where="evaluate.gate",
            remedy=f"add {BASE} to compare.against, or remove the gate",
        )
    for name in config.against:
        if name not in names and name in SYSTEMS:
            continue  # a default that this comparison leaves out
        if name not in names:
            raise UserError(f"unknown system {name!r}{nearest(name, names)}", where="compare.against")


def what(config: CompareConfig, arm: str) -> str:
    """What an arm is, in words; of one that the recipe defines, only that."""
    if arm in SYSTEMS:
        return SYSTEMS[arm].what
    for point in efficiency_points(config):
        if point.arm == arm:
            kind = {"value": "the most valuable", "random": "a random", "all": "the whole"}[point.order]
            return f"{point.system} on {kind} {point.budget:g} of its pairs"
    return "defined by the recipe"


def facts(recipe: Recipe) -> dict[str, Any]:
    """What the table's reader must know of the recipe."""
    train, config = recipe.train, recipe.compare
    return {
        "name": recipe.name,
        "seeds": config.seeds,
        "main": config.main,
        "rounds": recipe.rounds,
        "candidates": recipe.generate.num_candidates,
        "temperature": recipe.generate.temperature,
        "lambda": [recipe.select.lambda_preferred, recipe.select.lambda_dispreferred],
        "beta": train.beta,
        "chosen_nll_weight": train.chosen_nll_weight,
        "batch_size": train.batch_size,
        "max_steps": train.max_steps,
        "epochs": train.epochs,
        "equal_pairs": config.equal_pairs,
    }
