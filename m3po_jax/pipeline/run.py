"""A run: the stages in order, over rounds and comparison arms, each skipped where it is finished."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from m3po_jax.config import Recipe
from m3po_jax.data import tables
from m3po_jax.data.pair_rows import PairRows, TableRows
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
from m3po_jax.pipeline.rundir import is_writer, read_json
from m3po_jax.pipeline.score import NEED_BLANK_IMAGE, score
from m3po_jax.pipeline.score_counts import told
from m3po_jax.pipeline.select import select
from m3po_jax.pipeline.stopping import agreed, barrier, look
from m3po_jax.pipeline.systems import System, base_systems, greedy
from m3po_jax.pipeline.train import Trained, read_pairs, train_on_pairs, train_on_references
from m3po_jax.recipes import essential
from m3po_jax.scoring.alignment import Backend
from m3po_jax.scoring.engine import Scorer
from m3po_jax.sharding import use_mesh
from m3po_jax.training.loop import load_trained

MIXED = "training-pairs"  # of a later round: its own and earlier pairs with their reference's log-probs


class Run(Resources):
    """One recipe's stages on one mesh; what they share is in `Resources`."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
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
        """A hash of the weights after training round `round` (0: the base model)."""
        if round == 0:
            return self.policy.identity
        folder, recipe = self.directory.round(round, arm), self.arm_recipe(arm)
        done = folder / "done.json"
        pairs = [path.name for name in ("pairs", MIXED) for path in tables.shards(folder / name)]
        if recipe.train.pairs:
            pairs = [self.pair_file(recipe.train.pairs).fingerprint]
        settings: list[Any] = [dataclasses.asdict(recipe.train)]
        if recipe.train.objective == "rlhf":
            settings.append(self.reward_identity())
        if not done.exists():
            raise UserError("no finished training", where=str(done.parent), remedy="run `m3po train` first")
        return tables.content_hash(self.weights_identity(round - 1, arm), pairs, *settings, recipe.seed)[:16]

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
        recipe, folder = self.arm_recipe(arm), self.directory.round(round, arm) / "candidates"
        config = recipe.generate
        sampling = sampling_config(config, recipe.seed * 1000 + round)
        inputs = tables.content_hash(self.weights_identity(round - 1, arm), self.data_identity)
        generator = self.generator(self.model_before(round, arm), sampling, config.batch_size)
        features = vision_features(recipe, self.policy, self.policy.processor, self.mesh)
        details = generate(
            self.source, generator, self.policy.processor, config, folder, inputs=inputs, features=features
        )
        if details["shards_done_before"] < details["shards"]:
            self.directory.note_stage("generate", round=round, arm=arm, **_noted(details))
        say(
            f"round {round}: {details['candidates']} candidates of {details['prompts']} prompts, "
            f"{details['distinct']} distinct, {details['cut']} cut at {config.max_new_tokens} tokens"
        )

    def score_stage(self, round: int, arm: str | None = None) -> None:
        """Scores a round's candidates into ``round-R/scores/``, and says what its judge is worth."""
        look("scoring")
        self._refuse_pairs(arm)
        recipe = self.arm_recipe(arm)
        candidates = self.directory.round(round, self.candidates_owner(round, arm)) / "candidates"
        inputs = tables.content_hash(
            essential({"score": dataclasses.asdict(recipe.score)}),
            recipe.select.lambda_preferred,
            recipe.select.lambda_dispreferred,
            recipe.select.confidence,
            *self._judge_identities(recipe),
        )
        warnings: list[str] = []
        before = tables.shards(self.directory.round(round, arm) / "scores")
        with use_mesh(self.mesh):
            backend = self._judge(recipe, warnings)
            scorer = None
            if NEED_BLANK_IMAGE.intersection(recipe.score.confidence):
                scorer = Scorer(self.model_before(round, arm), self.mesh, batch_size=recipe.score.batch_size)
            details = score(
                candidates,
                self.prompts,
                backend,
                recipe.score,
                recipe.select,
                self.directory.round(round, arm) / "scores",
                inputs=inputs,
                processor=self.policy.processor,
                scorer=scorer,
                warnings=warnings,
            )
        verdict, judges, notes = details.pop("verdict", []), details.pop("judges", []), details.pop("notes")
        noted = _noted(details) | ({"details": {judge["judge"]: judge for judge in judges}} if judges else {})
        if tables.shards(self.directory.round(round, arm) / "scores") != before:
            self.directory.note_stage("score", round=round, arm=arm, **noted)
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
            found.append(self.reward_identity())
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
        recipe = self.arm_recipe(arm)
        found = select(
            self.directory.round(round, self.candidates_owner(round, arm)) / "candidates",
            self.directory.round(round, self.scores_owner(round, arm)) / "scores",
            self.prompts,
            recipe.select,
            self.directory.round(round, arm) / "pairs",
            image_root=self.source.image_root,
            part=rewarding.policy_part(recipe),
        )
        if found["seconds"]:
            self.directory.note_stage("select", round=round, arm=arm, seconds=found["seconds"], rows=found["pairs"])
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
        recipe, folder = self.recipe, self.reward_folder
        finished = agreed([(folder / "results.json").exists()])[0]
        if recipe.reward.pairs:
            pairs: PairRows = self.pair_file(recipe.reward.pairs)
        else:
            select(
                self.directory.round(1) / "candidates",
                self.directory.round(1) / "scores",
                self.prompts,
                rewarding.pair_rule(recipe),
                folder / "pairs",
                image_root=self.source.image_root,
                part=rewarding.Part(recipe.reward.split, rewards=True),
                pairs_per_prompt=recipe.reward.pairs_per_prompt,
            )
            pairs = TableRows(read_pairs(folder / "pairs"))
        root = pairs.image_root if isinstance(pairs, FilePairs) else self.source.image_root
        found = rewarding.reward_of_pairs(
            recipe, self.policy, pairs, folder, self.mesh, image_root=root, seed=recipe.seed
        )
        if not finished:
            self.directory.note_stage("reward", round=1, arm=None, seconds=found.seconds, **found.results)
            say(rewarding.told(found.results))
        return found

    @property
    def reward_folder(self) -> Path:
        return self.directory.round(1) / rewarding.FOLDER

    def reward_identity(self) -> str:
        """A hash of the run's reward model, once it is trained."""
        known = read_json(self.reward_folder / "results.json")
        return known["identity"] if known else self.reward_stage().results["identity"]

    def train_stage(self, round: int, arm: str | None = None, *, only_finished: bool = False) -> Trained:
        """Trains an arm on its pairs, or loads what was trained.

        Raises:
            UserError: `only_finished`, and it is not.
        """
        if (round, arm) in self._trained:
            return self._trained[round, arm]
        folder, recipe = self.directory.round(round, arm), self.arm_recipe(arm)
        finished = agreed([(folder / "done.json").exists()])[0]
        if only_finished and not finished:
            raise UserError("no finished training", where=str(folder), remedy="run `m3po train` first")
        if finished:
            # Adapters and weights have the same structure in every round, so the start stands for any of them.
            with use_mesh(self.mesh):
                result = load_trained(self.start_of(recipe), recipe.train, output_dir=folder, mesh=self.mesh)
            trained = Trained(result, self.policy.loaded, 0.0)
        else:
            start = (
                self.start_of(recipe) if round == 1 else self.train_stage(round - 1, arm, only_finished=True).model
            )
            trained = self._train(round, arm, recipe, start, folder)
        self._trained[round, arm] = trained
        if not finished:
            sampled = rollout_costs(folder / "metrics.jsonl") if recipe.train.objective == "rlhf" else {}
            self.directory.note_stage(
                "train", round=round, arm=arm, seconds=trained.seconds, steps=trained.result.steps, **sampled
            )
            say(
                f"round {round}, {arm or summary.main_name(recipe)}: trained {trained.result.steps} steps "
                f"in {trained.seconds:.0f} s"
            )
        return trained

    def _train(self, round: int, arm: str | None, recipe: Recipe, start: Any, folder: Path) -> Trained:
        look("training")
        seed, reference = recipe.seed + round, None
        if recipe.train.objective == "rlhf":
            part = rewarding.policy_part(recipe)
            own = [prompt for key, prompt in self.prompts.items() if part is None or part.holds(key)]
            reward = self.reward_stage()
            return train_rlhf(recipe, self.policy, own, reward, folder, self.mesh, start=start, seed=seed)
        if not needs_pairs(recipe):
            return train_on_references(recipe, self.policy, folder, self.mesh, start=start, seed=seed)
        policy = self.policy
        if recipe.train.pairs:
            pairs: PairRows = self.pair_file(recipe.train.pairs)
            root = image_folder(recipe.train.pairs, recipe.data.image_root)
            policy = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, image_root=root))
        elif round > 1 and recipe.train.objective == "preference":
            pairs = TableRows(self._later_pairs(round, arm, recipe))
            # Whatever the reference is, its log-probs stand in these pairs.
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, reference="recorded"))
            reference = self.start_of(recipe) if recipe.round.reference == "base" else None
        else:
            pairs = TableRows(read_pairs(folder / "pairs"))
        return train_on_pairs(recipe, policy, pairs, folder, self.mesh, start=start, seed=seed, reference=reference)

    def _later_pairs(self, round: int, arm: str | None, recipe: Recipe) -> pa.Table:
        """The pairs of a round after the first, mixed with earlier ones and with their reference's log-probs."""
        earlier = range(1 if recipe.round.mix_previous else round, round + 1)
        of_base = recipe.round.reference == "base"

        def scorer() -> Scorer:
            model = self.start_of(recipe) if of_base else self.model_before(round, arm)
            return Scorer(model, self.mesh, batch_size=recipe.train.batch_size)

        processor = dataclasses.replace(self.policy.processor, image_root=self.source.image_root)
        return rounds.training_pairs(
            [
                (number, folder, read_pairs(folder))
                for number in earlier
                for folder in [self.directory.round(number, arm) / "pairs"]
            ],
            recipe.round,
            self.directory.round(round, arm) / MIXED,
            inputs=self.weights_identity(0 if of_base else round - 1, arm),
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
            self.directory.round(round, arm),
            lambda: self.train_stage(round, arm, only_finished=True).model,
            self.weights_identity(round, arm),
            greedy(self.recipe.evaluate),
            round,
            arm,
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
            return self.directory.root / "report.html"


def _noted(details: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if value is not None}
