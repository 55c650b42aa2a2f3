"""The tower of Qwen2.5-VL: patches of images of any size, windows in most layers, full attention in a few.

Shape suffixes: B rows, N patches of a row, U image tokens of a row (N / m²), E the tower's width, H heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3po_jax.hosts.sharding import constrain
from m3po_jax.models.decoder_layer import Rotary, apply_rotary
from m3po_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, scan_layers, stack_layers
from m3po_jax.models.packed_attention import local_attention, packed_attention
from m3po_jax.models.qwen2_5_vl.config import TowerConfig
from m3po_jax.models.qwen2_5_vl.grids import axial_rotary, patch_places, patch_segments, units_of, windows_of

NORM_EPS = 1e-6  # of every norm of the tower, whatever the configuration says


class PatchEmbedding(nnx.Module):
    """The published convolution over frames, rows and columns, as one product for each patch."""

    def __init__(self, config: TowerConfig, *, use_bias: bool = False, **kinds: Any):
        inputs = config.pixels_of_patch * config.frames
        self.proj = Linear(inputs, config.hidden_size, axes=("patch", "embed"), use_bias=use_bias, **kinds)
        self.frames = config.frames

    def __call__(self, patches: Float[Array, "b n p"]) -> Float[Array, "b n e"]:
        """Patches of one frame, (channel, row, column), which is repeated."""
        of_channel = patches.reshape(*patches.shape[:2], 3, 1, -1)
        repeated = jnp.broadcast_to(of_channel, (*of_channel.shape[:3], self.frames, of_channel.shape[-1]))
        return self.proj(repeated.reshape(*patches.shape[:2], -1))


class TowerAttention(nnx.Module):
    """Self-attention with rotary positions; one product makes queries, keys and values, as it is published."""

    def __init__(self, config: TowerConfig, **kinds: Any):
        d = config.hidden_size
        self.qkv = Linear(d, 3 * d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.proj = Linear(d, d, axes=("heads", "embed"), use_bias=True, **kinds)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "b n e"], rotary: Rotary, attend: Any) -> Float[Array, "b n e"]:
        """`attend` takes turned queries and keys, and values [B, N, H, D]."""
        q, k, v = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(attend(apply_rotary(q, rotary), apply_rotary(k, rotary), v).reshape(x.shape))


class GatedMLP(nnx.Module):
    """down(act(gate(x)) · up(x)), with biases."""

    def __init__(self, config: TowerConfig, **kinds: Any):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, axes=("embed", "mlp"), use_bias=True, **kinds)
        self.up_proj = Linear(d, f, axes=("embed", "mlp"), use_bias=True, **kinds)
        self.down_proj = Linear(f, d, axes=("mlp", "embed"), use_bias=True, **kinds)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b n e"]) -> Float[Array, "b n e"]:
        """Each patch on its own."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class TowerLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `norm` and `mlp` are the family's kinds."""

    def __init__(self, config: TowerConfig, norm: Any, mlp: Any, *, rngs: nnx.Rngs, **kinds: Any):
        self.norm1 = norm(config.hidden_size, eps=NORM_EPS, **kinds)
        self.attn = TowerAttention(config, rngs=rngs, **kinds)
        self.norm2 = norm(config.hidden_size, eps=NORM_EPS, **kinds)
        self.mlp = mlp(config, rngs=rngs, **kinds)

    def __call__(self, x: Float[Array, "b n e"], rotary: Rotary, attend: Any) -> Float[Array, "b n e"]:
        """See `TowerAttention` for `attend`."""
        x = constrain(x + self.attn(self.norm1(x), rotary, attend), "batch", None, None)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None)


class VisionTower(nnx.Module):
    """Patch embedding and layers; the merger learns with the decoder and is not of it."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs, **kinds: Any):
        self.config = config
        self.patch_embed = PatchEmbedding(config, rngs=rngs, **kinds)
        layer = lambda r: TowerLayer(config, RMSNorm, GatedMLP, rngs=r, **kinds)  # noqa: E731
        self.blocks = stack_layers(layer, config.num_layers, rngs)

    def __call__(
        self, patches: Float[Array, "b n p"], grid: Int[Array, "b m 2"], *, remat: str = "none"
    ) -> Float[Array, "b u w"]:
        """The states of each image token's patches after the last layer, side by side, in the order of the images.

        Patches stand in windows while the layers run, so that a window has no gaps.
        """
        c = self.config
        units = units_of(grid, patches.shape[1] // c.unit, c.merge)
        x = self.patch_embed(patches)
        places = patch_places(units, c.merge)
        image = patch_segments(units, units.first, c.merge)
        if not c.window:
            rotary = axial_rotary(*places, c.head_dim, c.rope_theta)
            attend = lambda q, k, v: packed_attention(q, k, v, image)  # noqa: E731
            x, _ = scan_layers(self.blocks, lambda layer, x, _: (layer(x, rotary, attend), None), x, remat=remat)
            return self._by_unit(x)
        windows = windows_of(units, c.window)

        def in_windows(y: jax.Array) -> jax.Array:
            """Patches [B, N, ...] of units in the order of windows."""
            of_unit = y.reshape(y.shape[0], -1, c.unit, *y.shape[2:])
            at = windows.unit.reshape(*windows.unit.shape, *(1,) * (of_unit.ndim - 2))
            return jnp.take_along_axis(of_unit, at, axis=1).reshape(y.shape)

        x, image = in_windows(x), in_windows(image)
        rotary = axial_rotary(*map(in_windows, places), c.head_dim, c.rope_theta)
        window = jnp.repeat(windows.window, c.unit, axis=1)
        longest = c.window**2 * c.unit
        full = jnp.array([layer in c.full_layers for layer in range(c.num_layers)])

        def apply(layer: TowerLayer, x: jax.Array, is_full: jax.Array) -> tuple[jax.Array, None]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                if not c.full_layers:
                    return local_attention(q, k, v, window, longest)
                return jax.lax.cond(
                    is_full,
                    lambda q, k, v: packed_attention(q, k, v, image),
                    lambda q, k, v: local_attention(q, k, v, window, longest),
                    *(q, k, v),
                )

            return layer(x, rotary, attend), None

        x, _ = scan_layers(self.blocks, apply, x, full, remat=remat)
        return jnp.take_along_axis(self._by_unit(x), windows.place[..., None], axis=1)

    def _by_unit(self, x: Float[Array, "b n e"]) -> Float[Array, "b u w"]:
        return x.reshape(x.shape[0], -1, self.config.feature_width)
