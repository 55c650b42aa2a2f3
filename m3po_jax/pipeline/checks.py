"""Settings that contradict each other, found before anything runs; what each key may hold is in config.py."""

from __future__ import annotations

from m3po_jax.config import BenchmarkConfig, Recipe, ScoreConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.generation.settings import sampling_config
from m3po_jax.pipeline.arms import VCD, arm_recipe
from m3po_jax.pipeline.models import check_trainable
from m3po_jax.pipeline.reward import check_reward_config, judges_by_own_reward, uses_own_reward
from m3po_jax.pipeline.systems import greedy
from m3po_jax.reading import check_values
from m3po_jax.scoring.alignment import check_aggregate, check_template
from m3po_jax.scoring.chat import check_endpoint
from m3po_jax.scoring.grading import check_rubric
from m3po_jax.selection import check_config
from m3po_jax.sharding import check_mesh
from m3po_jax.training.guards import check_settings
from m3po_jax.training.objectives import check_objective
from m3po_jax.training.optimizer import make_optimizer

# Objectives whose recipes draw candidates and have a judge; the others train on rows.
WITH_CANDIDATES = ("preference", "rlhf", "reward")
OF_ARMS = ("preference", "rlhf", "sft")


def check_recipe(recipe: Recipe) -> None:
    """Checks the main recipe and every arm's.

    Raises:
        UserError: names the key.
    """
    check_values(recipe, "")
    check_mesh(recipe.mesh)
    _check_one(recipe, candidates=recipe.train.objective in WITH_CANDIDATES)
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
            _check_one(own, candidates=True)
            if own.train.objective not in OF_ARMS:
                raise UserError(
                    f"objective {own.train.objective!r} is not an arm's",
                    where="train.objective",
                    remedy=", ".join(OF_ARMS),
                )
            if own.reward != recipe.reward:
                raise UserError(
                    "systems share one reward model", where="reward", remedy="set it for the whole recipe"
                )
        except UserError as error:
            raise UserError(str(error), where=f"arms.{arm}") from None


def _check_one(recipe: Recipe, *, candidates: bool) -> None:
    check_objective(recipe.train)
    check_settings(recipe.train)
    make_optimizer(recipe.train, 1, {})
    check_trainable(recipe)
    for name, benchmark in recipe.evaluate.benchmarks.items():
        check_benchmark(name, benchmark)
        if METRICS[benchmark.metric].judged:
            raise UserError(
                f"{benchmark.metric} scores a judge's reviews, which a run does not write",
                where=f"evaluate.benchmarks.{name}",
                remedy="score saved reviews: m3po evaluate --answers REVIEWS, with a recipe of its own",
            )
    greedy(recipe.evaluate)
    if candidates:
        _check_candidates(recipe)


def _check_candidates(recipe: Recipe) -> None:
    check_config(recipe.select)
    sampling_config(recipe.generate, 0)
    check_score(recipe.score)
    if uses_own_reward(recipe) or recipe.train.objective == "reward":
        check_reward_config(recipe)
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


def check_benchmark(name: str, benchmark: BenchmarkConfig) -> None:
    """UserError where a benchmark names a rule that its metric does not have, or lacks a file that it needs."""
    where, metric = f"evaluate.benchmarks.{name}", METRICS[benchmark.metric]
    if benchmark.rule and benchmark.rule not in metric.rules:
        known = nearest(benchmark.rule, metric.rules) if metric.rules else f": {benchmark.metric} has one alone"
        raise UserError(f"unknown rule {benchmark.rule!r}{known}", where=f"{where}.rule", remedy="leave it out")
    if benchmark.metric == "amber" and not benchmark.association:
        raise UserError("AMBER needs its relation.json", where=f"{where}.association", remedy="name the file")


def judges(score: ScoreConfig) -> list[ScoreConfig]:
    """The settings of every judge: of the backend, or of each member of an ensemble.

    Raises:
        UserError: an ensemble of fewer than two, or of ensembles.
    """
    # pipeline.backends loads the models' code, which the other checks do without.
    from m3po_jax.pipeline.backends import member_settings

    return member_settings(score) if score.backend == "ensemble" else [score]


def check_score(score: ScoreConfig) -> None:
    """UserError where the settings of a judge cannot be meant; its model's files are not looked at."""
    for judge in judges(score):
        if judge.backend in ("similarity", "claims"):
            check_aggregate(judge.aggregate, judge.vocabulary)
        if judge.backend == "similarity":
            check_template(judge.claim_template, "score.claim_template")
        if judge.backend == "claims" and judge.judge_template:
            check_template(judge.judge_template, "score.judge_template")
        if judge.backend in ("judge", "endpoint"):
            check_rubric(judge.rubric, judge.grades)
        if judge.backend == "endpoint":
            check_endpoint(judge.endpoint)
