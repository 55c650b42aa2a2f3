"""What the stages of one run share: who reads what, and data, policy and benchmarks, loaded when first needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from m3po_jax.config import LoRAConfig, Recipe
from m3po_jax.data.pair_rows import PairPrompts
from m3po_jax.data.preference_files import FilePairs, image_folder
from m3po_jax.data.schema import Prompt
from m3po_jax.data.sources import PromptSource, fingerprint
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.hosts.agreement import barrier
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.hub import snapshot_of
from m3po_jax.models.registry import Description, describe_policy
from m3po_jax.pipeline.arms import arm_recipe
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.evaluate import Benchmark, check_scoring, read_benchmark
from m3po_jax.pipeline.models import (
    InputLimits,
    Policy,
    attach_adapter,
    load_policy,
    make_generator,
    policy_identity,
    read_rows,
)
from m3po_jax.pipeline.pair_files import check_recorded_tokens, pairs_instead_of_prompts, read_pair_file
from m3po_jax.pipeline.summary import main_name, system_name
from m3po_jax.pipeline.systems import SystemEvaluator
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.records import settings


class Resources:
    """A recipe's run directory, mesh, data and models; loads lazily, so that a finished stage costs nothing.

    Args:
        force: Set aside what would otherwise be protected, see `RunDirectory.open` and `trainings.begin_training`.

    Raises:
        UserError: settings that contradict each other; from what is loaded, whatever is wrong with it.
    """

    one_recipe = False  # whether the directory belongs to one recipe and takes no other

    def __init__(self, recipe: Recipe, *, force: bool = False):
        self.recipe, self.force = recipe, force
        check_recipe(recipe)
        self.directory = RunDirectory.of(recipe.output_dir, recipe.name)
        self.mesh: Mesh = make_mesh(recipe.mesh)
        self._pair_files: dict[str, FilePairs] = {}
        self._checked_pairs: set[str] = set()
        self._arm_recipes: dict[str | None, Recipe] = {}

    def arm_recipe(self, arm: str | None) -> Recipe:
        """The recipe of an arm; None is the recipe's own system. Shared by all who ask: it is not to be changed."""
        if arm not in self._arm_recipes:  # filling in an arm takes 60 ms, and stages ask hundreds of times
            self._arm_recipes[arm] = arm_recipe(self.recipe, arm)
        return self._arm_recipes[arm]

    def trained_in(self, number: int) -> list[Cell]:
        """What is trained in a round: a later one's candidates come from the main policy, so that arms end before."""
        cell = self.directory.cell(number)
        return [cell, *map(cell.of, self.recipe.arms if number == 1 else ())]

    def trained_cells(self) -> list[Cell]:
        """All that is trained, the rounds of the run's own system first."""
        main, *arms = self.trained_in(1)
        return [*map(main.at, range(1, self.recipe.rounds + 1)), *arms]

    def system_name(self, cell: Cell) -> str:
        """What a trained system is called, as the table and the report name it."""
        return system_name(cell, main_name(self.recipe.train, self.recipe.select), self.recipe.rounds)

    def candidates_owner(self, cell: Cell) -> Cell:
        """Whose candidates an arm reads: the shared ones, where the same weights drew them by the same settings."""
        shared = cell.round == 1 and self.arm_recipe(cell.arm).generate == self.recipe.generate
        return cell.of(None) if shared else cell

    def scores_owner(self, cell: Cell) -> Cell:
        """Whose scores an arm reads: those of the shared candidates, where the same judge gave them."""
        shared = self.candidates_owner(cell).arm is None and self.arm_recipe(cell.arm).score == self.recipe.score
        return cell.of(None) if shared else cell

    def mixed_cells(self, cell: Cell) -> list[Cell]:
        """The rounds whose pairs a later round is trained on, itself the last."""
        first = 1 if self.arm_recipe(cell.arm).round.mix_previous else cell.round
        return [cell.at(number) for number in range(first, cell.round + 1)]

    def reference_cell(self, cell: Cell) -> Cell:
        """Whose weights are the reference of a later round."""
        return cell.at(0) if self.arm_recipe(cell.arm).round.reference == "base" else cell.before

    def later_inputs(self, cell: Cell, pairs: Sequence[str], reference: str) -> dict[str, Any]:
        """What the training pairs of a round after the first are made from.

        Args:
            pairs: Hashes of the pairs of `mixed_cells`.
            reference: A hash of the weights of `reference_cell`.
        """
        recipe = self.arm_recipe(cell.arm)
        made_from = {"pairs": list(pairs), "reference": reference, "seed": recipe.seed}
        return made_from | settings("round", recipe.round)

    @functools.cached_property
    def source(self) -> PromptSource:
        return read_rows(self.recipe.data, require_image=True)

    @functools.cached_property
    def tokenised(self) -> TokenisedPrompts:
        """The data's prompts with their token ids, which are made once for all rounds and arms."""
        return TokenisedPrompts(self.source, self.policy.processor.tokenise)

    @functools.cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The prompts by id; images of a table's rows stay on disk until one is asked for."""
        return {prompt.id: prompt for prompt in (self.source[i] for i in range(len(self.source)))}

    @functools.cached_property
    def data_identity(self) -> str:
        return fingerprint(self.source)[:16]

    def pair_file(self, path: str) -> FilePairs:
        """The pairs of `train.pairs` or `reward.pairs`, with tokens that the policy knows."""
        pairs = self._read_pairs(path)
        if path not in self._checked_pairs:
            check_recorded_tokens(pairs, self.policy.processor)
            self._checked_pairs.add(path)
        return pairs

    def _read_pairs(self, path: str) -> FilePairs:
        if path not in self._pair_files:
            self._pair_files[path] = read_pair_file(path, self.recipe.data)
        return self._pair_files[path]

    @functools.cached_property
    def image_root(self) -> Path:
        """Folder that the training data's image paths are relative to."""
        pairs = pairs_instead_of_prompts(self.recipe.train, self.recipe.reward)
        return image_folder(pairs, self.recipe.data.image_root) if pairs else self.source.image_root

    @functools.cached_property
    def base_identity(self) -> str:
        """`policy.identity`, without loading the policy."""
        return policy_identity(self.recipe.model, self.recipe.seed, self.description)

    @functools.cached_property
    def description(self) -> Description:
        """Of the policy, without loading it."""
        return describe_policy(self.recipe.model)

    @functools.cached_property
    def limits(self) -> InputLimits:
        """What bounds the policy's inputs."""
        return InputLimits.of(self.recipe.data, self.recipe.generate, self.recipe.evaluate)

    @functools.cached_property
    def policy(self) -> Policy:
        with use_mesh(self.mesh):
            policy = load_policy(
                self.recipe.model, self.recipe.seed, self.mesh, self.limits, image_root=self.image_root
            )
        if policy.processor.image_buckets is None:
            return policy
        path = pairs_instead_of_prompts(self.recipe.train, self.recipe.reward)
        rows: Any = PairPrompts(self._read_pairs(path)) if path else self.source
        return policy.padding_for(rows, self.recipe.data.image_buckets)

    @functools.cached_property
    def start_model(self) -> Any:
        """The base model with untrained adapters: the same function, and the same program, as a trained one."""
        return attach_adapter(self.policy, self.recipe.train.lora, self.recipe.seed)

    def start_of(self, lora: LoRAConfig, seed: int) -> Any:
        """The starting model of an arm, whose adapters may differ from the main one's."""
        if lora == self.recipe.train.lora:
            return self.start_model
        return attach_adapter(self.policy, lora, seed)

    @functools.cached_property
    def benchmarks(self) -> list[Benchmark]:
        items = self.recipe.evaluate.benchmarks.items()
        return [read_benchmark(name, config) for name, config in items]

    @functools.cached_property
    def evaluator(self) -> SystemEvaluator:
        return SystemEvaluator(self.recipe, self.directory, self.policy.processor, self.generator)

    def generator(self, model: Any, sampling: SamplingConfig, batch_size: int) -> Generator:
        """An engine that draws answers of `model`; its programs are compiled on first use."""
        return make_generator(self.policy.processor, model, self.mesh, sampling=sampling, batch_size=batch_size)

    def open(self) -> None:
        """Creates or continues the run directory, after opening everything that a later stage will read.

        Raises:
            UserError: as `RunDirectory.open`.
        """
        for benchmark in self.benchmarks:
            check_scoring(benchmark)
        facts = {
            "model": {"path": self.recipe.model.path, "hash": self.policy.identity, **self._commits()},
            "data": self._data_facts(),
            "template": self.recipe.model.template,
            "image_fit": self.recipe.model.image_fit,
            "mesh": dict(self.mesh.shape),
        }
        lines = self.directory.open(self.recorded_recipe(), facts, force=self.force, one_recipe=self.one_recipe)
        barrier("the run directory is open")
        for line in lines:
            say(line, style="yellow")

    def _commits(self) -> dict[str, str]:
        """Which commits of the hub the model's files are of; nothing for those of a local directory."""
        loaded = self.policy.loaded
        places = {"commit": loaded.directory, "vision_tower_commit": loaded.tower}
        snapshots = {name: None if place is None else snapshot_of(place) for name, place in places.items()}
        return {name: snapshot.commit for name, snapshot in snapshots.items() if snapshot is not None}

    def _data_facts(self) -> dict[str, Any]:
        if path := pairs_instead_of_prompts(self.recipe.train, self.recipe.reward):
            pairs = self.pair_file(path)
            return {"path": path, "fingerprint": pairs.fingerprint[:16], "rows": len(pairs), "shapes": pairs.shapes}
        return {"path": self.recipe.data.path, "fingerprint": self.data_identity, "rows": len(self.source)}

    def recorded_recipe(self) -> Recipe:
        """What the run directory is checked against."""
        return self.recipe

    def release(self) -> None:
        """Lets go of every model, so that another run may load its own; finished stages can still be read."""
        for name in ("policy", "start_model", "evaluator", "tokenised"):
            self.__dict__.pop(name, None)
