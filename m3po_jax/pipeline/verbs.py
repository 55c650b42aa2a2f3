"""What each verb of the command line does with its options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from m3po_jax.config import ModelConfig, Recipe
from m3po_jax.data.tables import write_json
from m3po_jax.errors import UserError, nearest
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.hosts.startup import initialize_distributed
from m3po_jax.objectives.objective import Learner
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline import evaluate as evaluating
from m3po_jax.pipeline import summary
from m3po_jax.pipeline import train as training
from m3po_jax.pipeline.arms import trains_in_rounds
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.gate import require_gate
from m3po_jax.pipeline.models import InputLimits
from m3po_jax.pipeline.run import Run
from m3po_jax.pipeline.select import select_file
from m3po_jax.recipes import load_recipe, shipped, summary_of
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import RunDirectory


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.config, options.overrides)
    if getattr(options, "mock", False):
        from m3po_jax.pipeline.mock import shrink

        recipe = shrink(recipe)
    return recipe


def _start() -> None:
    """Joins other hosts and turns on the persistent compilation cache."""
    initialize_distributed()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(root / "m3po_jax" / "xla"))


def run(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    _start()
    if options.dry_run:
        from m3po_jax.pipeline.preview import preview

        print("\n".join(map(str, preview(recipe, force=options.force))), flush=True)
        return
    report = Run(recipe, force=options.force).execute()
    say(f"report: {report}")


def compare(options: argparse.Namespace) -> None:
    from m3po_jax.pipeline.compare import compare as run_comparison

    recipe = _recipe(options)
    _start()
    say(f"report: {run_comparison(recipe)}")


def generate(options: argparse.Namespace) -> None:
    with _stage(options) as (running, cell):
        running.generate_stage(cell)


def score(options: argparse.Namespace) -> None:
    with _stage(options) as (running, cell):
        running.score_stage(cell)


def select(options: argparse.Namespace) -> None:
    if options.input or options.output:
        if not (options.input and options.output):
            raise UserError("--input and --output go together", where="select")
        summary = select_file(Path(options.input), Path(options.output), _recipe(options).select)
        say(f"{summary['pairs']} pairs of {summary['prompts']} prompts; dropped: {summary['dropped'] or 'none'}")
        return
    with _stage(options) as (running, cell):
        running.select_stage(cell)


def evaluate(options: argparse.Namespace) -> None:
    if options.list:
        from m3po_jax.pipeline.published import listing

        print(listing())
        return
    published = options.references or options.rule or options.output
    if options.answers and (published or not (options.config or options.overrides)):
        _evaluate_published(options)
        return
    for name in ("references", "rule", "output"):
        if getattr(options, name):
            raise UserError("goes with saved answers", where=f"--{name}", remedy="give --answers FILE too")
    if options.answers:
        _evaluate_answers(options)
        return
    if options.benchmark:
        raise UserError(
            "says which benchmark --answers belongs to", where="--benchmark", remedy="give --answers FILE"
        )
    with _stage(options) as (running, cell):
        if not running.recipe.evaluate.benchmarks:
            raise UserError("no benchmark", where="evaluate.benchmarks", remedy="name at least one in the recipe")
        if cell.training.is_marked:
            running.evaluate_stage(cell)
        elif options.round > 1 or options.arm is not None:
            # The base's numbers would pass for those of the system that was named.
            raise UserError("no finished training", where=cell.name, remedy="run `m3po train` first")
        else:
            running.evaluate_base()
        require_gate(summary.write_tables(running.recipe, running.directory, running.benchmarks))


def _evaluate_published(options: argparse.Namespace) -> None:
    from m3po_jax.pipeline.published import score_published, summary_table

    if options.config or options.overrides:
        raise UserError(
            "published files need no recipe",
            where="--config" if options.config else options.overrides[0],
            remedy="leave it out, or score a recipe's benchmark with --answers and --benchmark alone",
        )
    if not options.benchmark:
        raise UserError("which benchmark do they answer?", where="--benchmark", remedy="m3po evaluate --list")
    results, out = score_published(
        options.benchmark,
        [Path(path) for path in options.references or ()],
        Path(options.answers),
        rule=options.rule or "",
        output=Path(options.output) if options.output else None,
    )
    print(summary_table(results))
    say(f"results and per-item records in {out}")


def _evaluate_answers(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    benchmarks = recipe.evaluate.benchmarks
    name = options.benchmark or (next(iter(benchmarks)) if len(benchmarks) == 1 else None)
    if name is None or name not in benchmarks:
        unknown = "which benchmark do they answer?" if name is None else f"unknown benchmark {name!r}"
        raise UserError(
            f"{unknown}{nearest(name or '', benchmarks)}",
            where="--benchmark",
            remedy="name one of evaluate.benchmarks",
        )
    folder = RunDirectory.of(recipe.output_dir, recipe.name).saved_answers(name)
    benchmark = evaluating.read_benchmark(name, benchmarks[name])
    results, out = evaluating.score_file(benchmark, Path(options.answers), recipe.evaluate, folder, seed=recipe.seed)
    print(json.dumps(results["summary"], indent=2))
    if "note" in results:
        say(f"{name}: {results['note']}")
    say(f"per-item records in {out}")


def validate(options: argparse.Namespace) -> None:
    from m3po_jax.pipeline.validate import problem_lines
    from m3po_jax.pipeline.validate import validate as find_problems

    problems, read = find_problems(_recipe(options))
    for line in problem_lines(problems):
        say(f"m3po: {line}", style="red")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in all", where="validate", remedy="each line above says how to mend it")
    say(f"no problems: {read}")


def recipes(options: argparse.Namespace) -> None:
    names = shipped()
    width = max(map(len, names))
    for name, path in names.items():
        print(f"{name.ljust(width)}  {summary_of(path)}")


def plan(options: argparse.Namespace) -> None:
    from m3po_jax.plan import plan as compile_for

    planned = compile_for(_recipe(options), options.topology, prompt_tokens=options.prompt_tokens)
    print(planned.table())
    if options.json:
        write_json(Path(options.json), dataclasses.asdict(planned))
    problems = planned.problems()
    for problem in problems:
        say(f"m3po: {problem}", style="red")
    if problems:
        raise UserError(
            f"{len(problems)} of {len(planned.programs)} programs do not fit",
            where=f"--topology {options.topology}",
            remedy="each line above names what to lower",
        )


def report(options: argparse.Namespace) -> None:
    from m3po_jax.report import build_report

    recipe = _recipe(options)
    directory = RunDirectory.of(recipe.output_dir, recipe.name)
    limits = InputLimits.of(recipe.data, recipe.generate, recipe.evaluate)
    say(f"report: {build_report(directory.root, _token_text(recipe.model, limits))}")


def _token_text(config: ModelConfig, limits: InputLimits) -> Callable[[int], str] | None:
    """Token texts for the report's hover, where the model's tokenizer is at hand."""
    from m3po_jax.models.registry import describe_policy
    from m3po_jax.pipeline.models import make_processor
    from m3po_jax.report.browser import tokenizer_text

    try:
        description = describe_policy(config, download=False)
        return tokenizer_text(make_processor(config, description, limits).text)
    except UserError:
        return None


def _check_round(options: argparse.Namespace) -> None:
    """Round 0 is the untrained model, which can only be evaluated."""
    least = 0 if options.verb == "evaluate" else 1
    if options.round < least:
        raise UserError(f"no round {options.round}", where="--round", remedy=f"at least {least}")


@contextmanager
def _stage(options: argparse.Namespace) -> Iterator[tuple[Run, Cell]]:
    """A locked, opened run for one stage's verb, and the round and system that the command names."""
    recipe = _recipe(options)
    _check_round(options)
    if options.arm is not None and options.arm not in recipe.arms:
        raise UserError(f"unknown arm {options.arm!r}{nearest(options.arm, recipe.arms)}", where="--arm")
    _start()
    running = Run(recipe, force=options.force)
    with running.directory.lock():
        running.open()
        yield running, running.directory.cell(options.round).of(options.arm)


def train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    if objective_of(recipe.train).learner is Learner.REWARD_MODEL and options.arm is None:
        with _stage(options) as (running, _):
            running.reward_stage()
        return
    if options.arm is not None or trains_in_rounds(recipe.train):
        with _stage(options) as (running, cell):
            running.train_stage(cell)
        return
    check_recipe(recipe)
    _start()
    directory = RunDirectory.of(recipe.output_dir, recipe.name)
    mesh = make_mesh(recipe.mesh)
    with directory.lock():
        for line in directory.open(recipe, {}, force=options.force):
            say(line, style="yellow")
        with use_mesh(mesh):
            trained = training.train_on_rows(recipe, directory.root, mesh, force=options.force)
        directory.note_stage("train", directory.cell(1), directory.training.read())
    say(f"trained {trained.result.steps} steps; checkpoints in {directory.training.checkpoints}")


def export(options: argparse.Namespace) -> None:
    from m3po_jax.pipeline.exporting import Wanted
    from m3po_jax.pipeline.exporting import export as write_export

    recipe = _recipe(options)
    _check_round(options)
    _start()
    wanted = Wanted(
        cell=RunDirectory.of(recipe.output_dir, recipe.name).cell(options.round).of(options.arm),
        format=options.format,
        dtype=options.dtype,
        output=Path(options.output) if options.output else None,
        overwrite=options.overwrite,
    )
    output = write_export(recipe, wanted, config=options.config, overrides=options.overrides)
    say(f"exported to {output}")


def merge(options: argparse.Namespace) -> None:
    from m3po_jax.pipeline.merging import merge as write_merged

    recipe = _recipe(options)
    _start()
    output = write_merged(
        recipe.model,
        recipe.mesh,
        Path(options.adapter),
        Path(options.output),
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    say(f"merged into {output}")
