"""Gemma 3 (arXiv:2503.19786): a SigLIP tower, means of its patches, a decoder whose image tokens see each other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import Images
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import Positions, place_features, text_positions
from m3po_jax.models.gemma3.config import Gemma3Config
from m3po_jax.models.layers import RMSNorm, matmul_precision
from m3po_jax.models.vit import VisionTransformer

# The name of an image's pixels.
PIXELS = "pixels"


class Projector(nnx.Module):
    """A norm and a matrix: means of patches to the decoder's width.

    The matrix is no linear layer in transformers either, so that PEFT puts no adapter beside it.
    """

    def __init__(self, config: Gemma3Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        width, out = config.vision.encoder.hidden_size, config.text.hidden_size
        eps = config.vision.encoder.layer_norm_eps
        self.norm = RMSNorm(width, eps=eps, dtype=dtype, param_dtype=param_dtype, offset=1.0)
        kernel = width**-0.5 * jax.random.normal(rngs.params(), (width, out), jnp.float32)
        self.input_projection = nnx.Param(kernel.astype(param_dtype), axes=("mlp", "embed"))
        self.dtype = dtype

    def __call__(self, features: Float[Array, "... v"]) -> Float[Array, "... d"]:
        """Each feature on its own."""
        kernel = self.input_projection[...].astype(self.dtype)
        return jnp.matmul(self.norm(features), kernel, precision=matmul_precision(self.dtype))


class Gemma3(nnx.Module):
    """A `VisionLanguageModel`; an image's one float array is its ``pixels`` [n, h, w, 3]: itself, then its crops."""

    def __init__(self, config: Gemma3Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.vision_tower = VisionTransformer(config.vision, pooled=False, **kinds)
        self.projector = Projector(config, **kinds)
        self.decoder = Decoder(config.text, **kinds)

    def _features(self, pixels: Float[Array, "images h w 3"], remat: str = "none") -> Float[Array, "images n v"]:
        """The tower's normed states, each the mean of a square of patches; what is left over at the edges is not
        read, as by transformers' pooling."""
        states, _ = self.vision_tower(pixels, remat=remat)
        side, patches = self.config.tokens_per_side, self.config.vision.image_size // self.config.vision.patch_size
        window = patches // side
        grid = states.reshape(-1, patches, patches, states.shape[-1])[:, : side * window, : side * window]
        squares = grid.reshape(-1, side, window, side, window, states.shape[-1]).astype(jnp.float32)
        return squares.mean(axis=(2, 4)).astype(states.dtype).reshape(-1, side**2, states.shape[-1])

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """The tower's pooled features, before the projector."""
        pixels = images[PIXELS]
        features = self._features(pixels.reshape(-1, *pixels.shape[2:]), remat)
        return features.reshape(pixels.shape[0], -1, features.shape[-1])

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "1 f v"]:
        """All images and crops are alike: one is encoded."""
        side = self.config.vision.image_size
        one = self._features(jnp.zeros((1, side, side, 3)))
        return jnp.tile(one, (1, -(-tokens // one.shape[1]), 1))

    def embed_prompts(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"] | None
    ) -> Float[Array, "b s d"]:
        """Scaled token embeddings, with the row's projected features, unscaled, in the places of its image ids."""
        is_image = token_ids == self.config.image_token_id
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, token_ids))
        return x if features is None else place_features(x, is_image, self.projector(features).astype(x.dtype))

    def prompt_positions(self, token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], layout: Images) -> Positions:
        """One by one, images' tokens too."""
        return text_positions(mask)


def build(config: Gemma3Config, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Gemma3:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Gemma3(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
