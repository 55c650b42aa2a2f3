"""Idefics3 (arXiv:2408.12637) and SmolVLM: a SigLIP tower on tiles, pixel shuffle, a linear layer and a decoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import Images
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import Positions, place_features, text_positions
from m3po_jax.models.idefics3.config import Idefics3Config
from m3po_jax.models.layers import Linear
from m3po_jax.models.vit import VisionTransformer

# The name of an image's pixels.
PIXELS = "pixels"


class Projector(nnx.Module):
    """A linear layer: a square of patches to the decoder's width."""

    def __init__(self, config: Idefics3Config, **kinds: Any):
        self.proj = Linear(config.feature_width, config.text.hidden_size, axes=("mlp", "embed"), **kinds)

    def __call__(self, features: Float[Array, "... v"]) -> Float[Array, "... d"]:
        """Each feature on its own."""
        return self.proj(features)


class Idefics3(nnx.Module):
    """A `VisionLanguageModel`; an image's one float array is its ``pixels`` [n, h, w, 3]: its tiles, then itself."""

    def __init__(self, config: Idefics3Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.vision_tower = VisionTransformer(config.vision, pooled=False, **kinds)
        self.projector = Projector(config, **kinds)
        self.decoder = Decoder(config.text, **kinds)

    def _features(self, pixels: Float[Array, "tiles h w 3"], remat: str = "none") -> Float[Array, "tiles n v"]:
        """The tower's normed states, those of a square of patches side by side, row by row."""
        states, _ = self.vision_tower(pixels, remat=remat)
        s, width = self.config.shuffle, states.shape[-1]
        side = self.config.vision.image_size // self.config.vision.patch_size // s
        squares = states.reshape(-1, side, s, side, s, width).transpose(0, 1, 3, 2, 4, 5)
        return squares.reshape(-1, side**2, s**2 * width)

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """The tower's shuffled features, before the projector."""
        pixels = images[PIXELS]
        features = self._features(pixels.reshape(-1, *pixels.shape[2:]), remat)
        return features.reshape(pixels.shape[0], -1, features.shape[-1])

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "1 f v"]:
        """All tiles are alike: one is encoded."""
        side = self.config.vision.image_size
        one = self._features(jnp.zeros((1, side, side, 3)))
        return jnp.tile(one, (1, -(-tokens // one.shape[1]), 1))

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


def build(config: Idefics3Config, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Idefics3:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Idefics3(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
