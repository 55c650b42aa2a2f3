"""Settings that contradict each other, found before anything runs; what each key may hold is in config.py."""

from __future__ import annotations

from m3po_jax.config import GenerateConfig, Recipe, RewardConfig, ScoreConfig, SelectConfig, TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.evaluation.gate import read_gate
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.evaluation.registry import check as check_benchmark
from m3po_jax.hosts.sharding import check_mesh
from m3po_jax.inference.settings import sampling_config
from m3po_jax.objectives.objective import Learner, Reads
from m3po_jax.objectives.registry import OBJECTIVES, check_objective, objective_of
from m3po_jax.pipeline.arms import VCD, arm_recipe, needs_pairs
from m3po_jax.pipeline.models import check_trainable
from m3po_jax.pipeline.pair_files import pairs_instead_of_prompts
from m3po_jax.pipeline.reward import check_reward_config, judges_by_own_reward, uses_own_reward
from m3po_jax.pipeline.systems import greedy
from m3po_jax.reading import check_values
from m3po_jax.scoring.alignment import check_aggregate, check_template
from m3po_jax.scoring.endpoint_settings import check_endpoint
from m3po_jax.scoring.grading import check_rubric
from m3po_jax.selection import check_config
from m3po_jax.training.guards import check_settings


def draws_candidates(train: TrainConfig, reward: RewardConfig) -> bool:
    """Whether a recipe's stages begin with candidates and a judge."""
    return objective_of(train).draws_candidates and not pairs_instead_of_prompts(train, reward)


def check_recipe(recipe: Recipe) -> None:
    """Checks the main recipe and every arm's.

    Raises:
        UserError: names the key.
    """
    check_values(recipe, "")
    check_mesh(recipe.mesh)
    _check_one(recipe, candidates=draws_candidates(recipe.train, recipe.reward))
    if judges_by_own_reward(recipe.score):
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
            merged = arm_recipe(recipe, arm)
            _check_one(merged, candidates=not merged.train.pairs)
            if objective_of(merged.train).learner is not Learner.POLICY:
                raise UserError(
                    f"objective {merged.train.objective!r} is not an arm's",
                    where="train.objective",
                    remedy=", ".join(
                        sorted(name for name, kind in OBJECTIVES.items() if kind.learner is Learner.POLICY)
                    ),
                )
            if bool(merged.train.pairs) != bool(recipe.train.pairs):
                raise UserError(
                    "a run's systems learn from its own candidates, or all of them from files of pairs",
                    where="train.pairs",
                    remedy="set it for the whole recipe, or for none",
                )
            if merged.train.pairs and any(
                getattr(merged, section) != getattr(recipe, section) for section in ("generate", "score", "select")
            ):
                raise UserError(
                    "changes how candidates become pairs, and all pairs are from a file",
                    where="train.pairs",
                    remedy="here arms change settings of `train`",
                )
            if merged.reward != recipe.reward:
                raise UserError(
                    "systems share one reward model", where="reward", remedy="set it for the whole recipe"
                )
        except UserError as error:
            raise UserError(str(error), where=f"arms.{arm}") from None


def _check_pairs(train: TrainConfig, score: ScoreConfig, rounds: int) -> None:
    """`train.pairs` stands in place of candidates: one round, and an objective that learns from pairs."""
    if not train.pairs:
        return
    where, objective = "train.pairs", objective_of(train)
    if objective.learner is Learner.REWARD_MODEL:
        raise UserError("a reward model learns from reward.pairs", where=where, remedy="name the file there")
    if not needs_pairs(train):
        what = Reads.REFERENCES.value if objective.reads is Reads.REFERENCES else f"objective {objective.name!r}"
        raise UserError(
            f"{what} and pairs from a file",
            where=where,
            remedy="pairs serve train.objective=preference, and sft with train.sft_answers=chosen",
        )
    if rounds > 1:
        raise UserError(f"{rounds} rounds on pairs from a file", where=where, remedy="rounds=1: nothing is generated")
    if uses_own_reward(train, score):
        raise UserError(
            "a reward model scores candidates, and pairs from a file need none",
            where=where,
            remedy="drop this system",
        )


def _check_one(recipe: Recipe, *, candidates: bool) -> None:
    check_objective(recipe.train)
    check_settings(recipe.train)
    check_trainable(recipe.model.quantization, recipe.train.lora)
    _check_pairs(recipe.train, recipe.score, recipe.rounds)
    if uses_own_reward(recipe.train, recipe.score) or objective_of(recipe.train).learner is Learner.REWARD_MODEL:
        check_reward_config(recipe.train, recipe.select, recipe.reward)
    for name, benchmark in recipe.evaluate.benchmarks.items():
        if check_benchmark(name, benchmark).judged:
            raise UserError(
                f"{benchmark.metric} scores a judge's reviews, which a run does not write",
                where=f"evaluate.benchmarks.{name}",
                remedy="score saved reviews: m3po evaluate --answers REVIEWS, with a recipe of its own",
            )
    read_gate(recipe.evaluate.gate, {name: METRICS[b.metric] for name, b in recipe.evaluate.benchmarks.items()})
    greedy(recipe.evaluate)
    if candidates:
        _check_candidates(recipe.generate, recipe.score, recipe.select, recipe.train)


def _check_candidates(generate: GenerateConfig, score: ScoreConfig, select: SelectConfig, train: TrainConfig) -> None:
    check_config(select)
    sampling_config(generate, 0)
    check_score(score)
    longest, limit = generate.max_new_tokens, train.max_answer_tokens
    if longest > limit:
        raise UserError(
            f"generate.max_new_tokens = {longest} is more than train.max_answer_tokens = {limit}",
            where="train.max_answer_tokens",
            remedy="raise it: a longer candidate could not be trained on",
        )
    for name in sorted({select.confidence, select.confidence_dispreferred} - {""}):
        if name not in score.confidence:
            raise UserError(
                f"select uses the confidence variant {name!r}, which is not computed",
                where="score.confidence",
                remedy=f"add {name!r} to it",
            )


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
