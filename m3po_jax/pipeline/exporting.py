"""What the `export` verb writes: a finished training of a run, by the run's own recipe.

Everything that says what was trained (the model, the adapter, the template) is read from the recipe that the run
directory keeps. A key that the command states otherwise is a contradiction; one that it does not state is the run's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3po_jax.config import ModelConfig, Recipe, TrainConfig
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError, nearest
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.models.export import export_adapter, export_model
from m3po_jax.models.export.model import RECORD
from m3po_jax.models.identity import tree_identity
from m3po_jax.models.registry import Loaded
from m3po_jax.objectives.objective import Learner
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.arms import arm_recipe, trains_in_rounds
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.model_card import model_card
from m3po_jax.pipeline.models import policy_identity
from m3po_jax.pipeline.train import Trained, load_finished
from m3po_jax.recipes import find_recipe, leaves, load_recipe, read_document
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.files import read_json
from m3po_jax.workspace.training import TrainingArtifact

FORMATS = ("huggingface", "peft")
# Keys that say how a program runs, or which of the kept weights are handed on; an export may choose them itself.
_BASE = ("model.path", "model.revision", "model.vision_tower")
_CHOICES = ("model.attention", "model.remat", "model.max_prompt_tokens", "train.weights", "train.best_metric")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be exported.

    Attributes:
        cell: Whose weights they are, and of which round.
        format: One of `FORMATS`.
        dtype: One of `EXPORT_DTYPES`.
        output: The directory; None: `Cell.export`.
        overwrite: Replace an export that is another one.
    """

    cell: Cell
    format: str
    dtype: str
    output: Path | None
    overwrite: bool


def saved_recipe(directory: RunDirectory) -> Recipe:
    """The resolved recipe that a run directory was made with.

    Raises:
        UserError: there is no run, or its recipe cannot be read.
    """
    file = directory.config
    if not file.is_file():
        raise UserError(
            "holds no recipe of a run",
            where=str(directory.root),
            remedy="run `m3po train` first, or give the run's name=... and output_dir=...",
        )
    return load_recipe(file)


def _stated(config: str | None, overrides: Sequence[str], arm: str | None) -> set[str]:
    """The keys that a recipe file and the command line set themselves, those of `arm` as keys of the recipe."""
    keys = {override.partition("=")[0] for override in overrides}
    if config is not None:
        content = read_document(find_recipe(config))
        keys |= leaves(content).keys()
    prefix = f"arms.{arm}."
    return keys | {key.removeprefix(prefix) for key in keys if arm is not None and key.startswith(prefix)}


# Keys that leave no trace in the weights: data that is not read again, and how training was watched and saved.
_NO_TRACE = (
    *("train.data", "train.report_to", "train.log_steps", "train.save_steps"),
    *("train.keep_checkpoints", "train.keep_best"),
)


def _about_weights(model: ModelConfig, train: TrainConfig, seed: int) -> dict[str, Any]:
    """The settings that say what weights are, by dotted key."""
    sections = {
        "seed": seed,
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(train),
    }
    return {key: value for key, value in leaves(sections).items() if key not in (*_CHOICES, *_NO_TRACE)}


def run_recipe(
    directory: RunDirectory, given: Recipe, arm: str | None, *, config: str | None, overrides: Sequence[str]
) -> Recipe:
    """The recipe of a run's system, checked against what a command states.

    Args:
        given: What the command's recipe file and overrides make, the arms included.
        config: That recipe file, and
        overrides: those overrides.

    Raises:
        UserError: no run there, an arm that it does not have, or a key that is stated and was another in the run.
    """
    saved = saved_recipe(directory)
    if arm is not None and arm not in saved.arms:
        raise UserError(f"unknown arm {arm!r}{nearest(arm, saved.arms)}", where="--arm")
    if arm is not None and arm not in given.arms:
        given = dataclasses.replace(given, arms=saved.arms)
    trained, asked = arm_recipe(saved, arm), arm_recipe(given, arm)
    was, now, default = (
        _about_weights(recipe.model, recipe.train, recipe.seed) for recipe in (trained, asked, Recipe())
    )
    stated = _stated(config, overrides, arm) | {key for key in now if now[key] != default.get(key)}
    moved = directory.manifest().get("model") is not None  # then the base is known by its content, wherever it lies
    for key in sorted(was.keys() | now.keys()):
        is_stated = any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in stated)
        if was.get(key) == now.get(key) or not is_stated or (moved and key in _BASE):
            continue
        raise UserError(
            f"{key}={now.get(key)!r}, and the run was trained with {was.get(key)!r}",
            where=str(directory.root),
            remedy="leave it out: an export takes it from the run",
        )
    taken = (*_CHOICES, *(key for key in _BASE if moved and key in stated))
    changed = {}
    for section in ("model", "train"):
        names = [key.partition(".")[2] for key in taken if key.startswith(f"{section}.")]
        values = {name: getattr(getattr(asked, section), name) for name in names}
        changed[section] = dataclasses.replace(getattr(trained, section), **values)
    # No forward pass is computed, so kernels of another platform must not be in the way.
    changed["model"] = dataclasses.replace(changed["model"], attention="xla")
    return dataclasses.replace(trained, mesh=given.mesh, **changed)


def check_output(output: Path, record: Mapping[str, Any], inputs: Iterable[Path], overwrite: bool) -> None:
    """An export takes no other thing's place unasked.

    Args:
        record: What the export is made of; the same record there may be replaced.
        inputs: Directories that the export is made from.
        overwrite: Another export may be replaced.

    Raises:
        UserError: the directory holds something else than this very export, and `overwrite` does not allow to replace
            it; or it is no place for an export at all.
    """
    for kept in (*inputs, Path.cwd()):
        if kept.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"holds {kept}, which an export must not replace", where=str(output), remedy="choose another"
            )
    if not output.is_dir() or not any(output.iterdir()):
        return
    present = read_json(output / RECORD)
    if present == record:
        return
    if not overwrite:
        differing = (
            next((key for key in record if present.get(key) != record[key]), "") if isinstance(present, dict) else ""
        )
        what = "holds something else than this export"
        if differing:
            what = f"holds another export ({differing} is {present.get(differing)!r}, here {record[differing]!r})"
        raise UserError(what, where=str(output), remedy="choose another --output, or give --overwrite to replace it")
    if present is None and not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError("holds no model, and is not replaced", where=str(output), remedy="choose another --output")


def export(given: Recipe, wanted: Wanted, *, config: str | None = None, overrides: Sequence[str] = ()) -> Path:
    """Writes a finished training as a Hugging Face directory or a PEFT adapter; see `run_recipe` for the arguments.

    Raises:
        UserError: nothing is finished there, a contradiction of the run, other base weights than it was trained from,
            an output that is in the way.
    """
    directory = RunDirectory.of(given.output_dir, given.name)
    recipe = run_recipe(directory, given, wanted.cell.arm, config=config, overrides=overrides)
    if objective_of(recipe.train).learner is Learner.REWARD_MODEL:
        raise UserError(
            "a reward model is no language model to export",
            where="train.objective",
            remedy="it is used in place: score.backend=reward score.model=RUN_DIRECTORY",
        )
    if wanted.format == "peft" and recipe.train.lora.lora_rank == 0:
        raise UserError(
            "full fine-tuning (train.lora.lora_rank=0) has no adapter",
            where="--format peft",
            remedy="export with --format huggingface",
        )
    training = _training(directory, recipe.train, wanted.cell)
    if not training.is_marked:
        raise UserError("no finished training", where=str(training.folder), remedy="run `m3po train` first")
    mesh = make_mesh(recipe.mesh)
    with use_mesh(mesh):
        trained = load_finished(recipe, training.folder, mesh)
        base: Loaded = trained.base
        identity = policy_identity(recipe.model, recipe.seed, base)
        _check_base(directory, recipe.model.path, identity)
        record = {
            "format": wanted.format,
            "arm": wanted.cell.arm,
            "round": wanted.cell.round,
            "dtype": wanted.dtype,
            "base": identity,
            "checkpoint": tree_identity(training.checkpoints),
            "settings": content_hash(
                _about_weights(recipe.model, recipe.train, recipe.seed),
                recipe.train.weights,
                recipe.train.best_metric,
            )[:16],
        }
        output = wanted.output or wanted.cell.export(wanted.format)
        check_output(output, record, (*base.description.directories, directory.root), wanted.overwrite)
        _write(trained, recipe, wanted, output, record)
    return output


def _training(directory: RunDirectory, train: TrainConfig, cell: Cell) -> TrainingArtifact:
    """Where the training lies: in a round's folder, or the run's own where the verb alone trained on rows."""
    of_rows = cell == directory.cell(1) and not trains_in_rounds(train)
    return directory.training if of_rows and not cell.training.is_marked else cell.training


def _check_base(directory: RunDirectory, path: str, identity: str) -> None:
    """UserError where the base model's files are not those that the run began with."""
    noted = directory.manifest().get("model", {}).get("hash", identity)
    if noted != identity:
        raise UserError(
            "the base model's files have changed since this run was trained on them",
            where=path,
            remedy="put the earlier files back, or train again under another name=...",
        )


def _write(trained: Trained, recipe: Recipe, wanted: Wanted, output: Path, record: Mapping[str, Any]) -> None:
    adapter = wanted.format == "peft"
    auto = "float32" if adapter else "each tensor's as in the base model"
    card = model_card(
        recipe,
        trained.base.family,
        cell=wanted.cell,
        steps=trained.result.steps,
        dtypes=auto if wanted.dtype == "auto" else wanted.dtype,
        adapter=adapter,
    )
    texts = {"README.md": card, RECORD: json.dumps(record, indent=2) + "\n"}
    if not adapter:
        export_model(trained.model, trained.base, output, dtype=wanted.dtype, overwrite=True, texts=texts)
        return
    hint = export_adapter(
        trained.model,
        recipe.model.path,
        output,
        recipe.train.lora,
        dtype=wanted.dtype,
        overwrite=True,
        base=trained.base,
        texts=texts,
    )
    if recipe.model.vision_tower:
        say(
            f"the adapter belongs to {recipe.model.path} with the vision tower of {recipe.model.vision_tower}, "
            "which that directory does not hold",
            style="yellow",
        )
    if trained.base.description.stored_rows is not None:
        say(
            f"{recipe.model.path} is an original LLaVA release, which neither transformers nor PEFT reads: export "
            "the merged model (--format huggingface), or put the adapter on the same model in Hugging Face layout",
            style="yellow",
        )
    if hint:
        say(hint)
