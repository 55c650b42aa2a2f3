"""A run: the stages in order, over rounds and comparison arms, each skipped where it is finished."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.config import Recipe
from m3po_jax.data import tables
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.data.preference_files import FilePairs, image_folder
from m3po_jax.errors import UserError
from m3po_jax.generation.settings import sampling_config
from m3po_jax.pipeline import reward as rewarding
from m3po_jax.pipeline import rounds, summary
from m3po_jax.pipeline.arms import arm_recipe, makes_pairs, needs_pairs
from m3po_jax.pipeline.backends import judge_identities, make_backend
from m3po_jax.pipeline.caches import vision_features
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.generate import generate
from m3po_jax.pipeline.preflight import check_before_run
from m3po_jax.pipeline.resources import Resources
from m3po_jax.pipeline.rlhf import rollout_costs, train_rlhf
from m3po_jax.pipeline.score import NEED_BLANK_IMAGE, score
from m3po_jax.pipeline.score_counts import told
from m3po_jax.pipeline.select import select
from m3po_jax.pipeline.stopping import barrier, look
from m3po_jax.pipeline.systems import System, base_systems, greedy
from m3po_jax.pipeline.train import (
    Trained,
    pairs_content,
    read_pairs,
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
from m3po_jax.scoring.engine import Scorer
from m3po_jax.sharding import use_mesh
from m3po_jax.training.loop import load_trained
from m3po_jax.workspace.files import is_writer
from m3po_jax.workspace.layout import PAIRS, REPORT, Cell
from m3po_jax.workspace.records import Artifact, settings
from m3po_jax.workspace.training import TrainingArtifact


class Run(Resources):
    """One recipe's stages on one mesh; what they share is in `Resources`."""

    def __init__(self, recipe: Recipe, *, force: bool = False):
        super().__init__(recipe, force=force)
        self._trained: dict[tuple[int, str | None], Trained] = {}
        self._arm_recipes: dict[str | None, Recipe] = {}

    def arm_recipe(self, arm: str | None) -> Recipe:
        """The recipe of an arm; None is the recipe's own system. Shared by all who ask: it is not to be changed."""
        if arm not in self._arm_recipes:  # filling in an arm takes 60 ms, and stages ask hundreds of times
            self._arm_recipes[arm] = arm_recipe(self.recipe, arm)
        return self._arm_recipes[arm]

    def forget(self, round: int, arm: str | None) -> None:
        """Lets go of a trained model; its checkpoint stays."""
        self._trained.pop((round, arm), None)

    def release(self) -> None:
        super().release()
        self._trained.clear()
        self.__dict__.pop("reward_model", None)

    # Stages.

    def weights_identity(self, round: int, arm: str | None = None) -> str:
        """A hash of the weights after training round `round` (0: the base model).

        Raises:
            UserError: that training is not finished, or is out of date.
        """
        if round == 0:
            return self.base_identity
        folder, train = self.directory.round(round, arm), self.arm_recipe(arm).train
        record = finished_record(folder)
        require_current(folder, record, self.training_inputs(round, arm))
        return handed_on(record, train)

    def training_inputs(
        self, round: int, arm: str | None = None, upstream: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a training is made from, as its record names it.

        Args:
            upstream: ``model``, ``pairs`` and ``reward`` of earlier stages; default: of what is there, verified.

        Raises:
            UserError: pairs that are not there or are not what was written; an earlier training is out of date.
        """
        recipe, cell = self.arm_recipe(arm), self.directory.cell(round, arm)
        inputs: dict[str, Any] = {
            "system": cell.name,
            "model": upstream["model"] if upstream else self.weights_identity(round - 1, arm),
            **trained_settings(recipe),
        }
        if recipe.train.objective == "rlhf":
            part = rewarding.policy_part(recipe)
            inputs |= {
                "data": self.data_identity,
                "part": None if part is None else part.split,
                "reward": upstream["reward"] if upstream else self.reward_stage().results["identity"],
                "generate.max_new_tokens": recipe.generate.max_new_tokens,
                "generate.suppress_tokens": recipe.generate.suppress_tokens,
            }
        elif not needs_pairs(recipe):
            inputs["data"] = rows_identity(recipe)
        elif recipe.train.pairs:
            inputs["pairs"] = self.pair_file(recipe.train.pairs).fingerprint
        elif upstream:
            inputs["pairs"] = upstream["pairs"]
        elif round > 1 and recipe.train.objective == "preference":
            inputs["pairs"] = tables.content_hash(self._later_inputs(round, arm, recipe))
        else:
            inputs["pairs"] = pairs_content(cell.pairs)
        return inputs

    def model_before(self, round: int, arm: str | None = None) -> Any:
        """The policy that generates in a round: the base, then what the round before has trained."""
        if round == 1:
            return self.start_model
        return self.train_stage(round - 1, arm, only_finished=True).model

    def candidates_owner(self, round: int, arm: str | None) -> str | None:
        """Whose candidates an arm reads: the shared ones, where the same weights drew them by the same settings."""
        shared = round == 1 and self.arm_recipe(arm).generate == self.recipe.generate
        return None if shared else arm

    def scores_owner(self, round: int, arm: str | None) -> str | None:
        """Whose scores an arm reads: those of the shared candidates, where the same judge gave them."""
        shared = self.candidates_owner(round, arm) is None and self.arm_recipe(arm).score == self.recipe.score
        return None if shared else arm

    def generate_stage(self, round: int, arm: str | None = None) -> None:
        """Draws a round's candidates into ``round-R/candidates/``, as far as they are missing."""
        look("generating")
        self._refuse_pairs(arm)
        recipe, cell = self.arm_recipe(arm), self.directory.cell(round, arm)
        config = recipe.generate
        sampling = sampling_config(config, recipe.seed * 1000 + round)
        made_from = {"model": self.weights_identity(round - 1, arm), "data": self.data_identity, "seed": recipe.seed}
        generator = self.generator(self.model_before(round, arm), sampling, config.batch_size)
        features = vision_features(recipe, self.policy, self.policy.processor, self.mesh)
        details = generate(
            self.source,
            generator,
            self.policy.processor,
            config,
            cell.candidates,
            inputs=tables.content_hash(made_from["model"], self.data_identity),
            made_from=made_from,
            features=features,
        )
        self.directory.note_stage("generate", cell, Artifact(cell.candidates).read())
        say(
            f"round {round}: {details['candidates']} candidates of {details['prompts']} prompts, "
            f"{details['distinct']} distinct, {details['cut']} cut at {config.max_new_tokens} tokens"
        )

    def score_stage(self, round: int, arm: str | None = None) -> None:
        """Scores a round's candidates into ``round-R/scores/``, and says what its judge is worth."""
        look("scoring")
        self._refuse_pairs(arm)
        recipe = self.arm_recipe(arm)
        cell = self.directory.cell(round, arm)
        made_from = {
            "judge": self._judge_identities(recipe),
            "model": self.weights_identity(round - 1, arm),
            "data": self.data_identity,
        }
        warnings: list[str] = []
        with use_mesh(self.mesh):
            backend = self._judge(recipe, warnings)
            scorer = None
            if NEED_BLANK_IMAGE.intersection(recipe.score.confidence):
                scorer = Scorer(self.model_before(round, arm), self.mesh, batch_size=recipe.score.batch_size)
            details = score(
                self.directory.cell(round, self.candidates_owner(round, arm)).candidates,
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
        self.directory.note_stage("score", cell, Artifact(cell.scores).read())
        missing = details["scored"] < details["rows"]
        say(f"round {round}: {told(details, notes, backend.name)}", style="yellow" if missing else None)
        for judge in judges:
            paid = f"{judge['requests']} requests paid, {judge['from_cache']} answers from the cache"
            guessed = f" (of {judge['guessed']} requests guessed: the server tells no tokens)"
            say(f"  {judge['judge']}: {paid}, cost {judge['cost']:.4g}{guessed if judge['guessed'] else ''}")
        for line in (line for line in verdict if line["about"] not in ("judge", "abstained")):  # said before
            say(f"  {line['text']}", style="yellow" if line["tone"] == "warn" else None)

    def _judge(self, recipe: Recipe, warnings: list[str]) -> Backend:
        """Who scores an arm's candidates; `warnings` gets a line where it shares the policy's blind spots."""
        return make_backend(
            recipe.score,
            self.mesh,
            policy=self.policy,
            image_root=self.source.image_root,
            model_config=recipe.model,
            folder=self.directory.root,
            warnings=warnings,
            own_reward=lambda: self.reward_stage().judge,
        )

    def _judge_identities(self, recipe: Recipe) -> list[str]:
        """Hashes of every model that judges; the policy's own where a judge is not named."""
        found = judge_identities(recipe.score)
        if rewarding.judges_by_own_reward(recipe):
            found.append(self.reward_stage().results["identity"])
        return found or [self.policy.identity]

    def _refuse_pairs(self, arm: str | None) -> None:
        if self.arm_recipe(arm).train.pairs:
            raise UserError(
                "training reads pairs from a file, so nothing is generated, scored or selected",
                where="train.pairs",
                remedy="`m3po train` comes next; without this key a run makes its own pairs",
            )

    def prepare_scores(self, round: int, arm: str | None) -> None:
        """Candidates and scores that an arm does not share."""
        if arm is not None and self.candidates_owner(round, arm) == arm:
            self.generate_stage(round, arm)
        if arm is not None and self.scores_owner(round, arm) == arm:
            self.score_stage(round, arm)

    def prepare_arm(self, round: int, arm: str | None) -> None:
        """The pairs that an arm learns from, and what they are made of."""
        if makes_pairs(self.arm_recipe(arm)):
            self.prepare_scores(round, arm)
            self.select_stage(round, arm)

    def select_stage(self, round: int, arm: str | None = None) -> dict[str, Any]:
        """Pairs an arm's candidates into its ``round-R/pairs/``; returns the selection's summary."""
        look("selecting")
        self._refuse_pairs(arm)
        recipe, cell = self.arm_recipe(arm), self.directory.cell(round, arm)
        found = select(
            self.directory.cell(round, self.candidates_owner(round, arm)).candidates,
            self.directory.cell(round, self.scores_owner(round, arm)).scores,
            self.prompts,
            recipe.select,
            cell.pairs,
            image_root=self.source.image_root,
            part=rewarding.policy_part(recipe),
            data=self.data_identity,
        )
        self.directory.note_stage("select", cell, Artifact(cell.pairs).read())
        drops = ", ".join(f"{reason} {count}" for reason, count in found["drops"].items())
        say(
            f"round {round}, {arm or summary.main_name(recipe)}: {found['pairs']} pairs of {found['prompts']} prompts"
            + (f" (dropped: {drops})" if drops else "")
        )
        for warning in found["warnings"] if arm is None else ():
            say(f"  {warning}", style="yellow")
        return found

    def reward_stage(self) -> rewarding.TrainedReward:
        """The run's reward model, which all systems share: trained on round 1's candidates, or loaded."""
        return self.reward_model

    @functools.cached_property
    def reward_model(self) -> rewarding.TrainedReward:
        look("training a reward model")
        recipe, cell = self.recipe, self.directory.cell(1)
        if recipe.reward.pairs:
            pairs: PairRows = self.pair_file(recipe.reward.pairs)
        else:
            select(
                cell.candidates,
                cell.scores,
                self.prompts,
                rewarding.pair_rule(recipe),
                cell.reward / PAIRS,
                image_root=self.source.image_root,
                part=rewarding.Part(recipe.reward.split, rewards=True),
                pairs_per_prompt=recipe.reward.pairs_per_prompt,
                data=self.data_identity,
            )
            pairs = read_pairs(cell.reward / PAIRS)
        root = pairs.image_root if isinstance(pairs, FilePairs) else self.source.image_root
        found = rewarding.reward_of_pairs(
            recipe,
            self.policy,
            pairs,
            cell.reward,
            self.mesh,
            image_root=root,
            seed=recipe.seed,
            force=self.force,
        )
        self.directory.note_stage("reward", cell, TrainingArtifact(cell.reward).read())
        if found.trained:
            say(rewarding.told(found.results))
        return found

    def train_stage(self, round: int, arm: str | None = None, *, only_finished: bool = False) -> Trained:
        """Trains an arm on its pairs, or loads what was trained.

        Raises:
            UserError: `only_finished`, and it is not.
        """
        if (round, arm) in self._trained:
            return self._trained[round, arm]
        cell, recipe = self.directory.cell(round, arm), self.arm_recipe(arm)
        if only_finished:
            self._require_trained(cell, recipe)
            finished = True
        else:
            inputs = self.training_inputs(round, arm)
            finished = begin_training(cell.folder, inputs, force=self.force)
        if finished:
            # Adapters and weights have the same structure in every round, so the start stands for any of them.
            with use_mesh(self.mesh):
                result = load_trained(self.start_of(recipe), recipe.train, output_dir=cell.folder, mesh=self.mesh)
            trained = Trained(result, self.policy.loaded, 0.0)
        else:
            start = (
                self.start_of(recipe) if round == 1 else self.train_stage(round - 1, arm, only_finished=True).model
            )
            trained = self._train(round, arm, recipe, start, cell.folder, inputs)
            sampled = rollout_costs(cell.metrics) if recipe.train.objective == "rlhf" else {}
            finish_training(cell.folder, inputs, trained.seconds, steps=trained.result.steps, **sampled)
            say(
                f"round {round}, {arm or summary.main_name(recipe)}: trained {trained.result.steps} steps "
                f"in {trained.seconds:.0f} s"
            )
        self._trained[round, arm] = trained
        if not only_finished:
            self.directory.note_stage("train", cell, TrainingArtifact(cell.folder).read())
        return trained

    def _require_trained(self, cell: Cell, recipe: Recipe) -> None:
        """Compares a finished training with its recipe and model, without its pairs and data.

        Raises:
            UserError: it is not finished, or was trained by other settings or from other weights.
        """
        record = finished_record(cell.folder)
        settled = trained_settings(recipe)
        if cell.round == 1:
            settled["model"] = self.policy.identity
        require_current(cell.folder, record, record.inputs | settled)

    def _train(
        self, round: int, arm: str | None, recipe: Recipe, start: Any, folder: Path, made_from: dict[str, Any]
    ) -> Trained:
        look("training")
        seed, reference = recipe.seed + round, None
        given: dict[str, Any] = {"start": start, "seed": seed, "made_from": made_from}
        if recipe.train.objective == "rlhf":
            part = rewarding.policy_part(recipe)
            own = [prompt for key, prompt in self.prompts.items() if part is None or part.holds(key)]
            reward = self.reward_stage()
            return train_rlhf(recipe, self.policy, own, reward, folder, self.mesh, **given)
        if not needs_pairs(recipe):
            return train_on_references(recipe, self.policy, folder, self.mesh, **given)
        policy = self.policy
        if recipe.train.pairs:
            pairs: PairRows = self.pair_file(recipe.train.pairs)
            root = image_folder(recipe.train.pairs, recipe.data.image_root)
            policy = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, image_root=root))
        elif round > 1 and recipe.train.objective == "preference":
            pairs = self._later_pairs(round, arm, recipe)
            # Whatever the reference is, its log-probs stand in these pairs.
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, reference="recorded"))
            reference = self.start_of(recipe) if recipe.round.reference == "base" else None
        else:
            pairs = read_pairs(folder / PAIRS)
        return train_on_pairs(recipe, policy, pairs, folder, self.mesh, reference=reference, **given)

    def _mixed_cells(self, round: int, arm: str | None, recipe: Recipe) -> list[Cell]:
        """The rounds whose pairs a later round is trained on, itself the last."""
        return [self.directory.cell(n, arm) for n in range(1 if recipe.round.mix_previous else round, round + 1)]

    def _later_inputs(self, round: int, arm: str | None, recipe: Recipe) -> dict[str, Any]:
        """What the training pairs of a round after the first are made from."""
        return {
            "pairs": [pairs_content(cell.pairs) for cell in self._mixed_cells(round, arm, recipe)],
            "reference": self.weights_identity(0 if recipe.round.reference == "base" else round - 1, arm),
            "seed": recipe.seed,
            **settings("round", recipe.round),
        }

    def _later_pairs(self, round: int, arm: str | None, recipe: Recipe) -> PairRows:
        """The pairs of a round after the first, mixed with earlier ones and with their reference's log-probs."""
        of_base = recipe.round.reference == "base"

        def scorer() -> Scorer:
            model = self.start_of(recipe) if of_base else self.model_before(round, arm)
            return Scorer(model, self.mesh, batch_size=recipe.train.batch_size)

        processor = dataclasses.replace(self.policy.processor, image_root=self.source.image_root)
        return rounds.training_pairs(
            [(cell.round, read_pairs(cell.pairs)) for cell in self._mixed_cells(round, arm, recipe)],
            recipe.round,
            self.directory.cell(round, arm).training_pairs,
            inputs=self._later_inputs(round, arm, recipe),
            seed=recipe.seed,
            processor=processor,
            scorer=scorer,
            features=lambda: vision_features(recipe, self.policy, processor, self.mesh),
        )

    def evaluate_stage(self, round: int, arm: str | None = None) -> None:
        """Evaluates one trained system on every benchmark."""
        look("evaluating")
        name = summary.main_name(self.recipe) if arm is None else arm
        if round < self.recipe.rounds:
            name = f"{name}, round {round}"
        system = System(
            name,
            self.directory.cell(round, arm),
            lambda: self.train_stage(round, arm, only_finished=True).model,
            self.weights_identity(round, arm),
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
            self.weights_identity(0),
        )
        for system, benchmarks in systems:
            look("evaluating the base")
            self.evaluator.evaluate(system, benchmarks)

    def execute(self) -> Path:
        """Everything, in order; returns the report."""
        from m3po_jax.report import build_report
        from m3po_jax.report.browser import tokenizer_text

        if self.recipe.train.objective == "reward":
            raise UserError(
                "a reward model answers nothing, so there is nothing to evaluate",
                where="train.objective",
                remedy="`m3po train` trains it; the arms rm_dpo and rlhf train their own",
            )
        check_before_run(self.recipe)
        candidates = not self.recipe.train.pairs  # else nothing is generated, scored or selected
        with self.directory.lock():
            self.open()
            arms: list[str | None] = [None, *self.recipe.arms]
            for round in range(1, self.recipe.rounds + 1):
                if candidates:
                    self.generate_stage(round)
                    self.score_stage(round)
                for arm in arms:
                    # A later round's candidates come from the main arm's policy; arms are compared after round 1.
                    if arm is None or round == 1:
                        self.prepare_arm(round, arm)
                        self.train_stage(round, arm)
            if self.recipe.evaluate.benchmarks:
                self.evaluate_base()
                for arm in arms:
                    for round in range(1, self.recipe.rounds + 1 if arm is None else 2):
                        self.evaluate_stage(round, arm)
                summary.write_tables(self.recipe, self.directory, self.benchmarks)
            if is_writer():
                build_report(self.directory.root, tokenizer_text(self.policy.processor.text))
            barrier("reported")
            return self.directory.root / REPORT
