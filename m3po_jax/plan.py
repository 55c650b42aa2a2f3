"""What a recipe needs on TPU chips that are not there, from their own compiler.

libtpu (the ``plan`` extra) compiles the very programs that a run would execute, with the model's shapes in place of
its weights, and says what each takes of a chip's memory. The time is a roofline: no program can be faster than its
arithmetic at the chip's peak, or than one reading of what it must read at the bandwidth of the chip's memory.

Not counted: what the runtime itself takes, traffic between chips, and image preprocessing. A dual encoder that scores
is small beside the policy and is left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import Recipe
from m3po_jax.data.collation import PromptBatch, TreeBatch
from m3po_jax.data.model_images import ImagePlan, Images, joined
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import describe as describe_on
from m3po_jax.hosts.sharding import make_mesh, shard_batch, state_shardings, use_mesh
from m3po_jax.inference.fused import FusedLayer
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.memory import GIB
from m3po_jax.inference.programs import fuse_layers
from m3po_jax.inference.scorer import Scorer
from m3po_jax.inference.settings import sampling_config
from m3po_jax.models import lora
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.kernels.choice import with_attention
from m3po_jax.models.quantized_base import quantize_base
from m3po_jax.models.registry import Description, describe, describe_policy
from m3po_jax.objectives.registry import objective_of
from m3po_jax.training.flops import peak_flops, step_cost
from m3po_jax.training.stage import without_free_settings
from m3po_jax.training.step import make_step, split_model


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device: usable memory in bytes, and its bandwidth in bytes a second (makers' data sheets)."""

    memory: float
    bandwidth: float


# By `device_kind`. What a chip's compiler reserves is not usable, so its own verdict comes first.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 1.228e12),
    "TPU v5 lite": Chip(16 * GIB, 0.819e12),
    "TPU v5": Chip(95 * GIB, 2.765e12),
    "TPU v6 lite": Chip(32 * GIB, 1.640e12),
}
TEXT_TOKENS = 64  # of a prompt beside its image's, unless the caller knows better
QUESTION_TOKENS = 31  # of a question to the judge
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so other processes may do the same meanwhile
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program. Bytes are of the fullest chip; seconds are the least possible, of all its calls for one
    batch.

    Attributes:
        needed: arguments (weights, state, batch), results that are not written in their place, temporaries.
        beside: what else lies in memory while it runs.
        problem: the compiler's refusal, where it does not fit; `needed` is its figure then, if it gave one.
    """

    stage: str
    name: str
    arguments: int
    temporaries: int
    needed: int
    beside: int
    seconds: float | None
    bound: str = ""
    problem: str = ""

    @property
    def total(self) -> int:
        return self.needed + self.beside


@dataclasses.dataclass(frozen=True)
class Plan:
    """All programs of a recipe on one topology."""

    topology: str
    kind: str
    mesh: dict[str, int]
    memory: float | None  # bytes of a chip
    programs: list[Program]

    def table(self) -> str:
        """The programs as lines of text, for a terminal."""
        limit = "" if self.memory is None else f" of {self.memory / GIB:.0f}"
        axes = " × ".join(f"{name} {size}" for name, size in self.mesh.items())
        heads = ("stage", "program", "arguments", "temporary", "beside", f"all{limit} GiB", "at least", "bound by")
        rows = [heads]
        for program in self.programs:
            sizes = (program.arguments, program.temporaries, program.beside, program.total)
            figures = [f"{size / GIB:.2f}" for size in sizes] if not program.problem else ["", "", "", "does not fit"]
            seconds = "" if program.seconds is None else f"{program.seconds * 1e3:,.3g} ms"
            rows.append((program.stage, program.name, *figures, seconds, program.bound))  # type: ignore[arg-type]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 7) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.topology} ({self.kind}): {axes}; GiB a chip", *aligned])

    def problems(self) -> list[str]:
        """A line for each program that does not fit, with the number to lower."""
        limit = math.inf if self.memory is None else self.memory
        problems = []
        for program in self.programs:
            if program.problem or program.total > limit:
                size = f"{program.total / GIB:.1f} of {limit / GIB:.1f} GiB" if program.needed else program.problem
                problems.append(f"{program.stage} ({program.name}): {size} a chip; {REMEDIES[program.stage]}")
        return problems


# The slices that clouds sell: chips of a two-dimensional one, and of a three-dimensional one, by their number.
_SLICES = {
    2: {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    | {512: "16x32", 1024: "32x32"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
    | {1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24"},
}
# Generation -> (dimensions, what its accelerator type counts for each chip: v4-8 has eight cores on four chips).
_GENERATIONS = {"v2": (2, 2), "v3": (2, 2), "v4": (3, 2), "v5p": (3, 2), "v5e": (2, 1), "v6e": (2, 1)}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v5lp": "v5e", "v6litepod": "v6e", "v6lite": "v6e", "v5": "v5p"}


def topology_name(text: str) -> str:
    """The compiler's name of a topology: an accelerator type (``v5litepod-8``, ``v5e-8``, ``v4-8``) or a shape
    (``v5e:2x4``, ``v5p-2x2x1``), in any case. What is neither stays as it is, for the compiler to judge.

    Raises:
        UserError: a number of chips that no slice of the generation has.
    """
    parts = re.fullmatch(r"(?:tpu[-_ ]?)?(v\d+[a-z]*)[-:=_ ](\d+(?:x\d+)*)", text.strip().lower())
    if parts is None:
        return text
    name, size = _OTHER_NAMES.get(parts[1], parts[1]), parts[2]
    if name not in _GENERATIONS:
        return text
    dimensions, counted = _GENERATIONS[name]
    if "x" in size:
        return f"{name}:{size}" + "x1" * (dimensions - size.count("x") - 1)
    chips, rest = divmod(int(size), counted)
    if rest or chips not in _SLICES[dimensions]:
        sizes = ", ".join(f"{name}-{number * counted}" for number in _SLICES[dimensions])
        raise UserError(f"no slice of that size (there are {sizes})", where=f"--topology {text}")
    return f"{name}:{_SLICES[dimensions][chips]}"


REMEDIES = {
    "generate": "lower generate.batch_size, then generate.num_candidates or generate.max_new_tokens, or split the "
    "weights further (mesh.fsdp, mesh.tensor, model.quantization=int8)",
    "judge": "lower score.batch_size, or split the weights further (mesh.fsdp, mesh.tensor)",
    "train": "lower train.batch_size (train.gradient_accumulation_steps keeps the step), set model.remat=full, or "
    "split the weights further (mesh.fsdp, mesh.tensor, model.quantization=int8)",
}  # fmt: skip


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology such as ``v5e:2x4`` or ``v5litepod-8``, to compile for.

    To be called before jax has started a backend: it keeps jax from taking an attached TPU.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    if not topology.strip():  # the compiler would take its oldest chip
        raise UserError("no topology is named", where="--topology", remedy="give one like v5e-8 or v5e:2x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed", where="libtpu", remedy="pip install 'm3po-jax[plan]' (Linux, x86-64)"
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology_name(topology), platform="tpu").devices)
    except Exception as error:  # the compiler's own kinds; the name is the user's
        reason = str(error).strip().splitlines()
        raise UserError(
            f"no such TPU topology ({reason[0] if reason else type(error).__name__})",
            where=f"--topology {topology}",
            remedy="give one like v5e-8, v5e:2x4, v4-8, v5p:2x2x1 or v6e-8",
        ) from None


def plan(recipe: Recipe, topology: str, *, prompt_tokens: int | None = None) -> Plan:
    """Compiles what the recipe's generation, scoring under the policy and training would run.

    Args:
        prompt_tokens: length of the longest prompt, image tokens included; None: one image and 64 tokens of text.
            Answers are as long as the recipe allows.

    Raises:
        UserError: as `topology_devices`; a recipe whose model or mesh cannot be made.
    """
    devices = topology_devices(topology)
    mesh = make_mesh(recipe.mesh, devices)
    description = describe_policy(recipe.model, download=False)
    objective = objective_of(recipe.train)
    if description.family.images is None or objective.answers is None:
        raise UserError(
            "only vision-language models with train.objective preference or sft are planned",
            where=f"train.objective {recipe.train.objective}, model {recipe.model.path}",
            remedy="plan the preference recipe of the same model: its generation is the same, its step is larger",
        )
    image_tokens = _image(description).tokens
    length = prompt_tokens or image_tokens + TEXT_TOKENS
    if length <= image_tokens:
        raise UserError(
            f"{length} tokens leave no room for text beside an image's {image_tokens}", where="--prompt-tokens"
        )
    chip = CHIPS.get(devices[0].device_kind)
    planner = Planner(recipe, description, mesh, length, chip)
    stages: list[Callable[[], Iterator[Program]]] = []
    if objective.draws_candidates:
        stages.append(planner.generation)
        if recipe.score.backend in ("claims", "judge"):
            stages.append(planner.judging)
    stages.append(planner.training)
    programs = [program for stage in stages for program in stage()]
    memory = None if chip is None else chip.memory
    return Plan(topology, devices[0].device_kind, dict(mesh.shape), memory, programs)


def _image(description: Description) -> ImagePlan:
    """An image of usual size."""
    assert description.family.images is not None
    return description.family.images.typical(description.config)


def _images(description: Description, rows: int) -> Images:
    """One such image in every row, without memory."""
    return {name: np.broadcast_to(x, (rows, *x.shape)) for name, x in joined([_image(description).absent]).items()}


class _Described(Generator):
    """A generator whose weights are descriptions: its programs can be compiled, and not run."""

    def fused(self, decoder: Decoder) -> tuple[FusedLayer, ...]:
        graph, state = nnx.split(decoder)
        lowered = fuse_layers.lower(graph, state)
        return describe_on(lowered.out_info, lowered.compile().output_shardings)


def _bytes_a_chip(tree: Any) -> int:
    """Bytes of described arrays on each chip."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize  # noqa: E731
    return sum(size(x) for x in jax.tree.leaves(tree))


class Planner:
    """Compiles the programs of one recipe on one mesh of absent chips."""

    def __init__(self, recipe: Recipe, description: Description, mesh: Mesh, length: int, chip: Chip | None):
        self.recipe, self.description, self.mesh, self.length, self.chip = recipe, description, mesh, length, chip
        self.peak = peak_flops(list(mesh.devices.flat))

    def model(self, *, adapters: bool, description: Description | None = None) -> Any:
        """The policy, or the model of `description`, as a tree of shapes on their shardings."""
        description = description or self.description
        recipe, family = self.recipe, description.family
        config = with_attention(description.config, recipe.model.attention)
        dtype, param_dtype = jnp.dtype(recipe.model.dtype), jnp.dtype(recipe.model.param_dtype)

        def make() -> Any:
            model = family.build(config, dtype=dtype, param_dtype=param_dtype)
            if recipe.model.quantization != "none":
                quantize_base(model, recipe.model.quantization, scope=family.lora_scope)
            if adapters and recipe.train.lora.lora_rank:
                lora.attach(model, recipe.train.lora, scope=family.lora_scope, rngs=nnx.Rngs(0))
            return model

        graph, state = nnx.split(nnx.eval_shape(make))
        return nnx.merge(graph, describe_on(state, state_shardings(state, self.mesh)))

    def generation(self) -> Iterator[Program]:
        """Prefill, and the decode loop with the whole cache of answers."""
        config = self.recipe.generate
        model = self.model(adapters=self.recipe.rounds > 1)
        generator = _Described(
            model,
            # Which ids end or pad an answer changes no program's size.
            eos_token_id=2,
            pad_token_id=0,
            mesh=self.mesh,
            sampling=sampling_config(config, self.recipe.seed),
            batch_size=config.batch_size,
        )
        # More than are decoded at once, as in a long run.
        programs = generator.programs(self.prompts(2 * generator.batch_size, self.length))
        prefill, decode = programs[0], programs[-1]
        _, _, weights, prompts, _, _, cache, *_ = decode.arguments
        # The policy stays in memory beside the generator, which keeps its layers rearranged.
        beside = _bytes_a_chip(nnx.state(model.decoder.layers))
        cost = step_cost(model, set())
        assert cost is not None
        prompt, none = np.full(prefill.calls * generator.shards, self.length), np.zeros((1, 1))
        shown = len(prompt) * cost.image_tokens
        flops = cost.flops(prompt, none, image_tokens=shown, cached_images=False, reference=False)
        whole = beside + _bytes_a_chip(cache)
        yield self.compiled("generate", "prefill", prefill.function, prefill.arguments, whole, flops=flops)
        steps = config.max_new_tokens - 1
        drawn, context = generator.batch_size * config.num_candidates * steps, self.length + steps / 2
        keys = sum(context if window is None else min(context, window) for window in cost.windows)
        flops = 2.0 * drawn * (cost.decoder + cost.head + cost.attention * keys)
        read = steps * (_bytes_a_chip((weights, prompts.kv)) + _bytes_a_chip(cache.kv) / 2)
        yield self.compiled("generate", "decode", decode.function, decode.arguments, beside, flops=flops, read=read)

    def judging(self) -> Iterator[Program]:
        """Yes/no questions, or a grade, of all candidates of a batch of prompts; the policy stays in memory."""
        score, policy = self.recipe.score, self.model(adapters=False)
        description = describe(score.model, download=False) if score.model else self.description
        judge = self.model(adapters=False, description=description) if score.model else policy
        scorer = Scorer(judge, self.mesh, batch_size=score.batch_size)
        length = self.length - _image(self.description).tokens + _image(description).tokens
        questions = self.recipe.generate.num_candidates
        batch = self.prompts(scorer.batch_size, length, description)
        function, arguments = scorer.choices_program(batch, questions, QUESTION_TOKENS)
        cost = step_cost(judge, set())
        assert cost is not None
        rows = scorer.batch_size
        asked = np.full((rows, questions), QUESTION_TOKENS)
        flops = cost.flops(
            np.full(rows, length), asked, image_tokens=rows * cost.image_tokens, cached_images=False, reference=False
        ) - 2.0 * cost.head * (asked.sum() - asked.size)
        beside = _bytes_a_chip(nnx.state(policy)) if score.model else 0
        yield self.compiled("judge", "questions", function, arguments, beside, flops=flops)

    def prompts(self, rows: int, length: int, description: Description | None = None) -> PromptBatch:
        """Prompts of one image each; nothing is allocated for the images."""
        images = _images(description or self.description, rows)
        full = np.ones((rows, length), np.int32)
        return PromptBatch([str(row) for row in range(rows)], full, full.astype(bool), images)

    def training(self) -> Iterator[Program]:
        """One optimizer step on rows of full length."""
        recipe, mesh = self.recipe, self.mesh
        config = without_free_settings(recipe.train)
        kept: dict[str, Any] = {}
        described = self.model(adapters=True)

        def parts(state: Any) -> Any:
            model = nnx.merge(nnx.split(described)[0], state)
            kept["partition"], trainable, frozen = split_model(model, config)
            return trainable, frozen

        trainable, frozen = jax.eval_shape(parts, nnx.state(described))
        objective = objective_of(config)
        answers, compute_reference = objective.answers, objective.computes_reference
        assert answers is not None
        step = make_step(
            kept["partition"],
            trainable,
            config,
            total_steps=100,
            mesh=mesh,
            remat=recipe.model.remat,
            compute_reference=compute_reference,
        )
        state = step.describe(trainable)
        frozen = describe_on(frozen, state_shardings(frozen, mesh))
        base = state.trainable if compute_reference else None
        rows = config.batch_size
        longest = config.max_answer_tokens
        batch = TreeBatch(
            prefix_ids=np.ones((rows, self.length), np.int32),
            prefix_mask=np.ones((rows, self.length), bool),
            images=_images(self.description, rows),
            branch_ids=np.ones((rows, answers, longest), np.int32),
            branch_mask=np.ones((rows, answers, longest), bool),
            reference=np.zeros((rows, answers), np.float32),
            row_index=np.zeros(rows, np.int32),
        )
        cost = step_cost(described, set(trainable))
        assert cost is not None
        flops = cost.flops(
            np.full(rows, self.length),
            np.full((rows, answers), longest),
            image_tokens=rows * cost.image_tokens,
            cached_images=False,
            reference=compute_reference,
        )
        arguments = (state, frozen, base, shard_batch(batch, mesh))
        # The starting values of what learns stay in memory: the policy's own copy.
        beside = _bytes_a_chip(state.trainable)
        yield self.compiled("train", "step", step.jitted, arguments, beside, flops=flops)

    def compiled(
        self, stage: str, name: str, function: Any, arguments: Any, beside: int, *, flops: float, read: float = 0.0
    ) -> Program:
        """Compiles; `flops` are of all chips, `read` are bytes of each."""
        seconds, bound = None, ""
        if self.chip is not None and self.peak is not None:
            times = {"arithmetic": flops / self.peak, "memory bandwidth": read / self.chip.bandwidth}
            bound = max(times, key=lambda key: times[key])
            seconds = times[bound]
        try:
            with use_mesh(self.mesh):
                memory = function.lower(*arguments).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            problem = _exhausted(str(error))
            if problem is None:
                raise
            return Program(stage, name, 0, 0, 0, beside, seconds, bound, problem)
        written_in_place = memory.alias_size_in_bytes
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - written_in_place
        temporaries = memory.temp_size_in_bytes
        return Program(
            stage, name, memory.argument_size_in_bytes, temporaries, held + temporaries, beside, seconds, bound
        )


def _exhausted(message: str) -> str | None:
    """The compiler's refusal in short; None where the error is another."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    alone = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    used = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    usage = alone or used
    if usage is None:
        return message.strip().splitlines()[0]
    return f"{'temporaries alone take ' if alone else ''}{usage[1]}iB of {usage[2]}iB"
