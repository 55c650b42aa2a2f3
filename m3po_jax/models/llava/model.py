"""LLaVA-1.5 (Liu et al., arXiv:2310.03744): a CLIP tower, a two-layer projector and a text decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3po_jax.models.decoder import Decoder
from m3po_jax.models.layers import ACTIVATIONS, Linear
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.vit import VisionTransformer


class Projector(nnx.Module):
    """Two linear layers around an activation: tower features to the decoder's width."""

    def __init__(self, config: LlavaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs, "use_bias": config.projector_bias}
        self.linear_1 = Linear(config.feature_width, config.text.hidden_size, axes=("embed", "mlp"), **kinds)
        self.linear_2 = Linear(config.text.hidden_size, config.text.hidden_size, axes=("mlp", "embed"), **kinds)
        self.activation = config.projector_activation

    def __call__(self, features: Float[Array, "... v"]) -> Float[Array, "... d"]:
        """Each feature on its own."""
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(features)))


class Llava(nnx.Module):
    """Images and token ids in, decoder inputs out; the decoder itself is `self.decoder`."""

    def __init__(self, config: LlavaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.vision_tower = VisionTransformer(config.vision, **kinds)
        self.projector = Projector(config, **kinds)
        self.decoder = Decoder(config.text, **kinds)

    def image_features(
        self, pixel_values: Float[Array, "images h w 3"], *, remat: str = "none"
    ) -> Float[Array, "images tokens v"]:
        """What the frozen tower sees, before the projector: this is what a feature cache may keep."""
        features = self.vision_tower.features(pixel_values, self.config.vision_feature_layers, remat=remat)
        return features if self.config.keep_class_token else features[:, 1:]

    def embed_prompts(
        self,
        token_ids: Int[Array, "b s"],
        features: Float[Array, "b m n v"] | None,
    ) -> Float[Array, "b s d"]:
        """Token embeddings with the row's projected image tokens put in place of its image ids, in order.

        `features` holds each row's m images (rows with fewer are padded at the end); None for text-only batches.
        """
        is_image = token_ids == self.config.image_token_id
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, token_ids))
        if features is None:
            return x
        b, m, n, v = features.shape
        projected = self.projector(features.reshape(b, m * n, v)).astype(x.dtype)
        order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, m * n - 1)
        return jnp.where(is_image[..., None], jnp.take_along_axis(projected, order[..., None], axis=1), x)


def build(config: LlavaConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Llava:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Llava(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))


def reference_forward(
    model: Llava,
    token_ids: Int[Array, "b s"],
    mask: jax.Array,
    features: Float[Array, "b m n v"] | None,
) -> Float[Array, "b s vocab"]:
    """Plain causal logits at every position, for tests and small tools; positions count unpadded tokens."""
    from m3po_jax.models.attention import Causal

    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden = model.decoder(model.embed_prompts(token_ids, features), positions, Causal(mask.astype(bool)))
    return model.decoder.logits(hidden)
