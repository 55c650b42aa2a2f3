"""The `validate` verb: every problem of a recipe and its data, found before any accelerator time is spent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from m3po_jax.config import DataConfig, Recipe, TrainConfig
from m3po_jax.data.batches import reference_tokens
from m3po_jax.data.checker import kind_of
from m3po_jax.data.contrastive import claims_of
from m3po_jax.data.row_inputs import checked_answer, where_of
from m3po_jax.data.schema import Prompt
from m3po_jax.data.sources import PromptSource, read_prompts
from m3po_jax.errors import UserError
from m3po_jax.models.registry import stored_tensors
from m3po_jax.objectives.objective import Learner, Reads
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.arms import arm_recipe, needs_pairs
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.console import progress, say
from m3po_jax.pipeline.evaluate import check_scoring, read_benchmark
from m3po_jax.pipeline.models import make_dual_processor
from m3po_jax.pipeline.pair_files import check_pairs, pairs_instead_of_prompts
from m3po_jax.pipeline.preflight import Preflight
from m3po_jax.scoring.alignment import Reference

Check = Callable[[Prompt], object]
MakeChecks = Callable[[Path], list[Check]]  # for rows whose images lie under a folder


class Problems:
    """Collects one line for everything that is wrong."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []
        self._lines: set[str] = set()

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.add(error)

    def add(self, error: UserError) -> None:
        """Notes a problem, unless it is known: stages share models and rows."""
        if str(error) not in self._lines:
            self._lines.add(str(error))
            self.errors.append(error)

    def rows(self, source: CheckedSource, title: str) -> PromptSource:
        """Reads every row of a source and its images; returns those that are good enough to be read."""
        problems: list[UserError] = []
        rows = read_prompts(source.config, require_image=source.drawn, problems=problems)
        for error in problems:
            self.add(error)
        checks = source.checks(rows.image_root)
        for index in progress(range(len(rows)), title, len(rows)):
            self.row(rows[index], checks)
        return rows

    def row(self, prompt: Prompt, checks: list[Check]) -> None:
        for check in checks:
            before = len(self.errors)
            with self.collect():
                check(prompt)
            if len(self.errors) > before:
                break  # a row's first problem may cause its others


SHOWN_PROBLEMS = 20  # of one kind


def problem_lines(problems: Sequence[UserError]) -> list[str]:
    """One line for each problem; of many of one kind the first, and how many more there are."""
    kinds = Counter(map(kind_of, problems))
    shown: Counter[str] = Counter()
    lines = []
    for problem in problems:
        kind = kind_of(problem)
        shown[kind] += 1
        if shown[kind] <= SHOWN_PROBLEMS:
            lines.append(str(problem))
        elif shown[kind] == kinds[kind]:
            lines.append(f"and {kinds[kind] - SHOWN_PROBLEMS} more like it: {kind}")
    return lines


def validate(recipe: Recipe) -> tuple[list[UserError], str]:
    """(every problem, a summary of what was read).

    Checks settings, what every stage will construct (`Preflight`), the models' files (names and shapes of all
    tensors, not their values), every row's prompt, images and answer, and every benchmark's questions and fields.
    """
    problems, read = Problems(), []
    with problems.collect():
        check_recipe(recipe)
    # Arms that cannot be meant would only repeat that.
    preflight = Preflight(dataclasses.replace(recipe, arms={}) if problems.errors else recipe)
    checks: list[Callable[[], object]] = []
    with problems.collect():
        checks = preflight.checks()
    with problems.collect():
        described = preflight.description
        if recipe.model.init == "pretrained":
            read.append(f"{len(stored_tensors(described))} tensors")
    for check in checks:
        with problems.collect():
            check()
    prompts, sources = 0, list[CheckedSource]()
    with problems.collect():
        sources = list(_sources(recipe, preflight))
    read += check_pairs(recipe.train, recipe.reward, recipe.data, lambda: preflight.processor, problems.add)
    for source in sources:
        with problems.collect():
            rows = problems.rows(source, f"validate {source.config.path}")
            read.append("; ".join([f"{len(rows)} rows of {source.config.path}", *rows.notes]))
            prompts += len(rows) if source.drawn else 0
    for name, benchmark in recipe.evaluate.benchmarks.items():
        with problems.collect():
            questions = read_benchmark(name, benchmark)
            read.append(f"{len(questions.prompts)} questions of {name}")
            checks_of_rows = _asked(preflight)(questions.image_root) if _answers(recipe.train) else []
            for prompt in progress(questions.prompts, f"validate {name}", len(questions.prompts)):
                problems.row(prompt, checks_of_rows)
            check_scoring(questions)
    if not problems.errors:
        with problems.collect():
            preflight.disk(prompts)
    return problems.errors, ", ".join(read)


def _answers(train: TrainConfig) -> bool:
    """Whether the model answers questions; a dual encoder does not."""
    return objective_of(train).learner is not Learner.DUAL_ENCODER


@dataclass(frozen=True)
class CheckedSource:
    """Rows that a stage reads.

    Attributes:
        checks: What the stage does with each.
        drawn: They are prompts that candidates are drawn for.
    """

    config: DataConfig
    checks: MakeChecks
    drawn: bool = False


def _sources(recipe: Recipe, preflight: Preflight) -> Iterator[CheckedSource]:
    """The rows of every stage; those that two stages read come twice, their images once."""
    if objective_of(recipe.train).reads is Reads.CLAIMS:
        for config in recipe.train.data or [recipe.data]:
            yield CheckedSource(config, _claims(preflight))
        return
    asked = _asked(preflight)
    shown: list[DataConfig] = []
    if preflight.with_candidates:
        references = [Reference(judge.vocabulary) for judge in preflight.judges() if judge.backend == "reference"]
        yield CheckedSource(
            recipe.data, lambda root: [*asked(root), *(judge.objects for judge in references)], drawn=True
        )
        shown.append(recipe.data)
    for trained in [recipe, *(arm_recipe(recipe, arm) for arm in preflight.recipe.arms)]:
        if pairs_instead_of_prompts(trained.train, trained.reward):
            continue
        if not objective_of(trained.train).reads_rows or (needs_pairs(trained.train) and trained is not recipe):
            continue
        answer = _answer(trained.train.max_answer_tokens, preflight)
        configs = trained.train.data or [trained.data]
        for config in configs:
            questioned = config in shown
            yield CheckedSource(
                config,
                lambda root, questioned=questioned, answer=answer: [*([] if questioned else asked(root)), answer],
            )
            shown.append(config)


def _asked(preflight: Preflight) -> MakeChecks:
    """The prompt and its images, as the policy sees them."""
    for note in preflight.processor.notes:
        say(note, style="yellow")

    def checks(root: Path) -> list[Check]:
        processor = dataclasses.replace(preflight.processor, image_root=root)
        return [processor.encode_prompt, processor.images]

    return checks


def _answer(longest: int, preflight: Preflight) -> Check:
    """The reference answer of at most so many tokens, as SFT learns it."""

    def check(prompt: Prompt) -> None:
        tokens = reference_tokens(prompt, preflight.processor)
        checked_answer(tokens, longest, where_of(prompt))

    return check


def _claims(preflight: Preflight) -> MakeChecks:
    """Images and objects, as contrastive training reads them."""
    processor = make_dual_processor(preflight.description)

    def objects(prompt: Prompt) -> None:
        if prompt.metadata.get("objects"):  # rows without are left out
            claims_of(prompt)

    return lambda root: [dataclasses.replace(processor, image_root=root).images, objects]
