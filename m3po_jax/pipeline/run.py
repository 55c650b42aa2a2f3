"""A run: the stages in order, over rounds and comparison arms, each skipped where it is finished."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.config import ModelConfig, Recipe, ScoreConfig
from m3po_jax.data import tables
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.data.preference_files import FilePairs, image_folder
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import barrier, is_writer
from m3po_jax.hosts.sharding import use_mesh
from m3po_jax.hosts.signals import stop_if_signalled
from m3po_jax.inference.scorer import Scorer
from m3po_jax.inference.settings import sampling_config
from m3po_jax.objectives.objective import Learner, Reads
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline import reward as rewarding
from m3po_jax.pipeline import rounds, summary
from m3po_jax.pipeline.arms import makes_pairs, needs_pairs
from m3po_jax.pipeline.backends import judge_identities, make_backend
from m3po_jax.pipeline.caches import vision_features, vision_folder
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.gate import require_gate
from m3po_jax.pipeline.generate import generate
from m3po_jax.pipeline.preflight import check_before_run
from m3po_jax.pipeline.resources import Resources
from m3po_jax.pipeline.rlhf import rollout_costs, train_rlhf
from m3po_jax.pipeline.score import NEED_BLANK_IMAGE, score
from m3po_jax.pipeline.score_counts import counts_line
from m3po_jax.pipeline.select import select
from m3po_jax.pipeline.systems import EvaluatedSystem, base_systems, greedy
from m3po_jax.pipeline.train import (
    Trained,
    rows_identity,
    train_on_pairs,
    train_on_references,
    trained_settings,
)
from m3po_jax.pipeline.trainings import (
    begin_training,
    finish_training,
    finished_record,
    handed_on,
    require_current,
)
from m3po_jax.recipes import essential
from m3po_jax.scoring.alignment import Backend
from m3po_jax.training.loop import load_trained
from m3po_jax.workspace.cell import Cell


class Run(Resources):
    """One recipe's stages on one mesh; what they share is in `Resources`."""

    def __init__(self, recipe: Recipe, *, force: bool = False):
        super().__init__(recipe, force=force)
        self._trained: dict[Cell, Trained] = {}

    def forget(self, cell: Cell) -> None:
        """Lets go of a trained model; its checkpoint stays."""
        self._trained.pop(cell, None)

    def release(self) -> None:
        super().release()
        self._trained.clear()
        self.__dict__.pop("reward_model", None)

    # Stages.

    def weights_identity(self, cell: Cell) -> str:
        """A hash of the weights after the training of a cell (round 0: the base model).

        Raises:
            UserError: that training is not finished, or is out of date.
        """
        if cell.round == 0:
            return self.base_identity
        record = finished_record(cell.folder)
        require_current(cell.folder, record, self.training_inputs(cell))
        return handed_on(record, self.arm_recipe(cell.arm).train)

    def training_inputs(self, cell: Cell, upstream: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a training is made from, as its record names it.

        Args:
            upstream: ``model``, ``pairs`` and ``reward`` of earlier stages; default: of what is there, verified.

        Raises:
            UserError: pairs that are not there or are not what was written; an earlier training is out of date.
        """
        recipe = self.arm_recipe(cell.arm)
        inputs: dict[str, Any] = {
            "system": cell.name,
            "model": upstream["model"] if upstream else self.weights_identity(cell.before),
            **trained_settings(recipe.model, recipe.train, recipe.seed),
        }
        objective = objective_of(recipe.train)
        if objective.reads is Reads.PROMPTS:
            part = rewarding.policy_part(recipe.train, recipe.score, recipe.reward)
            inputs |= {
                "data": self.data_identity,
                "part": None if part is None else part.split,
                "reward": upstream["reward"] if upstream else self.reward_stage().results["identity"],
                "generate.max_new_tokens": recipe.generate.max_new_tokens,
                "generate.suppress_tokens": recipe.generate.suppress_tokens,
            }
        elif not needs_pairs(recipe.train):
            inputs["data"] = rows_identity(recipe.train, recipe.data)
        elif recipe.train.pairs:
            inputs["pairs"] = self.pair_file(recipe.train.pairs).fingerprint
        elif upstream:
            inputs["pairs"] = upstream["pairs"]
        elif cell.round > 1 and objective.uses_reference:
            inputs["pairs"] = tables.content_hash(self._later_inputs(cell))
        else:
            inputs["pairs"] = cell.selection.content()
        return inputs

    def model_before(self, cell: Cell) -> Any:
        """The policy that generates in a round: the base, then what the round before has trained."""
        return self.start_model if cell.round == 1 else self.train_stage(cell.before, only_finished=True).model

    def generate_stage(self, cell: Cell) -> None:
        """Draws a round's candidates, as far as they are missing."""
        stop_if_signalled("generating")
        recipe = self._pairing_recipe(cell)
        config = recipe.generate
        sampling = sampling_config(config, recipe.seed * 1000 + cell.round)
        made_from = {"model": self.weights_identity(cell.before), "data": self.data_identity, "seed": recipe.seed}
        generator = self.generator(self.model_before(cell), sampling, config.batch_size)
        features = vision_features(
            vision_folder(recipe.cache, recipe.train, recipe.output_dir),
            self.policy,
            self.policy.processor,
            self.mesh,
        )
        details = generate(
            self.tokenised,
            generator,
            self.policy.processor,
            config,
            cell.candidates,
            inputs=tables.content_hash(made_from["model"], self.data_identity),
            made_from=made_from,
            features=features,
        )
        self.directory.note_stage("generate", cell, cell.candidates.read())
        say(
            f"round {cell.round}: {details['candidates']} candidates of {details['prompts']} prompts, "
            f"{details['distinct']} distinct, {details['cut']} cut at {config.max_new_tokens} tokens"
        )

    def score_stage(self, cell: Cell) -> None:
        """Scores a round's candidates, and says what its judge is worth."""
        stop_if_signalled("scoring")
        recipe = self._pairing_recipe(cell)
        made_from = {
            "judge": self._judge_identities(recipe.score),
            "model": self.weights_identity(cell.before),
            "data": self.data_identity,
        }
        warnings: list[str] = []
        with use_mesh(self.mesh):
            backend = self._judge(recipe.score, recipe.model, warnings)
            scorer = None
            if NEED_BLANK_IMAGE.intersection(recipe.score.confidence):
                scorer = Scorer(self.model_before(cell), self.mesh, batch_size=recipe.score.batch_size)
            details = score(
                self.candidates_owner(cell).candidates,
                self.prompts,
                backend,
                recipe.score,
                recipe.select,
                cell.scores,
                inputs=tables.content_hash(made_from, essential({"score": dataclasses.asdict(recipe.score)})),
                made_from=made_from,
                processor=self.policy.processor,
                scorer=scorer,
                warnings=warnings,
            )
        verdict, judges, notes = details.pop("verdict", []), details.pop("judges", []), details.pop("notes")
        self.directory.note_stage("score", cell, cell.scores.read())
        missing = details["scored"] < details["rows"]
        say(f"round {cell.round}: {counts_line(details, notes, backend.name)}", style="yellow" if missing else None)
        for judge in judges:
            paid = f"{judge['requests']} requests paid, {judge['from_cache']} answers from the cache"
            guessed = f" (of {judge['guessed']} requests guessed: the server tells no tokens)"
            say(f"  {judge['judge']}: {paid}, cost {judge['cost']:.4g}{guessed if judge['guessed'] else ''}")
        for line in (line for line in verdict if line["about"] not in ("judge", "abstained")):  # said before
            say(f"  {line['text']}", style="yellow" if line["tone"] == "warn" else None)

    def _judge(self, config: ScoreConfig, model: ModelConfig, warnings: list[str]) -> Backend:
        """Who scores an arm's candidates; `warnings` gets a line where it shares the policy's blind spots."""
        return make_backend(
            config,
            self.mesh,
            policy=self.policy,
            image_root=self.source.image_root,
            model_config=model,
            folder=self.directory.root,
            warnings=warnings,
            own_reward=lambda: self.reward_stage().judge,
        )

    def _judge_identities(self, config: ScoreConfig) -> list[str]:
        """Hashes of every model that judges; the policy's own where a judge is not named."""
        identities = judge_identities(config)
        if rewarding.judges_by_own_reward(config):
            identities.append(self.reward_stage().results["identity"])
        return identities or [self.policy.identity]

    def _pairing_recipe(self, cell: Cell) -> Recipe:
        """The recipe of a system that makes its own pairs.

        Raises:
            UserError: it reads them from a file.
        """
        recipe = self.arm_recipe(cell.arm)
        if recipe.train.pairs:
            raise UserError(
                "training reads pairs from a file, so nothing is generated, scored or selected",
                where="train.pairs",
                remedy="`m3po train` comes next; without this key a run makes its own pairs",
            )
        return recipe

    def prepare_scores(self, cell: Cell) -> None:
        """Candidates and scores that an arm does not share."""
        if cell.arm is not None and self.candidates_owner(cell) == cell:
            self.generate_stage(cell)
        if cell.arm is not None and self.scores_owner(cell) == cell:
            self.score_stage(cell)

    def prepare_arm(self, cell: Cell) -> None:
        """The pairs that an arm learns from, and what they are made of."""
        if makes_pairs(self.arm_recipe(cell.arm).train):
            self.prepare_scores(cell)
            self.select_stage(cell)

    def select_stage(self, cell: Cell) -> dict[str, Any]:
        """Pairs a system's candidates; returns the selection's summary."""
        stop_if_signalled("selecting")
        recipe = self._pairing_recipe(cell)
        selected = select(
            self.candidates_owner(cell).candidates,
            self.scores_owner(cell).scores,
            self.prompts,
            recipe.select,
            cell.selection,
            image_root=self.source.image_root,
            part=rewarding.policy_part(recipe.train, recipe.score, recipe.reward),
            data=self.data_identity,
        )
        self.directory.note_stage("select", cell, cell.selection.read())
        drops = ", ".join(f"{reason} {count}" for reason, count in selected["drops"].items())
        name = cell.arm or summary.main_name(recipe.train, recipe.select)
        say(
            f"round {cell.round}, {name}: {selected['pairs']} pairs of {selected['prompts']} prompts"
            + (f" (dropped: {drops})" if drops else "")
        )
        for warning in selected["warnings"] if cell.arm is None else ():
            say(f"  {warning}", style="yellow")
        return selected

    def reward_stage(self) -> rewarding.TrainedReward:
        """The run's reward model, which all systems share: trained on round 1's candidates, or loaded."""
        return self.reward_model

    @functools.cached_property
    def reward_model(self) -> rewarding.TrainedReward:
        stop_if_signalled("training a reward model")
        recipe, cell = self.recipe, self.directory.cell(1)
        if recipe.reward.pairs:
            pairs: PairRows = self.pair_file(recipe.reward.pairs)
        else:
            select(
                cell.candidates,
                cell.scores,
                self.prompts,
                rewarding.pair_rule(recipe.select, recipe.reward),
                cell.reward_selection,
                image_root=self.source.image_root,
                part=rewarding.SplitSide(recipe.reward.split, rewards=True),
                pairs_per_prompt=recipe.reward.pairs_per_prompt,
                data=self.data_identity,
            )
            pairs = cell.reward_selection.pairs()
        root = pairs.image_root if isinstance(pairs, FilePairs) else self.source.image_root
        reward = rewarding.reward_of_pairs(
            recipe,
            self.policy,
            pairs,
            cell.reward,
            self.mesh,
            where=recipe.reward.pairs or str(cell.reward_selection.folder),
            image_root=root,
            seed=recipe.seed,
            force=self.force,
        )
        self.directory.note_stage("reward", cell, cell.reward.read())
        if reward.trained:
            say(rewarding.accuracy_line(reward.results))
        return reward

    def train_stage(self, cell: Cell, *, only_finished: bool = False) -> Trained:
        """Trains a system on its pairs, or loads what was trained.

        Raises:
            UserError: `only_finished`, and it is not.
        """
        if cell in self._trained:
            return self._trained[cell]
        recipe = self.arm_recipe(cell.arm)
        if only_finished:
            self._require_trained(cell, trained_settings(recipe.model, recipe.train, recipe.seed))
            finished = True
        else:
            inputs = self.training_inputs(cell)
            finished = begin_training(cell.folder, inputs, force=self.force)
        if finished:
            # Adapters and weights have the same structure in every round, so the start stands for any of them.
            with use_mesh(self.mesh):
                result = load_trained(
                    self.start_of(recipe.train.lora, recipe.seed),
                    recipe.train,
                    output_dir=cell.folder,
                    mesh=self.mesh,
                )
            trained = Trained(result, self.policy.loaded, 0.0)
        else:
            start = (
                self.start_of(recipe.train.lora, recipe.seed)
                if cell.round == 1
                else self.train_stage(cell.before, only_finished=True).model
            )
            trained = self._train(cell, start, inputs)
            sampled = rollout_costs(cell.training) if objective_of(recipe.train).reads is Reads.PROMPTS else {}
            finish_training(cell.folder, inputs, trained.seconds, steps=trained.result.steps, **sampled)
            name = cell.arm or summary.main_name(recipe.train, recipe.select)
            say(f"round {cell.round}, {name}: trained {trained.result.steps} steps in {trained.seconds:.0f} s")
        self._trained[cell] = trained
        if not only_finished:
            self.directory.note_stage("train", cell, cell.training.read())
        return trained

    def _require_trained(self, cell: Cell, settled: dict[str, Any]) -> None:
        """Compares a finished training with the settings and model that it depends on, without its pairs and data.

        Raises:
            UserError: it is not finished, or was trained by other settings or from other weights.
        """
        record = finished_record(cell.folder)
        if cell.round == 1:
            settled = settled | {"model": self.policy.identity}
        require_current(cell.folder, record, record.inputs | settled)

    def _train(self, cell: Cell, start: Any, made_from: dict[str, Any]) -> Trained:
        stop_if_signalled("training")
        recipe, folder = self.arm_recipe(cell.arm), cell.folder
        seed, reference, where = recipe.seed + cell.round, None, str(cell.selection.folder)
        given: dict[str, Any] = {"start": start, "seed": seed, "made_from": made_from}
        objective = objective_of(recipe.train)
        if objective.reads is Reads.PROMPTS:
            part = rewarding.policy_part(recipe.train, recipe.score, recipe.reward)
            prompts = [prompt for key, prompt in self.prompts.items() if part is None or part.holds(key)]
            reward = self.reward_stage()
            return train_rlhf(recipe, self.policy, prompts, reward, folder, self.mesh, **given)
        if not needs_pairs(recipe.train):
            return train_on_references(recipe, self.policy, folder, self.mesh, **given)
        policy = self.policy
        if recipe.train.pairs:
            pairs: PairRows = self.pair_file(recipe.train.pairs)
            where = recipe.train.pairs
            root = image_folder(recipe.train.pairs, recipe.data.image_root)
            policy = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, image_root=root))
        elif cell.round > 1 and objective.uses_reference:
            pairs = self._later_pairs(cell)
            # Whatever the reference is, its log-probs stand in these pairs.
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, reference="recorded"))
            reference = self.start_of(recipe.train.lora, recipe.seed) if recipe.round.reference == "base" else None
        else:
            pairs = cell.selection.pairs()
        return train_on_pairs(recipe, policy, pairs, folder, self.mesh, where=where, reference=reference, **given)

    def _later_inputs(self, cell: Cell) -> dict[str, Any]:
        """`later_inputs` of what is there, verified."""
        contents = [one.selection.content() for one in self.mixed_cells(cell)]
        return self.later_inputs(cell, contents, self.weights_identity(self.reference_cell(cell)))

    def _later_pairs(self, cell: Cell) -> PairRows:
        """The pairs of a round after the first, mixed with earlier ones and with their reference's log-probs."""
        recipe = self.arm_recipe(cell.arm)
        of_base = recipe.round.reference == "base"

        def scorer() -> Scorer:
            model = self.start_of(recipe.train.lora, recipe.seed) if of_base else self.model_before(cell)
            return Scorer(model, self.mesh, batch_size=recipe.train.batch_size)

        processor = dataclasses.replace(self.policy.processor, image_root=self.source.image_root)
        return rounds.training_pairs(
            [(one.round, one.selection.pairs()) for one in self.mixed_cells(cell)],
            recipe.round,
            cell.training_pairs,
            inputs=self._later_inputs(cell),
            seed=recipe.seed,
            processor=processor,
            scorer=scorer,
            features=lambda: vision_features(
                vision_folder(recipe.cache, recipe.train, recipe.output_dir), self.policy, processor, self.mesh
            ),
        )

    def evaluate_stage(self, cell: Cell) -> None:
        """Evaluates one trained system on every benchmark."""
        stop_if_signalled("evaluating")
        system = EvaluatedSystem(
            self.system_name(cell),
            cell,
            lambda: self.train_stage(cell, only_finished=True).model,
            self.weights_identity(cell),
            greedy(self.recipe.evaluate),
        )
        self.evaluator.evaluate(system, self.benchmarks)

    def evaluate_base(self) -> None:
        """Evaluates the starting model, its stop-bias frontier and contrastive decoding."""
        systems = base_systems(
            self.recipe.evaluate,
            self.directory,
            self.policy.processor,
            self.benchmarks,
            lambda: self.start_model,
            self.base_identity,
        )
        for system, benchmarks in systems:
            stop_if_signalled("evaluating the base")
            self.evaluator.evaluate(system, benchmarks)

    def check_objective(self) -> None:
        """UserError where what is trained gives no answers."""
        if objective_of(self.recipe.train).learner is Learner.REWARD_MODEL:
            raise UserError(
                "a reward model answers nothing, so there is nothing to evaluate",
                where="train.objective",
                remedy="`m3po train` trains it; the arms rm_dpo and rlhf train their own",
            )

    def execute(self) -> Path:
        """Everything, in order; returns the report.

        Raises:
            GateFailed: all is done, and `evaluate.gate` does not let the recipe's own system pass.
        """
        from m3po_jax.report import build_report
        from m3po_jax.report.browser import tokenizer_text

        self.check_objective()
        check_before_run(self.recipe)
        verdicts: list[dict[str, Any]] = []
        candidates = not self.recipe.train.pairs  # else nothing is generated, scored or selected
        with self.directory.lock():
            self.open()
            for number in range(1, self.recipe.rounds + 1):
                shared = self.directory.cell(number)
                if candidates:
                    self.generate_stage(shared)
                    self.score_stage(shared)
                for cell in self.trained_in(number):
                    self.prepare_arm(cell)
                    self.train_stage(cell)
            if self.recipe.evaluate.benchmarks:
                self.evaluate_base()
                for cell in self.trained_cells():
                    self.evaluate_stage(cell)
                verdicts = summary.write_tables(self.recipe, self.directory, self.benchmarks)
            if is_writer():
                build_report(self.directory.root, tokenizer_text(self.policy.processor.text))
            barrier("reported")
            require_gate(verdicts)
            return self.directory.report
