"""Loading what a stage needs: the policy, its processor, a dual encoder, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import DataConfig, EvaluateConfig, GenerateConfig, LoRAConfig, ModelConfig
from m3po_jax.data import sources
from m3po_jax.data.dual_inputs import DualEncoderProcessor
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.dual_encoder import DualEncoderConfig
from m3po_jax.models.hub import pinned
from m3po_jax.models.identity import directory_identity
from m3po_jax.models.image_family import TYPICAL_SIZE
from m3po_jax.models.processor import Processor
from m3po_jax.models.quantization import check_quantization
from m3po_jax.models.registry import Description, Loaded, load_model
from m3po_jax.pipeline.console import say


@dataclass(frozen=True)
class Policy:
    """The model that is aligned, with what turns rows into its inputs.

    Attributes:
        identity: A hash of the model directory's content and the template; part of every shard's name.
        quantization: Of the frozen layers, one of `models.quantization.QUANTIZATION`.
    """

    loaded: Loaded
    processor: Processor
    identity: str
    quantization: str = "none"

    @property
    def model(self) -> Any:
        return self.loaded.model

    def padding_for(self, prompts: Sequence[Prompt], most: int) -> Policy:
        """The policy with sizes of images chosen for these prompts, see `Processor.with_buckets`."""
        return dataclasses.replace(self, processor=self.processor.with_buckets(prompts, most))


def model_identity(model: Loaded | Description) -> str:
    """A hash of all files that a model is read from: its directory, and the one that lends it its vision tower.

    Raises:
        UserError: a file cannot be read.
    """
    tower = "" if model.tower is None else directory_identity(model.tower)
    return content_hash(directory_identity(model.directory), tower)[:16]


@dataclass(frozen=True)
class InputLimits:
    """What bounds a model's inputs beside the model itself.

    Attributes:
        max_image_pixels: A larger image is refused before it is decoded.
        longest_answer: Tokens that must have room beside an image.
    """

    max_image_pixels: int = DataConfig.max_image_pixels
    longest_answer: int = max(GenerateConfig.max_new_tokens, EvaluateConfig.max_new_tokens)

    @classmethod
    def of(cls, data: DataConfig, generate: GenerateConfig, evaluate: EvaluateConfig) -> InputLimits:
        """The limits that these sections of a recipe set."""
        return cls(data.max_image_pixels, max(generate.max_new_tokens, evaluate.max_new_tokens))


def load_policy(
    config: ModelConfig, seed: int, mesh: Mesh, limits: InputLimits, *, image_root: str | Path = "."
) -> Policy:
    """A model and its processor.

    Args:
        seed: Of random weights (`model.init`).

    Raises:
        UserError: anything wrong with the model directory, in one line.
    """
    loaded = load_model(
        pinned(config.path, config.revision),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        mesh=mesh,
        init=config.init,
        seed=seed,
        vision_tower=config.vision_tower,
        attention=config.attention,
        quantization=config.quantization,
    )
    processor = make_processor(config, loaded.description, limits, image_root=image_root)
    for note in processor.notes:
        say(note, style="yellow")
    return Policy(loaded, processor, policy_identity(config, seed, loaded), config.quantization)


def policy_identity(config: ModelConfig, seed: int, model: Loaded | Description) -> str:
    """A hash of a policy: its files (the directory's own template among them), and how it is prompted."""
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    is_rounded = jnp.dtype(config.param_dtype).itemsize < jnp.dtype(config.dtype).itemsize
    return content_hash(
        model_identity(model),
        config.init,
        seed if config.init == "random" else 0,
        config.template,
        config.image_fit,
        config.dtype,
        *([config.quantization] if config.quantization != "none" else []),
        *([config.param_dtype] if is_rounded else []),
        *(["pan and scan"] if config.pan_and_scan else []),
        *(f"{name} {limit}" for name, limit in limits.items() if limit is not None),
    )[:16]


def make_processor(
    config: ModelConfig, description: Description, limits: InputLimits, *, image_root: str | Path = "."
) -> Processor:
    """The processor of a model, whose sizes follow the configuration that the model is built from.

    Raises:
        UserError: as `Processor.from_pretrained`; no room for an answer beside an image.
    """
    processor = Processor.from_pretrained(
        description,
        config.template,
        config.image_fit,
        image_root=image_root,
        max_image_pixels=limits.max_image_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        pan_and_scan=config.pan_and_scan,
    )
    text, image = description.config.text, processor.image_reader.plan(lambda: TYPICAL_SIZE).tokens
    if image + limits.longest_answer > text.max_positions:
        raise UserError(
            f"an image's {image} tokens and an answer of {limits.longest_answer} need more positions than the model "
            f"has (max_position_embeddings {text.max_positions})",
            where="generate.max_new_tokens",
            remedy="lower it and evaluate.max_new_tokens, or take another model",
        )
    return processor


def make_dual_processor(
    description: Description,
    *,
    image_root: str | Path = ".",
    image_fit: str = "",
    max_image_pixels: int = DataConfig.max_image_pixels,
) -> DualEncoderProcessor:
    """The processor of a CLIP or SigLIP model, compared with its configuration.

    Raises:
        UserError: not such a model; as `DualEncoderProcessor.from_pretrained`.
    """
    config = description.config
    if not isinstance(config, DualEncoderConfig):
        raise UserError(
            f"a {description.family.name} model is no dual encoder",
            where=str(description.directory),
            remedy="take a CLIP or SigLIP model",
        )
    return DualEncoderProcessor.from_pretrained(
        description.directory,
        max_positions=config.text.max_positions,
        vocab_size=config.text.vocab_size,
        end_token_id=config.text.eos_token_id,
        image_size=config.vision.image_size,
        image_root=image_root,
        image_fit=image_fit,
        max_image_pixels=max_image_pixels,
    )


def check_trainable(quantization: str, adapters: LoRAConfig) -> None:
    """
    Raises:
        UserError: full fine-tuning of a quantised model, an adapter of no possible size.
    """
    check_quantization(quantization)
    lora.check(adapters)
    if quantization != "none" and adapters.lora_rank == 0:
        raise UserError(
            f"{quantization} weights are frozen, and train.lora.lora_rank = 0 would train them",
            where="model.quantization",
            remedy="set train.lora.lora_rank, or model.quantization=none",
        )


def attach_adapter(policy: Policy, adapters: LoRAConfig, seed: int) -> Any:
    """A copy of the policy's model with fresh adapters (the base weights are shared), or the model itself."""
    if adapters.lora_rank == 0:
        check_trainable(policy.quantization, adapters)
        return policy.model
    model = nnx.merge(*nnx.split(policy.model))
    with_scope = policy.loaded.family.lora_scope
    lora.attach(model, adapters, scope=with_scope, rngs=nnx.Rngs(seed))
    return model


def make_generator(
    processor: Processor, model: Any, mesh: Mesh, *, sampling: SamplingConfig, batch_size: int
) -> Generator:
    """An engine that draws answers of `model`, of which `processor` is; its programs are compiled on first use."""
    return Generator(
        model,
        eos_token_id=processor.eos_token_ids or processor.eos_token_id,
        pad_token_id=processor.pad_token_id,
        mesh=mesh,
        sampling=sampling,
        batch_size=batch_size,
        tokenizer_size=processor.text.size,
    )


def load_dual_encoder(
    path: str,
    mesh: Mesh,
    *,
    image_root: str | Path = ".",
    init: str = "pretrained",
    seed: int = 0,
    dtype: str = "float32",
    image_fit: str = "",
    max_image_pixels: int = DataConfig.max_image_pixels,
) -> tuple[Loaded, DualEncoderProcessor]:
    """A CLIP or SigLIP model and its processor, from a directory or a built-in name; parameters in float32."""
    loaded = load_model(path, dtype=dtype, param_dtype="float32", mesh=mesh, init=init, seed=seed)
    for note in loaded.description.notes:
        say(note, style="yellow")
    processor = make_dual_processor(
        loaded.description, image_root=image_root, image_fit=image_fit, max_image_pixels=max_image_pixels
    )
    return loaded, processor


def read_rows(config: DataConfig, *, require_image: bool = False) -> sources.PromptSource:
    """The rows of one data source, see `sources.read_prompts`; says what was done to them."""
    source = sources.read_prompts(config, require_image=require_image)
    for note in source.notes:
        say(note)
    return source


class Joined(Sequence[Prompt]):
    """Several sources one after another."""

    def __init__(self, parts: Sequence[sources.PromptSource]):
        self.parts = list(parts)
        self.image_root = self.parts[0].image_root
        self.offsets = [0]
        for part in self.parts:
            self.offsets.append(self.offsets[-1] + len(part))

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        for part, start, stop in zip(self.parts, self.offsets, self.offsets[1:], strict=False):
            if start <= index < stop:
                return part[index - start]
        raise IndexError(index)
