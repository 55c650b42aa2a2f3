"""`m3po run --dry-run`: every stage as done, to do or out of date, with the key that made it so; nothing is touched.

Files are taken for what their records say: a damaged one is found when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from m3po_jax.config import Recipe, SelectConfig, TrainConfig
from m3po_jax.data import tables
from m3po_jax.inference.settings import sampling_config
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline import reward as rewarding
from m3po_jax.pipeline.arms import needs_pairs
from m3po_jax.pipeline.backends import judge_identities
from m3po_jax.pipeline.generate import sampling_text
from m3po_jax.pipeline.models import make_processor
from m3po_jax.pipeline.run import Run
from m3po_jax.pipeline.select import selection_inputs
from m3po_jax.pipeline.systems import EvaluatedSystem, SystemEvaluator, base_systems, greedy
from m3po_jax.pipeline.trainings import handed_on
from m3po_jax.training.stage import without_free_settings
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.records import DONE, OUT_OF_DATE, PENDING, TO_DO, UNFINISHED, Artifact, Status, settings


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
        self.weights: dict[Cell, str] = {}  # of trainings that are done
        self.reward = PENDING

    def stages(self) -> Iterator[Planned]:
        """All of them, in order.

        Raises:
            UserError: what the run would stop at before its first stage.
        """
        for number in range(1, self.recipe.rounds + 1):
            shared, cells = self.directory.cell(number), self.run.trained_in(number)
            if not self.recipe.train.pairs:  # else nothing is generated, scored or selected
                yield self._generate(shared)
                yield self._score(shared)
            if number == 1 and any(
                rewarding.uses_own_reward(self.run.arm_recipe(cell.arm).train, self.run.arm_recipe(cell.arm).score)
                for cell in cells
            ):
                yield self._reward(shared)
            for cell in cells:
                yield from self._system(cell)
        if self.recipe.evaluate.benchmarks:
            yield from self._evaluations()

    def _weights(self, cell: Cell) -> str:
        return self.run.base_identity if cell.round == 0 else self.weights.get(cell, PENDING)

    def _generate(self, cell: Cell) -> Planned:
        recipe = self.run.arm_recipe(cell.arm)
        seed = recipe.seed * 1000 + cell.round
        inputs = {
            "model": self._weights(cell.before),
            "data": self.run.data_identity,
            "seed": recipe.seed,
            **settings("generate", recipe.generate),
            "sampling": sampling_text(recipe.generate, sampling_config(recipe.generate, seed)),
        }
        return Planned(cell.name, "generate", _shards(cell.candidates, inputs))

    def _score(self, cell: Cell) -> Planned:
        recipe = self.run.arm_recipe(cell.arm)
        judges = judge_identities(recipe.score)
        if rewarding.judges_by_own_reward(recipe.score):
            judges.append(self.reward)
        inputs = {
            "judge": judges or [self.run.base_identity],
            "model": self._weights(cell.before),
            "data": self.run.data_identity,
            **settings("score", recipe.score),
        }
        status = _shards(cell.scores, inputs)
        if status.state == DONE:
            owner = self.run.candidates_owner(cell)
            shards, scored = (folder.read() for folder in (owner.candidates, cell.scores))
            if (drawn := self._generate(owner).status.state) != DONE:
                status = Status(OUT_OF_DATE, f"its candidates are {drawn}")
            elif shards is None or scored is None or len(scored.outputs) != len(shards.outputs):
                status = Status(OUT_OF_DATE, "its candidates are others")
        return Planned(cell.name, "score", status)

    def _selection(self, candidates: Cell, scores: Cell, config: SelectConfig, **limits: Any) -> dict[str, Any]:
        """What a selection from the candidates and scores of two cells is made from."""
        contents = {
            name: folder.recorded_content() if planned.status.state == DONE else PENDING
            for name, folder, planned in (
                ("candidates", candidates.candidates, self._generate(candidates)),
                ("scores", scores.scores, self._score(scores)),
            )
        }
        return selection_inputs(contents, config, data=self.run.data_identity, **limits)

    def _system(self, cell: Cell) -> Iterator[Planned]:
        recipe = self.run.arm_recipe(cell.arm)
        pairs = PENDING
        if needs_pairs(recipe.train) and not recipe.train.pairs:
            drawn, scored = self.run.candidates_owner(cell), self.run.scores_owner(cell)
            if cell.arm is not None and drawn == cell:
                yield self._generate(cell)
            if cell.arm is not None and scored == cell:
                yield self._score(cell)
            inputs = self._selection(
                drawn, scored, recipe.select, part=rewarding.policy_part(recipe.train, recipe.score, recipe.reward)
            )
            selected = cell.selection.status(inputs, contents=False)
            yield Planned(cell.name, "select", selected)
            if selected.state == DONE:
                pairs = self._pairs(cell, recipe.train)
        upstream = {"model": self._weights(cell.before), "pairs": pairs, "reward": self.reward}
        artifact = cell.training
        status = artifact.status(self.run.training_inputs(cell, upstream), contents=False)
        if artifact.unrecorded:
            status = Status(UNFINISHED, "nothing tells what it was made from")
        record = artifact.read()
        if status.state == DONE and record is not None:
            self.weights[cell] = handed_on(record, recipe.train)
        yield Planned(cell.name, "train", status)

    def _pairs(self, cell: Cell, train: TrainConfig) -> str:
        """What a training's record has for its pairs, of pairs that are done."""
        if cell.round == 1 or not objective_of(train).uses_reference:
            return cell.selection.recorded_content()
        reference = self._weights(self.run.reference_cell(cell))
        if reference == PENDING:
            return PENDING
        contents = [one.selection.recorded_content() for one in self.run.mixed_cells(cell)]
        return tables.content_hash(self.run.later_inputs(cell, contents, reference))

    def _reward(self, cell: Cell) -> Planned:
        recipe = self.recipe
        artifact, config = cell.reward, rewarding.reward_train_config(recipe.train, recipe.reward)
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
            chosen = self._selection(
                cell,
                cell,
                rewarding.pair_rule(recipe.select, recipe.reward),
                part=rewarding.SplitSide(recipe.reward.split, rewards=True),
                pairs_per_prompt=recipe.reward.pairs_per_prompt,
            )
            if cell.reward_selection.status(chosen, contents=False).state != DONE:
                inputs["pairs"] = PENDING
        status = artifact.status(inputs, contents=False)
        if status.state == DONE and record is not None:
            self.reward = str(record.details.get("identity", PENDING))
        return Planned(cell.name, "reward", status)

    def _evaluations(self) -> Iterator[Planned]:
        run, config = self.run, self.recipe.evaluate
        processor = make_processor(self.recipe.model, run.description, run.limits)
        evaluator = SystemEvaluator(self.recipe, self.directory, processor, run.generator)
        systems = [
            *base_systems(config, self.directory, processor, run.benchmarks, lambda: None, run.base_identity),
            *((self._trained(cell), run.benchmarks) for cell in run.trained_cells()),
        ]
        for system, benchmarks in systems:
            for benchmark in benchmarks:
                status = system.cell.evaluation(benchmark.name).status(
                    evaluator.inputs(system, benchmark), contents=False
                )
                yield Planned(system.name, f"evaluate {benchmark.name}", status)

    def _trained(self, cell: Cell) -> EvaluatedSystem:
        name, weights = self.run.system_name(cell), self._weights(cell)
        return EvaluatedSystem(name, cell, lambda: None, weights, greedy(self.recipe.evaluate))


def _shards(artifact: Artifact, inputs: Mapping[str, Any]) -> Status:
    """Shards of other inputs are out of date whether all of them were made or not."""
    status = artifact.status(inputs, contents=False)
    return replace(status, state=OUT_OF_DATE) if status.state == UNFINISHED else status


def preview(recipe: Recipe, *, force: bool = False) -> list[Planned]:
    """Every stage of a recipe's run, and how it stands in the run directory as it is.

    Args:
        force: As for the run: a directory of another seed, model or data is set aside.

    Raises:
        UserError: the run would refuse its recipe or the directory, in the same words; see `RunDirectory.open`.
    """
    run = Run(recipe, force=force)
    run.check_objective()
    run.directory.check_recipe(run.recorded_recipe(), force=force)
    return list(Preview(run).stages())
