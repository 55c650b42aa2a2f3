"""LLaVA-1.5 (Liu et al., arXiv:2310.03744): a CLIP tower, a two-layer projector and a text decoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import Images
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import Positions, place_features, text_positions
from m3po_jax.models.layers import ACTIVATIONS, Linear
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.vit import VisionTransformer

# The name of an image's pixels.
PIXELS = "pixels"


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
    """A `VisionLanguageModel`; an image's one float array is its ``pixels`` [1, h, w, 3]."""

    def __init__(self, config: LlavaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.vision_tower = VisionTransformer(config.vision, **kinds)
        self.projector = Projector(config, **kinds)
        self.decoder = Decoder(config.text, **kinds)

    def _features(self, pixels: Float[Array, "images h w 3"], remat: str = "none") -> Float[Array, "images n v"]:
        features = self.vision_tower.features(pixels, self.config.vision_feature_layers, remat=remat)
        return features if self.config.keep_class_token else features[:, 1:]

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """The tower's features, before the projector."""
        pixels = images[PIXELS]
        features = self._features(pixels.reshape(-1, *pixels.shape[2:]), remat)
        return features.reshape(pixels.shape[0], -1, features.shape[-1])

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "1 f v"]:
        """All images are alike: one is encoded."""
        side = self.config.vision.image_size
        one = self._features(jnp.zeros((1, side, side, 3)))
        return jnp.tile(one, (1, tokens // one.shape[1], 1))

    def embed_prompts(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"] | None
    ) -> Float[Array, "b s d"]:
        """Token embeddings with the row's projected features put in place of its image ids, in order."""
        is_image = token_ids == self.config.image_token_id
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, token_ids))
        return x if features is None else place_features(x, is_image, self.projector(features).astype(x.dtype))

    def prompt_positions(self, token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], layout: Images) -> Positions:
        """One by one, images' tokens too."""
        return text_positions(mask)


def build(config: LlavaConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Llava:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Llava(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
