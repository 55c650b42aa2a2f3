"""A tiny LLaVA, a processor for it, pairs and a recipe to train it with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_inputs import SquareImages

from m3po_jax.config import LoRAConfig, TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.schema import Prompt, message
from m3po_jax.data.tables import content_hash
from m3po_jax.models import lora
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import Llava, build
from m3po_jax.models.vit import ViTConfig

IMAGE_ID, EOS_ID, TOKENS_PER_IMAGE = 63, 2, 4
CONFIG = LlavaConfig(
    text=DecoderConfig(64, 16, 32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8),
    vision=ViTConfig("clip", EncoderConfig(16, 32, num_layers=2, num_heads=2), image_size=8, patch_size=4),
    image_token_id=IMAGE_ID,
)


class TinyProcessor(SquareImages):
    """Letters as ids; an image path is the seed of its pixels."""

    image_shape, tokens_per_image = (8, 8, 3), TOKENS_PER_IMAGE
    eos_token_ids = (EOS_ID,)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        text = [3 + ord(letter) % 60 for letter in prompt.instruction]
        return [1] + [IMAGE_ID] * TOKENS_PER_IMAGE * len(prompt.images) + text

    def encode_answer(self, text: str) -> list[int]:
        return [3 + ord(letter) % 60 for letter in text] + [EOS_ID]

    def image_keys(self, prompt: Prompt) -> list[str]:
        return [content_hash(image.path) for image in prompt.images]

    def pixel_values(self, prompt: Prompt) -> np.ndarray:
        seeds = [int(image.path or 0) for image in prompt.images]
        return np.stack([np.random.default_rng(seed).normal(size=(8, 8, 3)) for seed in seeds]).astype(np.float32)


def pair_rows(count: int, images: int = 1) -> list[dict[str, Any]]:
    """Pairs of different lengths, without recorded reference log-probs."""
    return [
        {
            "id": f"row-{i}",
            "images": [{"bytes": None, "path": str(10 * i + j)} for j in range(images)],
            "prompt": message("user", "what" + "?" * (i % 3), images=images),
            "chosen": message("assistant", "abcdef"[: 5 + i % 2] + chr(97 + i)),
            "rejected": message("assistant", "xyz"[: 1 + i % 3] + chr(97 + i)),
        }
        for i in range(count)
    ]


def tiny_model(config: TrainConfig, seed: int = 0) -> Llava:
    model = build(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, seed=seed)
    # At the usual 0.02 a model this small gives gradients that hide mistakes.
    state = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, nnx.state(model))
    nnx.update(model, state)
    if config.lora.lora_rank:
        lora.attach(model, config.lora, scope="decoder", rngs=nnx.Rngs(seed + 1))
    return model


def base_config(**changes: Any) -> TrainConfig:
    config = TrainConfig(
        lora=LoRAConfig(lora_rank=2, lora_alpha=4.0),
        learning_rate=1e-2,
        batch_size=4,
        max_steps=6,
        warmup_ratio=0.0,
        save_steps=1,
        reference="computed",
    )
    return replace(config, **changes)


def tiny_pairs(config: TrainConfig, count: int = 7, seed: int = 3, **widths: int) -> BatchSource:
    return pair_batches(pair_rows(count), TinyProcessor(), batch_size=config.batch_size, seed=seed, **widths)
