"""The `train` verb: preference pairs, references or image-claim lists in; a checkpoint and metrics out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from m3po_jax.config import DataConfig, ModelConfig, Recipe, TrainConfig
from m3po_jax.data import pair_rows, tables
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.data.preference_files import FilePairs
from m3po_jax.data.schema import Prompt
from m3po_jax.data.sources import fingerprint
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import shared_out
from m3po_jax.hosts.sharding import use_mesh
from m3po_jax.models.hub import pinned
from m3po_jax.objectives.objective import Learner, Reads
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.caches import cache_folder, cached_reference, fill, vision_features, vision_folder
from m3po_jax.pipeline.models import (
    InputLimits,
    Joined,
    Policy,
    attach_adapter,
    load_dual_encoder,
    load_policy,
    model_identity,
    read_rows,
)
from m3po_jax.pipeline.pair_files import any_recorded, with_identity
from m3po_jax.pipeline.trainings import begin_training, finish_training, finished_record, require_current
from m3po_jax.training.loop import TrainResult, load_trained, train
from m3po_jax.training.stage import without_free_settings
from m3po_jax.workspace.records import settings
from m3po_jax.workspace.training import TrainingArtifact


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, and the model and directory it started from (which `export` copies files from)."""

    result: TrainResult
    base: Any
    seconds: float

    @property
    def model(self) -> Any:
        return self.result.model


def rows_identity(train: TrainConfig, data: DataConfig) -> str:
    """A hash of the rows that `training_rows` gives, and of the images that they name."""
    return tables.content_hash([fingerprint(part) for part in training_rows(train, data).parts])[:16]


def training_rows(train: TrainConfig, data: DataConfig) -> Joined:
    """The rows of `train.data`, one source after another (default: the recipe's own data)."""
    parts = [read_rows(config, require_image=False) for config in (train.data or [data])]
    roots = {part.image_root for part in parts if part[0].images and part[0].images[0].bytes is None}
    if len(roots) > 1:
        raise UserError(
            f"sources with image files have different roots ({', '.join(map(str, sorted(roots)))})",
            where="train.data",
            remedy="set image_root of each to one common folder",
        )
    joined = Joined(parts)
    if roots:
        joined.image_root = roots.pop()
    return joined


def batch_options(config: TrainConfig, seed: int, mesh: Mesh) -> dict[str, Any]:
    """How rows are put into batches, as the functions of `data.batches` take it."""
    names = ("batch_size", "max_answer_tokens", "length_window", "max_shapes")
    return {"seed": seed, "own_rows": shared_out(mesh), **{name: getattr(config, name) for name in names}}


def _row_batches(
    recipe: Recipe, policy: Policy | None, processor: Any, rows: Sequence[Prompt], *, seed: int, mesh: Mesh
) -> BatchSource[Any]:
    """Batches of rows of `train.data`; `policy`: whose tower's features may be cached."""
    if policy is not None:
        processor = processor.with_buckets(rows, recipe.data.image_buckets)
    features = (
        None
        if policy is None
        else vision_features(vision_folder(recipe.cache, recipe.train, recipe.output_dir), policy, processor, mesh)
    )
    if features is not None:
        fill(features, rows)
    return objective_of(recipe.train).batches_of_rows(
        rows,
        processor,
        claim_template=recipe.score.claim_template,
        features=features,
        **batch_options(recipe.train, seed, mesh),
    )


def train_on_pairs(
    recipe: Recipe,
    policy: Policy,
    pairs: PairRows,
    out: Path,
    mesh: Mesh,
    *,
    start: Any,
    seed: int,
    made_from: Mapping[str, Any] | None = None,
    where: str = "pairs",
    reference: Any = None,
    reference_identity: str = "",
) -> Trained:
    """DPO, or SFT on the chosen answers, from `start`: the policy's model with adapters, trained or not.

    Args:
        pairs: Of a round, or of a file (`train.pairs`).
        made_from: As of `training.loop.train`.
        where: Of the pairs, for messages.
        reference: The reference model; default: `start`.
        reference_identity: A hash of its weights; default: that of the base model, which `start` then is.
    """
    started = time.monotonic()
    config = recipe.train
    features = vision_features(
        vision_folder(recipe.cache, recipe.train, recipe.output_dir), policy, policy.processor, mesh
    )
    if features is not None:
        fill(features, pair_rows.PairPrompts(pairs))
    objective = objective_of(config)
    source = objective.batches_of_pairs(
        pairs,
        policy.processor,
        where=where,
        features=features,
        **batch_options(config, seed, mesh),
    )
    if objective.uses_reference:
        if isinstance(pairs, FilePairs) and not any_recorded(pairs):
            # Nothing is recorded, so that the whole reference is computed, and may be cached.
            config = dataclasses.replace(config, reference="computed")
        compared = start if reference is None else reference
        folder = cache_folder(recipe.cache.reference, recipe.output_dir, "reference")
        filled = cached_reference(folder, config, source, compared, reference_identity or policy.identity, mesh)
        if filled is not None:
            # What this very model has computed needs no check against it.
            source, config = filled, dataclasses.replace(config, reference="recorded", reference_check_rows=0)
    if isinstance(pairs, FilePairs):
        source = with_identity(source, pairs)
    with use_mesh(mesh):
        result = train(
            start,
            source,
            config,
            output_dir=out,
            mesh=mesh,
            seed=seed,
            remat=recipe.model.remat,
            reference=reference,
            made_from=made_from,
        )
    return Trained(result, policy.loaded, time.monotonic() - started)


def train_on_references(
    recipe: Recipe,
    policy: Policy,
    out: Path,
    mesh: Mesh,
    *,
    start: Any,
    seed: int,
    made_from: Mapping[str, Any] | None = None,
) -> Trained:
    """More SFT of `start` on the reference answers of `train.data` (default: the recipe's data): the `sft` arm."""
    started = time.monotonic()
    rows = training_rows(recipe.train, recipe.data)
    processor = dataclasses.replace(policy.processor, image_root=rows.image_root)
    source = _row_batches(recipe, policy, processor, rows, seed=seed, mesh=mesh)
    with use_mesh(mesh):
        result = train(
            start,
            source,
            recipe.train,
            output_dir=out,
            mesh=mesh,
            seed=seed,
            remat=recipe.model.remat,
            made_from=made_from,
        )
    return Trained(result, policy.loaded, time.monotonic() - started)


def load_finished(recipe: Recipe, out: Path, mesh: Mesh) -> Trained:
    """What a finished training made, on rows or pairs, without reading its data again.

    Args:
        recipe: Of the system; an arm's with the arm's settings.
        out: Where its checkpoints are.

    Raises:
        UserError: there is none, it is not what was written, or it was trained by other settings.
    """
    started = time.monotonic()
    record = finished_record(out)
    TrainingArtifact(out).verify(remedy="`m3po train` mends it")
    require_current(out, record, record.inputs | trained_settings(recipe.model, recipe.train, recipe.seed))
    limits = InputLimits.of(recipe.data, recipe.generate, recipe.evaluate)
    start = _start(recipe.model, recipe.train, recipe.seed, limits, mesh, Path())
    with use_mesh(mesh):
        result = load_trained(start.model, recipe.train, output_dir=out, mesh=mesh)
    return Trained(result, start.base, time.monotonic() - started)


def train_on_rows(recipe: Recipe, out: Path, mesh: Mesh, *, force: bool = False) -> Trained:
    """SFT of a vision-language model on references, or contrastive training of a dual encoder.

    Args:
        force: As of `trainings.begin_training`.

    Raises:
        UserError: anything wrong with rows or model, or an unfinished training of others is there.
    """
    started = time.monotonic()
    config = recipe.train
    rows: Joined = training_rows(recipe.train, recipe.data)
    limits = InputLimits.of(recipe.data, recipe.generate, recipe.evaluate)
    start = _start(recipe.model, recipe.train, recipe.seed, limits, mesh, rows.image_root)
    inputs = _row_inputs(recipe.model, config, recipe.seed, recipe.score.claim_template, start) | {
        "data": rows_identity(recipe.train, recipe.data)
    }
    if begin_training(out, inputs, force=force):
        with use_mesh(mesh):
            result = load_trained(start.model, config, output_dir=out, mesh=mesh)
        return Trained(result, start.base, 0.0)
    source = _row_batches(recipe, start.policy, start.processor, rows, seed=recipe.seed, mesh=mesh)
    with use_mesh(mesh):
        result = train(
            start.model,
            source,
            config,
            output_dir=out,
            mesh=mesh,
            seed=recipe.seed,
            remat=recipe.model.remat,
            made_from=inputs,
        )
    seconds = time.monotonic() - started
    finish_training(out, inputs, seconds, steps=result.steps)
    return Trained(result, start.base, seconds)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a training of rows starts from: the model with its adapters, the loaded directory, its identity."""

    model: Any
    base: Any
    processor: Any
    identity: str
    policy: Policy | None = None


def _start(
    model: ModelConfig, train: TrainConfig, seed: int, limits: InputLimits, mesh: Mesh, image_root: Path
) -> _Start:
    if objective_of(train).learner is not Learner.DUAL_ENCODER:
        policy = load_policy(model, seed, mesh, limits, image_root=image_root)
        start = attach_adapter(policy, train.lora, seed)
        return _Start(start, policy.loaded, policy.processor, policy.identity, policy)
    loaded, processor = load_dual_encoder(
        pinned(model.path, model.revision),
        mesh,
        image_root=image_root,
        init=model.init,
        seed=seed,
        dtype=model.dtype,
        image_fit=model.image_fit,
        max_image_pixels=limits.max_image_pixels,
    )
    identity = tables.content_hash(model_identity(loaded), model.init, model.dtype, model.image_fit)
    return _Start(loaded.model, loaded, processor, identity[:16])


def _row_inputs(
    model: ModelConfig, train: TrainConfig, seed: int, claim_template: str, start: _Start
) -> dict[str, Any]:
    """What a training of rows is made from, but for the rows."""
    claims = objective_of(train).reads is Reads.CLAIMS
    return {
        "model": start.identity,
        "score.claim_template": claim_template if claims else None,
        **trained_settings(model, train, seed),
    }


def trained_settings(model: ModelConfig, train: TrainConfig, seed: int) -> dict[str, Any]:
    """The settings that every training depends on."""
    return {
        "model.param_dtype": model.param_dtype,
        "seed": seed,
        **settings("train", without_free_settings(train)),
    }
