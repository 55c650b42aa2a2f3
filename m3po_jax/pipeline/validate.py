"""The `validate` verb: every problem of a recipe and its data, found before any accelerator time is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from m3po_jax.config import DataConfig, Recipe
from m3po_jax.data.dual_inputs import DualEncoderProcessor
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import Prompt
from m3po_jax.data.sources import read_prompts
from m3po_jax.errors import UserError
from m3po_jax.models.registry import Description, describe, stored_tensors
from m3po_jax.pipeline.backends import check_ready
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.console import progress
from m3po_jax.pipeline.evaluate import read_benchmark
from m3po_jax.pipeline.pair_files import check_pairs, pairs_instead_of_prompts

Check = Callable[[Prompt], object]
MakeChecks = Callable[[Path], list[Check]]  # for rows whose images lie under a folder


class Problems:
    """Collects one line for everything that is wrong."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.found.append(error)

    def rows(self, config: DataConfig, make_checks: MakeChecks, title: str, *, require_image: bool) -> int:
        """Reads every row of a source and its images; returns how many rows are good enough to be read."""
        source = read_prompts(config, require_image=require_image, problems=self.found)
        checks = make_checks(source.image_root)
        for index in progress(range(len(source)), title, len(source)):
            for check in checks:
                before = len(self.found)
                with self.collect():
                    check(source[index])
                if len(self.found) > before:
                    break  # a row's first problem may cause its others
        return len(source)


def validate(recipe: Recipe) -> tuple[list[UserError], str]:
    """(every problem, a summary of what was read).

    Checks settings, the model's and the judge's files (names and shapes of all tensors, not their values), every
    row's prompt length and images, and every benchmark's questions.
    """
    problems, read = Problems(), []
    preference = recipe.train.objective in ("preference", "rlhf", "reward") or bool(recipe.train.pairs)
    if preference:
        with problems.collect():
            check_recipe(recipe)
    make_checks: MakeChecks = lambda root: []  # noqa: E731
    with problems.collect():
        description = describe(recipe.model.path, vision_tower=recipe.model.vision_tower)
        if recipe.model.init == "pretrained":
            read.append(f"{len(stored_tensors(description))} tensors")
        make_checks = _row_checks(recipe, description)
    scores = preference and not pairs_instead_of_prompts(recipe)
    if scores:
        with problems.collect():
            check_ready(recipe.score)
    if recipe.score.model and scores:
        with problems.collect():
            stored_tensors(describe(recipe.score.model))
    read += check_pairs(recipe, problems.found)
    for config in rows_of(recipe):
        with problems.collect():
            count = problems.rows(config, make_checks, f"validate {config.path}", require_image=preference)
            read.append(f"{count} rows of {config.path}")
    for name, benchmark in recipe.evaluate.benchmarks.items():
        with problems.collect():
            read.append(f"{len(read_benchmark(name, benchmark).prompts)} questions of {name}")
    return problems.found, ", ".join(read)


def rows_of(recipe: Recipe) -> list[DataConfig]:
    """The prompts (or rows) that a recipe's stages read; none where training reads pairs from a file."""
    if pairs_instead_of_prompts(recipe):
        return []
    own = recipe.train.objective in ("preference", "rlhf", "reward")
    return [recipe.data] if own else recipe.train.data or [recipe.data]


def _row_checks(recipe: Recipe, description: Description) -> MakeChecks:
    """What a stage will do with a row, without the model."""
    processor: DualEncoderProcessor | Processor
    if recipe.train.objective == "contrastive":
        positions = description.config.text.max_positions
        processor = DualEncoderProcessor.from_pretrained(description.directory, max_positions=positions)
        return lambda root: [dataclasses.replace(processor, image_root=root).pixel_values]
    processor = Processor.from_pretrained(
        description.directory,
        recipe.model.template,
        recipe.model.image_fit,
        max_image_pixels=recipe.data.max_image_pixels,
        max_prompt_tokens=recipe.model.max_prompt_tokens,
    )

    def checks(root: Path) -> list[Check]:
        own = dataclasses.replace(processor, image_root=root)
        return [own.encode_prompt, own.pixel_values]

    return checks
