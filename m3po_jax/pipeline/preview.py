"""`m3po run --dry-run`: every stage as done, to do or out of date, with the key that made it so; nothing is touched.

Files are taken for what their records say: a damaged one is found when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from m3po_jax.config import Recipe
from m3po_jax.data import tables
from m3po_jax.generation.settings import sampling_config
from m3po_jax.pipeline import reward as rewarding
from m3po_jax.pipeline import summary
from m3po_jax.pipeline.arms import needs_pairs
from m3po_jax.pipeline.backends import judge_identities
from m3po_jax.pipeline.generate import sampling_text
from m3po_jax.pipeline.models import make_processor
from m3po_jax.pipeline.run import Run
from m3po_jax.pipeline.select import selection_inputs
from m3po_jax.pipeline.systems import System, SystemEvaluator, base_systems, greedy
from m3po_jax.pipeline.trainings import handed_on
from m3po_jax.training.stage import without_free_settings
from m3po_jax.workspace.layout import PAIRS, Cell
from m3po_jax.workspace.records import (
    DONE,
    OUT_OF_DATE,
    PENDING,
    TO_DO,
    UNFINISHED,
    Artifact,
    Status,
    settings,
)
from m3po_jax.workspace.shards import ShardFolder
from m3po_jax.workspace.training import TrainingArtifact


@dataclass(frozen=True)
class Planned:
    """One stage of a run, and how it stands."""

    where: str
    stage: str
    status: Status

    def __str__(self) -> str:
        state, reason = self.status.state, self.status.reason
        if state not in (DONE, TO_DO):
            if state == UNFINISHED:
                reason = f"unfinished; needs --force: {reason}"
            state = OUT_OF_DATE
        return f"{self.where}: {self.stage}: {state}" + (f" ({reason})" if reason else "")


class Preview:
    """Compares the records of a run directory with what its stages would get now."""

    def __init__(self, run: Run):
        self.run, self.recipe, self.directory = run, run.recipe, run.directory
        self.weights: dict[tuple[int, str | None], str] = {}  # of trainings that are done
        self.reward = PENDING

    def stages(self) -> Iterator[Planned]:
        """All of them, in order.

        Raises:
            UserError: what the run would stop at before its first stage.
        """
        arms: list[str | None] = [None, *self.recipe.arms]
        for round in range(1, self.recipe.rounds + 1):
            yield self._generate(round, None)
            yield self._score(round, None)
            if round == 1 and any(rewarding.uses_own_reward(self.run.arm_recipe(arm)) for arm in arms):
                yield self._reward()
            for arm in arms:
                if arm is None or round == 1:
                    yield from self._arm(round, arm)
        if self.recipe.evaluate.benchmarks:
            yield from self._evaluations(arms)

    def _weights(self, round: int, arm: str | None) -> str:
        return self.run.base_identity if round == 0 else self.weights.get((round, arm), PENDING)

    def _generate(self, round: int, arm: str | None) -> Planned:
        recipe, cell = self.run.arm_recipe(arm), self.directory.cell(round, arm)
        inputs = {
            "model": self._weights(round - 1, arm),
            "data": self.run.data_identity,
            "seed": recipe.seed,
            **settings("generate", recipe.generate),
            "sampling": sampling_text(recipe.generate, sampling_config(recipe.generate, recipe.seed * 1000 + round)),
        }
        return Planned(cell.name, "generate", _shards(Artifact(cell.candidates), inputs))

    def _score(self, round: int, arm: str | None) -> Planned:
        recipe, cell = self.run.arm_recipe(arm), self.directory.cell(round, arm)
        judges = judge_identities(recipe.score)
        if rewarding.judges_by_own_reward(recipe):
            judges.append(self.reward)
        inputs = {
            "judge": judges or [self.run.base_identity],
            "model": self._weights(round - 1, arm),
            "data": self.run.data_identity,
            **settings("score", recipe.score),
        }
        status = _shards(Artifact(cell.scores), inputs)
        owner = self.directory.cell(round, self.run.candidates_owner(round, arm))
        candidates = ShardFolder(owner.candidates, "m3po generate").read()
        if status.state == DONE and (candidates is None or candidates.finished is None):
            status = Status(OUT_OF_DATE, "its candidates are not finished")
        elif status.state == DONE and candidates is not None:
            scores = Artifact(cell.scores).read()
            if scores is None or len(scores.outputs) != len(candidates.outputs):
                status = Status(OUT_OF_DATE, "its candidates are others")
        return Planned(cell.name, "score", status)

    def _contents(self, candidates: Cell, scores: Cell, statuses: Mapping[str, Status]) -> dict[str, str]:
        """Hashes of what a selection would read."""
        folders = {"candidates": candidates.candidates, "scores": scores.scores}
        return {
            name: ShardFolder(folder, "").recorded_content() if statuses[name].state == DONE else PENDING
            for name, folder in folders.items()
        }

    def _selection(self, cell: Cell, recipe: Recipe, owners: tuple[str | None, str | None]) -> dict[str, Any]:
        round = cell.round
        statuses = {
            "candidates": self._generate(round, owners[0]).status,
            "scores": self._score(round, owners[1]).status,
        }
        candidates, scores = (self.directory.cell(round, owner) for owner in owners)
        return selection_inputs(
            candidates.candidates,
            scores.scores,
            recipe.select,
            data=self.run.data_identity,
            part=rewarding.policy_part(recipe),
            contents=self._contents(candidates, scores, statuses),
        )

    def _arm(self, round: int, arm: str | None) -> Iterator[Planned]:
        recipe, cell = self.run.arm_recipe(arm), self.directory.cell(round, arm)
        pairs = PENDING
        if needs_pairs(recipe):
            owners = self.run.candidates_owner(round, arm), self.run.scores_owner(round, arm)
            if arm is not None and owners[0] == arm:
                yield self._generate(round, arm)
            if arm is not None and owners[1] == arm:
                yield self._score(round, arm)
            selected = Artifact(cell.pairs).status(self._selection(cell, recipe, owners), contents=False)
            yield Planned(cell.name, "select", selected)
            if selected.state == DONE:
                pairs = self._pairs(round, arm, recipe)
        upstream = {"model": self._weights(round - 1, arm), "pairs": pairs, "reward": self.reward}
        artifact = TrainingArtifact(cell.folder)
        status = artifact.status(self.run.training_inputs(round, arm, upstream), contents=False)
        if artifact.unrecorded:
            status = Status(UNFINISHED, "nothing tells what it was made from")
        record = artifact.read()
        if status.state == DONE and record is not None:
            self.weights[round, arm] = handed_on(record, recipe.train)
        yield Planned(cell.name, "train", status)

    def _pairs(self, round: int, arm: str | None, recipe: Recipe) -> str:
        """What a training's record has for its pairs, of pairs that are done."""
        if round == 1 or recipe.train.objective != "preference":
            return ShardFolder(self.directory.cell(round, arm).pairs, "").recorded_content()
        reference = self._weights(0 if recipe.round.reference == "base" else round - 1, arm)
        earlier = range(1 if recipe.round.mix_previous else round, round + 1)
        if reference == PENDING:
            return PENDING
        return tables.content_hash(
            {
                "pairs": [ShardFolder(self.directory.cell(n, arm).pairs, "").recorded_content() for n in earlier],
                "reference": reference,
                "seed": recipe.seed,
                **settings("round", recipe.round),
            }
        )

    def _reward(self) -> Planned:
        cell, recipe = self.directory.cell(1), self.recipe
        artifact, config = TrainingArtifact(cell.reward), rewarding.reward_train_config(recipe)
        record = artifact.read()
        inputs: dict[str, Any] = {} if record is None else dict(record.inputs)
        inputs |= {
            "model": self.run.base_identity,
            "model.param_dtype": recipe.model.param_dtype,
            "reward.holdout": recipe.reward.holdout,
            "seed": recipe.seed,
            **settings("train", without_free_settings(config)),
        }
        if not recipe.reward.pairs:
            statuses = {"candidates": self._generate(1, None).status, "scores": self._score(1, None).status}
            chosen = selection_inputs(
                cell.candidates,
                cell.scores,
                rewarding.pair_rule(recipe),
                data=self.run.data_identity,
                part=rewarding.Part(recipe.reward.split, rewards=True),
                pairs_per_prompt=recipe.reward.pairs_per_prompt,
                contents=self._contents(cell, cell, statuses),
            )
            if Artifact(cell.reward / PAIRS).status(chosen, contents=False).state != DONE:
                inputs["pairs"] = PENDING
        status = artifact.status(inputs, contents=False)
        if status.state == DONE and record is not None:
            self.reward = str(record.details.get("identity", PENDING))
        return Planned(cell.name, "reward", status)

    def _evaluations(self, arms: list[str | None]) -> Iterator[Planned]:
        run, config = self.run, self.recipe.evaluate
        processor = make_processor(self.recipe, run.description)
        evaluator = SystemEvaluator(self.recipe, self.directory, processor, run.generator)
        systems = [
            *base_systems(config, self.directory, processor, run.benchmarks, lambda: None, run.base_identity),
            *(
                (self._trained(round, arm), run.benchmarks)
                for arm in arms
                for round in range(1, self.recipe.rounds + 1 if arm is None else 2)
            ),
        ]
        for system, benchmarks in systems:
            for benchmark in benchmarks:
                artifact = Artifact(system.cell.benchmark(benchmark.name), home=system.cell.folder)
                status = artifact.status(evaluator.inputs(system, benchmark), contents=False)
                yield Planned(system.name, f"evaluate {benchmark.name}", status)

    def _trained(self, round: int, arm: str | None) -> System:
        name = summary.main_name(self.recipe) if arm is None else arm
        if round < self.recipe.rounds:
            name = f"{name}, round {round}"
        weights = self._weights(round, arm)
        return System(name, self.directory.cell(round, arm), lambda: None, weights, greedy(self.recipe.evaluate))


def _shards(artifact: Artifact, inputs: Mapping[str, Any]) -> Status:
    """Shards of other inputs are out of date whether all of them were made or not."""
    status = artifact.status(inputs, contents=False)
    return replace(status, state=OUT_OF_DATE) if status.state == UNFINISHED else status


def preview(recipe: Recipe) -> list[Planned]:
    """Every stage of a recipe's run, and how it stands in the run directory as it is."""
    run = Run(recipe)
    return list(Preview(run).stages())
