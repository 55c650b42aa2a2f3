"""The arithmetic of one decoder layer, once for training, scoring, prefill and decoding.

How a layer's weights lie (`LayerWeights`) and which keys its queries meet (`attend`) is the caller's matter: training
and scoring run one linear layer a projection (`decoder.py`), generation fused products and caches (`inference/`).

Shape suffixes: B rows, S tokens, Q tokens that have queries, H query heads, G key/value heads, D head width, E model
width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.layers import ACTIVATIONS, rms_norm
from m3po_jax.models.rotary_scaling import RotaryScaling

Rotary = tuple[Float[Array, "b s 1 d"], Float[Array, "b s 1 d"]]
Pick = Callable[[jax.Array], jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def rotary_tables(
    positions: Int[Array, "b s *axes"],
    head_dim: int,
    theta: float,
    axes: tuple[int, ...] = (),
    scaling: RotaryScaling | None = None,
) -> Rotary:
    """cos and sin of the rotary embedding (Su et al., arXiv:2104.09864), in the half-split order of Hugging Face.

    Args:
        positions: One number a token, or one for each axis.
        axes: The axis that each of the D/2 frequencies turns by, where there are several.
    """
    frequencies: Any = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        plain = np.float32(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
        frequencies = jnp.asarray(scaling.frequencies(plain, theta), jnp.float32)
    steps = positions[..., None] if positions.ndim == 2 else positions[..., jnp.asarray(axes)]
    angles = steps.astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    if scaling is None or scaling.magnitude == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return scaling.magnitude * jnp.cos(angles), scaling.magnitude * jnp.sin(angles)


def rotary_of_kinds(config: DecoderConfig, positions: Int[Array, "b s *axes"]) -> tuple[Rotary, ...]:
    """The `rotary_tables` of every one of `config.kinds`; those that are alike are computed once."""
    tables = {
        (theta, scaling): rotary_tables(positions, config.head_dim, theta, config.rotary_axes, scaling)
        for theta, scaling in dict.fromkeys(kind.rotary for kind in config.kinds)
    }
    return tuple(tables[kind.rotary] for kind in config.kinds)


def apply_rotary(x: Float[Array, "b s h d"], tables: Rotary, scale: float = 1.0) -> Float[Array, "b s h d"]:
    """Queries or keys turned by the `rotary_tables` of their positions, in float32; the dtype stays.

    Args:
        scale: Factor of the result, before it is rounded to the dtype.
    """
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    turned = x * cos + rotated * sin
    return (turned if scale == 1.0 else scale * turned).astype(x.dtype)


class LayerWeights(Protocol):
    """One layer's linear maps, biases and adapters included, and the gains of its norms."""

    def gain(self, norm: str) -> Float[Array, " e_or_d"]:
        """Of one of `DecoderConfig.norms`, `norm_offset` included, see `layers.RMSNorm`."""

    def queries_keys_values(self, x: Float[Array, "b s e"], pick: Pick) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, Q, H, D] of the tokens that `pick` takes, keys and values [B, S, G, D] of all."""

    def output(self, attended: Float[Array, "b q hd"]) -> Float[Array, "b q e"]:
        """The heads' results, side by side, back in the model's width."""

    def gate_and_up(self, x: Float[Array, "b q e"]) -> tuple[Float[Array, "b q f"], Float[Array, "b q f"]]:
        """What the activation is applied to, and what that is multiplied with."""

    def down(self, x: Float[Array, "b q f"]) -> Float[Array, "b q e"]:
        """From the MLP's width to the model's."""


def decoder_layer(
    config: DecoderConfig,
    weights: LayerWeights,
    x: Float[Array, "b s e"],
    rotary: Rotary,
    attend: Attend,
    *,
    pin: Pick,
    pick: Pick = lambda x: x,
) -> Float[Array, "b q e"]:
    """x + attention(norm(x)), then x + down(act(gate(norm(x))) · up(norm(x))) (Shazeer, arXiv:2002.05202).

    With `norms_of_results` it is x + norm(attention(norm(x))), and the same of the MLP (Gemma 2, arXiv:2408.00118).
    With `norms_of_heads` every query and key is normalised on its own (Dehghani et al., arXiv:2302.05442, as Qwen3
    has it: RMS, one gain for all heads). Attention divides by √D; another `query_scale` goes into the queries.

    Args:
        rotary: Tables of the positions of all tokens, of this layer's kind.
        attend: Rotated queries [B, Q, H, D] and keys, and values [B, S, G, D], to [B, Q, H, D] or [B, Q, H·D].
        pin: Says where the residual stream lies on the devices.
        pick: Takes, from an array of all tokens, those whose states are needed after the layer.
    """

    def norm(name: str, y: jax.Array) -> jax.Array:
        return rms_norm(y, weights.gain(name), config.rms_norm_eps).astype(y.dtype)

    q, k, v = weights.queries_keys_values(norm("input_norm", x), pick)
    if config.norms_of_heads:
        q, k = norm("q_norm", q), norm("k_norm", k)
    scale = 1.0 if config.query_scale is None else config.query_scale * config.head_dim**0.5
    attended = attend(apply_rotary(q, jax.tree.map(pick, rotary), scale), apply_rotary(k, rotary), v)
    result = weights.output(attended.reshape(*attended.shape[:2], -1))
    x = pin(pick(x) + (norm("attention_result_norm", result) if config.norms_of_results else result))
    gate, up = weights.gate_and_up(norm("post_attention_norm", x))
    result = weights.down(ACTIVATIONS[config.activation](gate) * up)
    return pin(x + (norm("mlp_result_norm", result) if config.norms_of_results else result))
