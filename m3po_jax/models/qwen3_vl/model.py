"""Qwen3-VL, dense: its tower, a merger, and a Qwen3 decoder whose first layers get more of the tower (DeepStack)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import place_features
from m3po_jax.models.qwen2_5_vl.model import PatchModel
from m3po_jax.models.qwen3_vl.config import Qwen3VLConfig
from m3po_jax.models.qwen3_vl.tower import Merger, VisionTower


class Qwen3VL(PatchModel):
    """A `VisionLanguageModel`; a feature is a unit's patches after the tower, side by side, and what is added to its
    token's states after each of the decoder's first layers."""

    def __init__(self, config: Qwen3VLConfig, *, rngs: nnx.Rngs, **kinds: Any):
        self.config = config
        self.vision_tower = VisionTower(config.vision, rngs=rngs, **kinds)
        self.projector = Merger(config.vision, config.text.hidden_size, together=False, rngs=rngs, **kinds)
        self.decoder = Decoder(config.text, rngs=rngs, **kinds)

    def injected_states(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"]
    ) -> Float[Array, "l b s d"]:
        """Zeros everywhere but at image tokens."""
        is_image = token_ids == self.config.image_token_id
        deep = jnp.split(features[..., self.config.vision.feature_width :], self.config.text.injected_layers, axis=-1)
        zeros = jnp.zeros((*token_ids.shape, deep[0].shape[-1]), features.dtype)
        return jnp.stack([place_features(zeros, is_image, y) for y in deep])


def build(config: Qwen3VLConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Qwen3VL:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Qwen3VL(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
