"""The pre-norm transformer encoder that CLIP's and SigLIP's towers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from m3po_jax.models.attention import Layout
from m3po_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, scan_layers, stack_layers
from m3po_jax.sharding import constrain


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder; `activation` is a key of `layers.ACTIVATIONS`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention: str = "xla"  # see `models/kernels`


class EncoderAttention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: EncoderConfig, **kinds: Any):
        d = config.hidden_size
        self.q_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.k_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.v_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.out_proj = Linear(d, d, axes=("heads", "embed"), use_bias=True, **kinds)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """[B, S, D] to [B, S, D]."""
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)  # noqa: E731
        out = layout(heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)))
        return self.out_proj(out.reshape(x.shape))


class EncoderMLP(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: EncoderConfig, **kinds: Any):
        d, f = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(d, f, axes=("embed", "mlp"), use_bias=True, **kinds)
        self.fc2 = Linear(f, d, axes=("mlp", "embed"), use_bias=True, **kinds)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"eps": config.layer_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.layer_norm1 = LayerNorm(config.hidden_size, **norm)
        self.self_attn = EncoderAttention(config, **kinds)
        self.layer_norm2 = LayerNorm(config.hidden_size, **norm)
        self.mlp = EncoderMLP(config, **kinds)

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """[B, S, D] to [B, S, D]."""
        x = constrain(x + self.self_attn(self.layer_norm1(x), layout), "batch", None, None)
        return constrain(x + self.mlp(self.layer_norm2(x)), "batch", None, None)


class Encoder(nnx.Module):
    """The layers, stacked and scanned; no embedding and no final norm."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.layers = stack_layers(lambda r: EncoderLayer(config, rngs=r, **kinds), config.num_layers, rngs)
        self.num_layers = config.num_layers

    def __call__(
        self, x: Float[Array, "b s d"], layout: Layout, *, num_layers: int | None = None, remat: str = "none"
    ) -> tuple[Float[Array, "b s d"], Float[Array, "layers b s d"]]:
        """The output of layer `num_layers` (default: all) and of every layer up to it; later layers do not run."""
        count = self.num_layers if num_layers is None else num_layers
        partial = None if count == self.num_layers else count

        def apply(layer: EncoderLayer, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = layer(x, layout)
            return x, x

        return scan_layers(self.layers, apply, x, remat=remat, count=partial)
