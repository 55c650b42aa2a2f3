"""Qwen2.5-VL (Bai et al., arXiv:2502.13923): a tower for images of any size, a merger and a Qwen2 decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import Images
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import Positions, place_features
from m3po_jax.models.layers import Linear, RMSNorm
from m3po_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TowerConfig
from m3po_jax.models.qwen2_5_vl.grids import grid_positions
from m3po_jax.models.qwen2_5_vl.tower import NORM_EPS, VisionTower

# The names of an image's pixels, and of its size in patches.
PATCHES, GRID = "patches", "grid"


class Merger(nnx.Module):
    """The patches of an image token, each normalised, together to the decoder's width."""

    def __init__(self, config: TowerConfig, width: int, *, rngs: nnx.Rngs, **kinds: Any):
        w = config.feature_width
        self.ln_q = RMSNorm(config.hidden_size, eps=NORM_EPS, **kinds)
        self.linear_1 = Linear(w, w, axes=("embed", "mlp"), use_bias=True, rngs=rngs, **kinds)
        self.linear_2 = Linear(w, width, axes=("mlp", "embed"), use_bias=True, rngs=rngs, **kinds)
        self.patch_width = config.hidden_size

    def __call__(self, features: Float[Array, "b u w"]) -> Float[Array, "b u d"]:
        """Each image token on its own."""
        x = self.ln_q(features.reshape(*features.shape[:2], -1, self.patch_width)).reshape(features.shape)
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class PatchModel(nnx.Module):
    """What the models of this line share. An image's one float array is its ``patches`` [n, 3·p·p], in units of an
    image token, and its ``grid`` [1, 2] says how many patches high and wide it is."""

    config: Any
    vision_tower: Any
    projector: Any
    decoder: Decoder

    def project(self, features: Float[Array, "b f v"]) -> Float[Array, "b f d"]:
        """What takes the places of image tokens; features of the decoder's first layers lie behind it."""
        return self.projector(features[..., : self.config.vision.feature_width])

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """Of all patches of the batch, those of one image among themselves."""
        return self.vision_tower(images[PATCHES], images[GRID], remat=remat)

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "b f v"]:
        """Those of patches of zeros: what stands at a place depends on the image's size."""
        grid, vision = layout[GRID], self.config.vision
        return self.vision_tower(jnp.zeros((grid.shape[0], tokens * vision.unit, vision.pixels_of_patch)), grid)

    def embed_prompts(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"] | None
    ) -> Float[Array, "b s d"]:
        """Token embeddings with the row's merged features put in place of its image ids, in order."""
        is_image = token_ids == self.config.image_token_id
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, token_ids))
        return x if features is None else place_features(x, is_image, self.project(features).astype(x.dtype))

    def prompt_positions(self, token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], layout: Images) -> Positions:
        """Time, height and width, see `grid_positions`."""
        is_image = token_ids == self.config.image_token_id
        return grid_positions(is_image, mask, layout.get(GRID), self.config.vision.merge)


class Qwen25VL(PatchModel):
    """A `VisionLanguageModel`; a feature is a unit's patches after the tower, side by side."""

    def __init__(self, config: Qwen25VLConfig, *, rngs: nnx.Rngs, **kinds: Any):
        self.config = config
        self.vision_tower = VisionTower(config.vision, rngs=rngs, **kinds)
        self.projector = Merger(config.vision, config.text.hidden_size, rngs=rngs, **kinds)
        self.decoder = Decoder(config.text, rngs=rngs, **kinds)


def build(config: Qwen25VLConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> Qwen25VL:
    """A randomly initialised model; under `nnx.eval_shape` the abstract tree that loading and sharding use."""
    return Qwen25VL(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
