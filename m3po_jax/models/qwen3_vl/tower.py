"""The tower of Qwen3-VL: learned positions that every image stretches, full attention, states of several layers.

Shape suffixes: as in `qwen2_5_vl/tower.py`; L layers whose states go to the decoder's first layers, E its width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3po_jax.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, scan_layers, stack_layers
from m3po_jax.models.packed_attention import packed_attention
from m3po_jax.models.qwen2_5_vl.config import TowerConfig
from m3po_jax.models.qwen2_5_vl.grids import axial_rotary, patch_places, patch_segments, units_of
from m3po_jax.models.qwen2_5_vl.tower import NORM_EPS, PatchEmbedding, TowerLayer
from m3po_jax.models.qwen3_vl.config import Qwen3TowerConfig


class PlainMLP(nnx.Module):
    """Two linear layers around an activation, with biases."""

    def __init__(self, config: TowerConfig, **kinds: Any):
        d, f = config.hidden_size, config.intermediate_size
        self.linear_fc1 = Linear(d, f, axes=("embed", "mlp"), use_bias=True, **kinds)
        self.linear_fc2 = Linear(f, d, axes=("mlp", "embed"), use_bias=True, **kinds)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b n e"]) -> Float[Array, "b n e"]:
        """Each patch on its own."""
        return self.linear_fc2(ACTIVATIONS[self.activation](self.linear_fc1(x)))


class Merger(nnx.Module):
    """The patches of an image token together to the decoder's width; normalised one by one, or `together`."""

    def __init__(self, config: TowerConfig, width: int, *, together: bool, rngs: nnx.Rngs, **kinds: Any):
        w = config.feature_width
        self.norm = LayerNorm(w if together else config.hidden_size, eps=NORM_EPS, **kinds)
        self.linear_fc1 = Linear(w, w, axes=("embed", "mlp"), use_bias=True, rngs=rngs, **kinds)
        self.linear_fc2 = Linear(w, width, axes=("mlp", "embed"), use_bias=True, rngs=rngs, **kinds)
        self.normalised_width = w if together else config.hidden_size

    def __call__(self, features: Float[Array, "b u w"]) -> Float[Array, "b u e"]:
        """Each image token on its own."""
        x = self.norm(features.reshape(*features.shape[:2], -1, self.normalised_width)).reshape(features.shape)
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, layers, and the mergers of the states that go to the decoder's first layers."""

    def __init__(self, config: Qwen3TowerConfig, *, rngs: nnx.Rngs, **kinds: Any):
        self.config = config
        self.patch_embed = PatchEmbedding(config, use_bias=True, rngs=rngs, **kinds)
        self.pos_embed = Embedding(
            config.grid_side**2, config.hidden_size, axes=("position", "norm"), rngs=rngs, **kinds
        )
        layer = lambda r: TowerLayer(config, LayerNorm, PlainMLP, rngs=r, **kinds)  # noqa: E731
        self.blocks = stack_layers(layer, config.num_layers, rngs)
        merger = lambda r: Merger(config, config.width, together=True, rngs=r, **kinds)  # noqa: E731
        self.deep_mergers = stack_layers(merger, len(config.deep_layers), rngs) if config.deep_layers else None

    def __call__(
        self, patches: Float[Array, "b n p"], grid: Int[Array, "b m 2"], *, remat: str = "none"
    ) -> Float[Array, "b u v"]:
        """Of each image token: its patches after the last layer, side by side, then what is merged of earlier ones."""
        c = self.config
        units = units_of(grid, patches.shape[1] // c.unit, c.merge)
        rows, columns = patch_places(units, c.merge)
        of_patch = lambda y: jnp.repeat(y, c.unit, axis=1) * c.merge  # noqa: E731
        x = self.patch_embed(patches)
        x = x + self._positions(rows, columns, of_patch(units.height), of_patch(units.width)).astype(x.dtype)
        image = patch_segments(units, units.first, c.merge)
        rotary = axial_rotary(rows, columns, c.head_dim, c.rope_theta)
        attend = lambda q, k, v: packed_attention(q, k, v, image)  # noqa: E731
        deep = len(c.deep_layers)
        # Where a layer's states are kept; beyond the end: nowhere.
        places = jnp.array([c.deep_layers.index(i) if i in c.deep_layers else deep for i in range(c.num_layers)])

        def apply(layer: TowerLayer, carry: Any, place: jax.Array) -> tuple[Any, None]:
            x, kept = carry
            x = layer(x, rotary, attend)
            return (x, kept.at[place].set(x, mode="drop") if deep else kept), None

        kept = jnp.zeros((deep, *x.shape), x.dtype)
        (x, kept), _ = scan_layers(self.blocks, apply, (x, kept), places, remat=remat)
        x = x.reshape(x.shape[0], -1, c.feature_width)
        if self.deep_mergers is None:
            return x
        merge = lambda merger, _, y: (None, merger(y))  # noqa: E731
        _, merged = scan_layers(self.deep_mergers, merge, None, kept.reshape(deep, *x.shape), remat=remat)
        return jnp.concatenate([x, *merged], axis=-1)

    def _positions(self, rows: jax.Array, columns: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
        """The learned table at the patches' places [B, N, D], its corners on the image's corner patches, bilinear."""
        side = self.config.grid_side

        def taps(place: jax.Array, size: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
            at = place.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)
            low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, side - 1)
            share = at - jnp.floor(at)
            return (low, 1.0 - share), (jnp.minimum(low + 1, side - 1), share)

        return sum(
            self.pos_embed(row * side + column) * (of_row * of_column)[..., None]
            for row, of_row in taps(rows, height)
            for column, of_column in taps(columns, width)
        )
