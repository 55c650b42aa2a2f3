"""Loading what a stage needs: the policy, its processor, a dual encoder, rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import DataConfig, Recipe
from m3po_jax.data import sources
from m3po_jax.data.dual_inputs import DualEncoderProcessor
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.generation.engine import Generator
from m3po_jax.generation.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.quantization import check_quantization
from m3po_jax.models.registry import Loaded, load_model, resolve_directory


@dataclass(frozen=True)
class Policy:
    """The model that is aligned, with what turns rows into its inputs.

    Attributes:
        identity: A hash of the weights' files and the template; part of every shard's name.
    """

    loaded: Loaded
    processor: Processor
    identity: str

    @property
    def model(self) -> Any:
        return self.loaded.model


def directory_identity(directory: Path) -> str:
    """A hash of a model directory: configuration by content, weights by name, size and sampled content.

    Reading a megabyte from each end of every file tells checkpoints apart without reading 14 GB.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".json", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 21:
                file.seek(-(1 << 20), 2)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def load_policy(recipe: Recipe, mesh: Mesh, *, image_root: str | Path = ".") -> Policy:
    """The recipe's model and processor.

    Raises:
        UserError: anything wrong with the model directory, in one line.
    """
    config = recipe.model
    loaded = load_model(
        config.path,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        mesh=mesh,
        init=config.init,
        seed=recipe.seed,
        vision_tower=config.vision_tower,
        attention=config.attention,
        quantization=config.quantization,
    )
    processor = Processor.from_pretrained(
        loaded.directory,
        config.template,
        config.image_fit,
        image_root=image_root,
        max_image_pixels=recipe.data.max_image_pixels,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    return Policy(loaded, processor, policy_identity(recipe))


def policy_identity(recipe: Recipe) -> str:
    """`Policy.identity` of a recipe's model, which is not loaded.

    Raises:
        UserError: there is no such model.
    """
    config = recipe.model
    tower = directory_identity(resolve_directory(config.vision_tower)) if config.vision_tower else ""
    return content_hash(
        directory_identity(resolve_directory(config.path)),
        tower,
        config.init,
        recipe.seed if config.init == "random" else 0,
        config.template,
        config.image_fit,
        config.dtype,
        *([config.quantization] if config.quantization != "none" else []),
    )[:16]


def check_trainable(recipe: Recipe) -> None:
    """
    Raises:
        UserError: full fine-tuning of a quantised model.
    """
    check_quantization(recipe.model.quantization)
    if recipe.model.quantization != "none" and recipe.train.lora.lora_rank == 0:
        raise UserError(
            f"{recipe.model.quantization} weights are frozen, and train.lora.lora_rank = 0 would train them",
            where="model.quantization",
            remedy="set train.lora.lora_rank, or model.quantization=none",
        )


def attach_adapter(policy: Policy, recipe: Recipe, mesh: Mesh) -> Any:
    """A copy of the policy's model with fresh adapters (the base weights are shared), or the model itself."""
    if recipe.train.lora.lora_rank == 0:
        check_trainable(recipe)
        return policy.model
    model = nnx.merge(*nnx.split(policy.model))
    with_scope = policy.loaded.family.lora_scope
    lora.attach(model, recipe.train.lora, scope=with_scope, rngs=nnx.Rngs(recipe.seed))
    return model


def make_generator(
    processor: Processor, model: Any, mesh: Mesh, *, sampling: SamplingConfig, batch_size: int
) -> Generator:
    """An engine that draws answers of `model`, of which `processor` is; its programs are compiled on first use."""
    return Generator(
        model,
        eos_token_id=processor.eos_token_id,
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
) -> tuple[Loaded, DualEncoderProcessor]:
    """A CLIP or SigLIP model and its processor, from a directory or a built-in name; parameters in float32."""
    loaded = load_model(path, dtype=dtype, param_dtype="float32", mesh=mesh, init=init, seed=seed)
    processor = DualEncoderProcessor.from_pretrained(
        loaded.directory,
        max_positions=loaded.config.text.max_positions,
        image_root=image_root,
        image_fit=image_fit,
    )
    return loaded, processor


def read_rows(config: DataConfig, *, require_image: bool = False) -> sources.PromptSource:
    """The rows of one data source; see `sources.read_prompts`."""
    return sources.read_prompts(config, require_image=require_image)


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
