"""`--mock`: any recipe with a tiny model and a handful of rows, to try its settings on a laptop in a minute."""

from __future__ import annotations

import dataclasses

from m3po_jax.config import BenchmarkConfig, DataConfig, MeshConfig, ModelConfig, Recipe, ScoreConfig
from m3po_jax.data.templates import CHAT
from m3po_jax.objectives.objective import Learner
from m3po_jax.objectives.registry import objective_of

TINY_MODEL, TINY_SCORER = "builtin:quickstart-base", "builtin:quickstart-scorer"
SCENES = "m3po_jax.quickstart.builder:m3po_scenes/demo"
ROWS = 24


def _rows(split: str, limit: int = ROWS) -> DataConfig:
    return DataConfig(source="tfds", path=SCENES, split=split, limit=limit)


def _small(count: int | None) -> int | None:
    return None if count is None else min(count, 2)


def shrink(recipe: Recipe) -> Recipe:
    """The recipe with everything large replaced; the method's settings (losses, rules, arms) stay.

    The model becomes the quickstart's, data its scenes, the judge the policy itself or the quickstart's scorer, and
    thresholds that a tiny judge could not meet are opened.
    """
    replace = dataclasses.replace
    objective = objective_of(recipe.train)
    return replace(
        recipe,
        name=f"{recipe.name}-mock",
        rounds=min(recipe.rounds, 2),
        mesh=MeshConfig(),
        model=replace(
            recipe.model,
            path=TINY_SCORER if objective.learner is Learner.DUAL_ENCODER else TINY_MODEL,
            revision="",
            init="pretrained",
            vision_tower="",
            dtype="float32",
            param_dtype="float32",
            attention="xla",
            # The quickstart's models have no template of their own, and images of one size.
            template=ModelConfig.template if recipe.model.template == CHAT else recipe.model.template,
            image_fit="stretch",
            min_pixels=None,
            max_pixels=None,
            pan_and_scan=False,
        ),
        data=_rows("prompts"),
        generate=replace(
            recipe.generate,
            num_candidates=(
                # A pool's settings belong to its candidates one by one.
                recipe.generate.num_candidates if recipe.generate.pool else min(recipe.generate.num_candidates, 4)
            ),
            min_new_tokens=min(recipe.generate.min_new_tokens, 2),
            pool=[replace(member, min_new_tokens=_small(member.min_new_tokens)) for member in recipe.generate.pool],
            max_new_tokens=min(recipe.generate.max_new_tokens, 24),
            batch_size=8,
            shard_rows=8,
        ),
        score=_tiny_judge(recipe.score),
        # In so few tokens many answers do not come to their end.
        select=replace(recipe.select, chosen_floor=0.0, margin=0.0, cut="keep"),
        train=replace(
            recipe.train,
            data=[] if objective.draws_candidates else [_rows("validation")],
            pairs="",
            lora=replace(recipe.train.lora, lora_rank=min(recipe.train.lora.lora_rank, 4)),
            batch_size=4,
            gradient_accumulation_steps=1,
            max_steps=4,
            max_answer_tokens=32,
        ),
        reward=replace(recipe.reward, pairs="", batch_size=None, epochs=None, max_steps=None),
        evaluate=replace(
            recipe.evaluate,
            benchmarks={
                name: BenchmarkConfig(
                    metric=benchmark.metric if benchmark.metric in ("chair", "pope") else "short_answer",
                    data=_rows("test", 40),
                    kind="caption" if benchmark.metric == "chair" else "yesno",
                )
                for name, benchmark in recipe.evaluate.benchmarks.items()
            },
            max_new_tokens=min(recipe.evaluate.max_new_tokens, 24),
            batch_size=8,
            bootstrap_samples=100,
            gate={},  # what a tiny model loses in a few steps says nothing
        ),
    )


def _tiny_judge(score: ScoreConfig) -> ScoreConfig:
    """The policy itself or the quickstart's scorer in place of every judge: no large model, and no server to pay.

    The quickstart's model knows no digits, so rubrics become claims; so do reward models, which are as large as their
    policies.
    """

    def tiny(backend: str) -> str:
        return "claims" if backend in ("judge", "endpoint", "reward") else backend

    backend = tiny(score.backend)
    members = [tiny(member.partition("=")[0]) for member in score.members]
    return dataclasses.replace(
        score,
        backend=backend,
        members=[f"similarity={TINY_SCORER}" if name == "similarity" else name for name in members],
        model="" if backend in ("claims", "ensemble") else TINY_SCORER,
        batch_size=8,
    )
