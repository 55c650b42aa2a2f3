"""What later stages will need, tried before the first: judges' files, layers that learn, room on disk and in memory.

`validate` collects every problem; a run raises the first. No weight is read.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m3po_jax.config import EvaluateConfig, LoRAConfig, ModelConfig, Recipe, ScoreConfig, TrainConfig
from m3po_jax.data.preference_files import read_preferences
from m3po_jax.errors import UserError, nearest
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.memory import GIB, CacheShape, cache_bytes
from m3po_jax.models import lora
from m3po_jax.models.kernels.choice import check_attention
from m3po_jax.models.processor import Processor
from m3po_jax.models.quantized_base import quantize_base
from m3po_jax.models.registry import Description, describe_policy, stored_tensors
from m3po_jax.objectives.objective import Learner
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.arms import arm_recipe
from m3po_jax.pipeline.backends import check_ready, describe_dual_encoder, describe_judge, judge_config
from m3po_jax.pipeline.checks import draws_candidates, judges
from m3po_jax.pipeline.models import InputLimits, make_dual_processor, make_processor
from m3po_jax.pipeline.systems import stop_tokens
from m3po_jax.scoring.grading import grade_tokens
from m3po_jax.scoring.judge import answer_tokens
from m3po_jax.training.step import trainable_filter
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.reward import RewardFolder

TRACKER_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
AMBER_PACKAGES = {"nouns": "nltk", "similarity": "spacy"}
STATE_BYTES = 12  # of a parameter that learns, in a checkpoint: itself and AdamW's two means, in float32
TEXT_BYTES = 4  # of an answer's token as text, about
SMALL_MODEL_BYTES = 4 * GIB  # larger ones are checked on the machine that runs them, not on a laptop's memory


class Preflight:
    """A recipe's later stages, as far as they can be tried without weights."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.with_candidates = draws_candidates(recipe.train, recipe.reward)
        self.dual_encoder = objective_of(recipe.train).learner is Learner.DUAL_ENCODER

    @functools.cached_property
    def description(self) -> Description:
        return describe_policy(self.recipe.model, download=False)

    @functools.cached_property
    def limits(self) -> InputLimits:
        return InputLimits.of(self.recipe.data, self.recipe.generate, self.recipe.evaluate)

    @functools.cached_property
    def processor(self) -> Processor:
        """The policy's."""
        return make_processor(self.recipe.model, self.description, self.limits)

    def checks(self) -> list[Callable[[], object]]:
        """Each raises UserError where a later stage would."""
        checks: list[Callable[[], object]] = [
            lambda: check_output(self.recipe.output_dir, self.recipe.name),
            self.devices,
            lambda: check_packages(self.recipe.train, self.recipe.evaluate),
        ]
        if not self.dual_encoder:
            checks += [
                functools.partial(self.training, trained.model, trained.train) for trained in self.trained_recipes()
            ]
            checks += [self.tokens, self.memory]
        if self.with_candidates:
            checks += [lambda: check_ready(self.recipe.score)]
            checks += [functools.partial(self.judge, judge) for judge in self.judges()]
        if self.recipe.reward.pairs:  # those of `train.pairs` are read when the run begins
            checks += [lambda: read_preferences(self.recipe.reward.pairs, image_root=self.recipe.data.image_root)]
        return checks

    def trained_recipes(self) -> list[Recipe]:
        """The main recipe, and those arms whose training differs from it."""
        recipes = [self.recipe]
        for arm in self.recipe.arms:
            merged = arm_recipe(self.recipe, arm)
            if not any((merged.train, merged.model) == (other.train, other.model) for other in recipes):
                recipes.append(merged)
        return recipes

    def judges(self) -> list[ScoreConfig]:
        """The judges of all arms, each once."""
        configs: list[ScoreConfig] = []
        for arm in (None, *self.recipe.arms):
            configs += [judge for judge in judges(arm_recipe(self.recipe, arm).score) if judge not in configs]
        return configs

    def devices(self) -> None:
        """The mesh, and the kernels of attention: on accelerators alone, since a recipe may be checked elsewhere."""
        if jax.default_backend() == "cpu":
            return
        mesh = make_mesh(self.recipe.mesh)
        platform, model = mesh.devices.flat[0].platform, self.recipe.model
        decoder = self.description.family.decoder(self.description.config)
        check_attention(model.attention, platform=platform, dtype=model.dtype, decoder=decoder)

    def model(self, settings: ModelConfig, adapters: LoRAConfig) -> Any:
        """The policy with a stage's adapters, as a tree of shapes.

        Raises:
            UserError: a layer to adapt that the model does not have.
        """
        family = self.description.family

        def make() -> Any:
            dtypes = {"dtype": jnp.dtype(settings.dtype), "param_dtype": jnp.dtype(settings.param_dtype)}
            model = family.build(self.description.config, **dtypes)
            if settings.quantization != "none":
                quantize_base(model, settings.quantization, scope=family.lora_scope)
            if adapters.lora_rank:
                lora.attach(model, adapters, scope=family.lora_scope, rngs=nnx.Rngs(0))
            return model

        return nnx.eval_shape(make)

    def training(self, settings: ModelConfig, train: TrainConfig) -> None:
        """Adapters find their layers, `freeze` its parts, and something learns."""
        model = self.model(settings, train.lora)
        parts = sorted({str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(model))})
        for name in train.freeze:
            if name not in parts:
                raise UserError(f"the model has no part {name!r}{nearest(name, parts)}", where="train.freeze")
        if not _count(nnx.state(model, trainable_filter(train))):
            raise UserError("no parameter is trainable", where="train", remedy="set train.lora.lora_rank")

    def tokens(self) -> None:
        """Words and ids that settings name are the tokenizer's."""
        stop_tokens(self.recipe.evaluate, self.processor)
        size = self.description.config.text.vocab_size
        if beyond := [token for token in self.recipe.generate.suppress_tokens if token >= size]:
            raise UserError(f"the model has {size} tokens, no {beyond[0]}", where="generate.suppress_tokens")

    def judge(self, judge: ScoreConfig) -> None:
        """A judge's files, and the tokens that it is asked for."""
        if judge.backend == "similarity":
            described = describe_dual_encoder(judge, download=False)
            stored_tensors(described)
            make_dual_processor(described)
        elif judge.backend in ("claims", "judge"):
            processor = self.processor
            if judge.model:
                described = describe_judge(judge, download=False)
                stored_tensors(described)
                config = judge_config(judge.model, self.recipe.model, described, self.description)
                processor = make_processor(config, described, self.limits)
            if judge.backend == "claims":
                answer_tokens(processor)
            else:
                grade_tokens(processor, judge.grades)
        elif judge.backend == "reward" and judge.model:
            RewardFolder.find(judge.model)
        elif judge.backend == "endpoint" and judge.endpoint.cache_dir:
            check_writable(Path(judge.endpoint.cache_dir), "score.endpoint.cache_dir")

    def disk(self, rows: int) -> None:
        """Room for candidates and checkpoints, by an estimate that leaves the small files out.

        Raises:
            UserError: less is free than `rows` prompts and all stages need.
        """
        recipe, root = self.recipe, RunDirectory.of(self.recipe.output_dir, self.recipe.name).root
        needed = 0
        if self.with_candidates:
            drawn = recipe.generate
            # Ids and log-probs of 4 bytes, a text.
            needed += rows * drawn.num_candidates * drawn.max_new_tokens * (4 + 4 + TEXT_BYTES) * recipe.rounds
        trained = [recipe] * recipe.rounds + [arm_recipe(recipe, arm) for arm in recipe.arms]
        if not self.dual_encoder:
            for learner in trained:
                learns = _count(
                    nnx.state(self.model(learner.model, learner.train.lora), trainable_filter(learner.train))
                )
                size = learns * (STATE_BYTES + 4 * bool(learner.train.ema_decay))
                needed += size * (learner.train.keep_checkpoints + learner.train.keep_best)
        place = _existing(root)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"candidates and checkpoints may take {needed / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free",
                where=f"output_dir {recipe.output_dir!r}",
                remedy="choose another output_dir, or lower train.keep_checkpoints or generate.num_candidates",
            )

    def memory(self) -> None:
        """Weights, the cache of a batch of candidates, and the images of a training batch, where the devices' memory
        is known: on accelerators, and for small models on this machine.

        Raises:
            UserError: together they cannot fit.
        """
        recipe, config = self.recipe, self.description.config
        limit = device_memory()
        if limit is None:
            return
        weights = sum(
            math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(nnx.state(self.model(recipe.model, recipe.train.lora)))
        )
        if jax.default_backend() == "cpu" and weights > SMALL_MODEL_BYTES:
            return
        shapes, drawing = [], recipe.generate
        family = self.description.family.images
        image = None if family is None else family.typical(config)
        prefix = 1 if image is None else image.tokens
        if self.with_candidates:
            shapes.append(("generate.batch_size", drawing.batch_size, drawing.num_candidates, drawing.max_new_tokens))
        if recipe.evaluate.benchmarks:
            shapes.append(("evaluate.batch_size", recipe.evaluate.batch_size, 1, recipe.evaluate.max_new_tokens))
        itemsize = jnp.dtype(recipe.model.dtype).itemsize
        for key, batch, count, tokens in shapes:
            shape = CacheShape(batch, batch, 1, prefix, count, tokens)
            _fits(weights + cache_bytes(config.text, shape, itemsize), limit, f"{batch} prompts in flight", key)
        rows = recipe.train.batch_size // recipe.train.gradient_accumulation_steps
        if image is not None:
            images = rows * sum(map(math.prod, image.shapes.values())) * 4
            _fits(weights + images, limit, f"{rows} rows of a step", "train.batch_size")


def _fits(needed: int, limit: int, what: str, key: str) -> None:
    if needed > limit:
        raise UserError(
            f"the weights and {what} take {needed / GIB:,.1f} GiB at least; here are {limit / GIB:,.1f} GiB",
            where=key,
            remedy="lower it, or what it multiplies, or take more devices",
        )


def device_memory() -> int | None:
    """Bytes of all devices here; of the machine where it computes on its CPU; None where nobody tells."""
    if jax.default_backend() == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if not all(limits):
        return None
    return sum(limits) * jax.device_count() // len(limits)  # type: ignore[arg-type]


def _count(state: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_output(output_dir: str, name: str) -> None:
    """UserError where the run directory cannot be made or written."""
    if not output_dir:
        raise UserError("no folder for runs", where="output_dir", remedy="name one")
    check_writable(RunDirectory.of(output_dir, name).root, "output_dir")


def check_writable(folder: Path, key: str) -> None:
    """UserError unless `folder` is a writable folder, or can become one."""
    remedy = f"choose another {key}"
    try:
        place = _existing(folder)
        if not place.is_dir():
            raise UserError("a file, not a folder", where=f"{key}: {place}", remedy=remedy)
        if not os.access(place, os.W_OK | os.X_OK) or str(place).startswith(("/proc", "/sys")):
            raise UserError("cannot be written", where=f"{key}: {place}", remedy=remedy)
    except OSError as error:  # a name that the file system does not take, a link to itself
        raise UserError(f"cannot be used ({error.strerror})", where=f"{key}: {folder}", remedy=remedy) from None


def check_packages(train: TrainConfig, evaluate: EvaluateConfig) -> None:
    """UserError where a setting needs a package that is not installed."""
    trackers = [("train.report_to", name, TRACKER_PACKAGES.get(name, "")) for name in train.report_to]
    amber = [
        (f"evaluate.benchmarks.{name}.{key}", "amber", package)
        for name, benchmark in evaluate.benchmarks.items()
        for key, package in AMBER_PACKAGES.items()
        if benchmark.metric == "amber" and getattr(benchmark, key) not in ("", "vocabulary", "exact")
    ]
    for where, extra, package in [*trackers, *amber]:
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed", where=where, remedy=f"pip install 'm3po-jax[{extra}]'")


def check_before_run(recipe: Recipe) -> None:
    """Raises the first problem that a later stage of a run would meet; images and rows are the stages' own."""
    for check in Preflight(recipe).checks():
        check()
