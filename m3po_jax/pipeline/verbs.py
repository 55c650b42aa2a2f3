"""What each verb of the command line does with its options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jax

from m3po_jax.config import Recipe, load_recipe
from m3po_jax.errors import UserError, nearest
from m3po_jax.pipeline import train as training
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.rundir import RunDirectory
from m3po_jax.sharding import initialize_distributed, make_mesh, use_mesh


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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    _start()
    if recipe.train.objective == "preference":
        from m3po_jax.pipeline import run as running

        running.Run(recipe).train_stage(options.round, _arm(recipe, options))
        return
    directory = RunDirectory.of(recipe)
    mesh = make_mesh(recipe.mesh)
    with directory.lock():
        directory.open(recipe, {})
        with use_mesh(mesh):
            trained = training.train_on_rows(recipe, directory.root, mesh)
        directory.note_stage("train", round=1, arm=None, seconds=trained.seconds, steps=trained.result.steps)
    say(f"trained {trained.result.steps} steps; checkpoints in {directory.root / 'checkpoints'}")


def export(options: argparse.Namespace) -> None:
    from m3po_jax.models.export import export_adapter, export_model, vllm_hint

    recipe = _recipe(options)
    _start()
    directory = RunDirectory.of(recipe)
    output = Path(options.output) if options.output else directory.root / f"export-{options.format}"
    mesh = make_mesh(recipe.mesh)
    if recipe.train.objective == "preference" or options.arm is not None:
        from m3po_jax.pipeline import run as running

        trained = running.Run(recipe).train_stage(options.round, _arm(recipe, options), only_finished=True)
    else:
        if not (directory.root / "done.json").exists():
            raise UserError("no finished training", where=str(directory.root), remedy="run `m3po train` first")
        with use_mesh(mesh):
            trained = training.train_on_rows(recipe, directory.root, mesh)
    with use_mesh(mesh):
        if options.format == "peft":
            export_adapter(trained.model, recipe.model.path, output, recipe.train.lora, overwrite=True)
            hint = vllm_hint(recipe.train.lora.lora_rank)
            if hint:
                say(hint)
        else:
            export_model(trained.model, trained.base, output, dtype=options.dtype, overwrite=True)
    say(f"exported to {output}")


def _arm(recipe: Recipe, options: argparse.Namespace) -> str | None:
    if options.arm is not None and options.arm not in recipe.arms:
        raise UserError(f"unknown arm {options.arm!r}{nearest(options.arm, recipe.arms)}", where="--arm")
    return options.arm
