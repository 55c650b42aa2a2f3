"""The decoder's weights as generation wants them: layers apart, products fused, kernels output-major.

Layers are unstacked once, before any loop, so that no step slices weights. Queries, keys and values are one product
and so are gate and up, because a decode step is a handful of rows against every weight.

Shape suffixes: G key/value heads, R query heads of each, D head width, E model width, F MLP width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m3po_jax.hosts.sharding import constrain
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.decoder_layer import Pick
from m3po_jax.models.layers import Linear, matmul_precision
from m3po_jax.models.quantization import Codes, Weight
from m3po_jax.models.quantization import product as quantized_product

FEW_ROWS = 64  # up to which a product on CPUs has the weight on its left
Adapter = tuple[jax.Array, jax.Array]


class FusedLayer(NamedTuple):
    """One layer's weights in the computation's dtype: the `LayerWeights` of generation.

    A kernel's inputs are its last axis. Codes are as `models/quantization.py` has them, inputs first.

    Attributes:
        gains: By the norm's name.
        biases: By the projection's name.
        adapters: (A, α/r · B) by the projection's name.
    """

    qkv_kernel: Weight  # (g, r + 2, d, e)
    out_kernel: Weight  # (e, gd)
    gate_up_kernel: Weight  # (2, f, e)
    down_kernel: Weight  # (e, f)
    gains: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    adapters: dict[str, Adapter]

    def gain(self, norm: str) -> Float[Array, " e_or_d"]:
        """See `LayerWeights`, as for the others."""
        return self.gains[norm]

    def queries_keys_values(self, x: Float[Array, "b s e"], pick: Pick) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One product, of which `pick` takes the tokens that have queries."""
        y = product(x, self.qkv_kernel)
        q = self._completed("q_proj", x, y[..., :-2, :])
        k, v = self._completed("k_proj", x, y[..., -2, :]), self._completed("v_proj", x, y[..., -1, :])
        return pick(q.reshape(*q.shape[:2], -1, q.shape[-1])), k, v

    def output(self, attended: Float[Array, "b q hd"]) -> Float[Array, "b q e"]:
        """One product."""
        return self._completed("o_proj", attended, product(attended, self.out_kernel))

    def gate_and_up(self, x: Float[Array, "b q e"]) -> tuple[Float[Array, "b q f"], Float[Array, "b q f"]]:
        """One product."""
        both = product(x, self.gate_up_kernel)
        return self._completed("gate_proj", x, both[..., 0, :]), self._completed("up_proj", x, both[..., 1, :])

    def down(self, x: Float[Array, "b q f"]) -> Float[Array, "b q e"]:
        """One product."""
        return self._completed("down_proj", x, product(x, self.down_kernel))

    def _completed(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y` plus the bias and the low-rank product of the projection called `name`, in y's shape."""
        if name in self.biases:
            y = y + self.biases[name].reshape(y.shape[2:])
        if name not in self.adapters:
            return y
        a, b = self.adapters[name]
        exact = matmul_precision(x.dtype)
        return y + jnp.matmul(jnp.matmul(x, a, precision=exact), b, precision=exact).reshape(y.shape)


def _adapter(linear: Linear) -> Adapter | None:
    if linear.lora_a is None or linear.lora_scale == 0.0:
        return None
    b = linear.lora_scale * linear.lora_b[...].astype(jnp.float32)
    return linear.lora_a[...].astype(linear.dtype), b.astype(linear.dtype)


def _placed(weight: Weight, dtype: Any, *axes: str | None) -> Weight:
    """A kernel (in, ...) output-major in the computation's dtype, or its codes as they are.

    They lie on the devices that `axes` say, which are the kernel's as it is given.
    """
    if not isinstance(weight, Codes):
        return constrain(jnp.moveaxis(weight.astype(dtype), 0, -1), *axes[1:], axes[0])
    # int8's scale lacks the first axis.
    return Codes(*(constrain(x, *axes[len(axes) - x.ndim :]) for x in weight))


def fuse(decoder: Decoder) -> tuple[FusedLayer, ...]:
    """Every layer's weights, unstacked and fused; meant for `jax.jit` under the mesh of the model."""
    c, dtype = decoder.config, decoder.dtype
    graph, state = nnx.split(decoder.layers)

    def one(index: int) -> FusedLayer:
        layer = nnx.merge(graph, jax.tree.map(lambda x: x[index], state))
        attention, mlp = layer.attention, layer.mlp
        # Codes and their scales are arranged alike, by their last axes.
        heads = lambda x: x.reshape(*x.shape[:-1], c.num_kv_heads, -1, c.head_dim)  # noqa: E731
        qkv = jax.tree.map(
            lambda *parts: jnp.concatenate([heads(x) for x in parts], axis=-2),
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
        )
        gate_up = jax.tree.map(lambda *parts: jnp.stack(parts, axis=-2), mlp.gate_proj.weight, mlp.up_proj.weight)
        linears: dict[str, Linear] = {
            name: getattr(part, name)
            for part, names in (
                (attention, ("q_proj", "k_proj", "v_proj", "o_proj")),
                (mlp, ("gate_proj", "up_proj", "down_proj")),
            )
            for name in names
        }
        return FusedLayer(
            _placed(qkv, dtype, "embed", "kv_heads", None, None),
            _placed(attention.o_proj.weight, dtype, "heads", "embed"),
            _placed(gate_up, dtype, "embed", None, "mlp"),
            _placed(mlp.down_proj.weight, dtype, "mlp", "embed"),
            {norm: layer.gain(norm) for norm in c.norms},
            {name: linear.bias[...].astype(dtype) for name, linear in linears.items() if linear.bias is not None},
            {name: pair for name, linear in linears.items() if (pair := _adapter(linear)) is not None},
        )

    return tuple(one(index) for index in range(c.num_layers))


def _on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    """As `_product`, written so that the weight is read where it lies.

    Of products with more than two axes XLA's CPU compiler copies the right side into another order first. Against a
    handful of rows the weight is fastest as the left side: the right side is packed into blocks, weights of every
    token included. The barrier is there because the compiler would swap the sides back, to spare itself the small
    transposition.
    """
    rows, outputs = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
    few = rows.shape[0] <= FEW_ROWS
    y = jax.lax.optimization_barrier(_product(outputs, rows)).T if few else _product(rows, outputs)
    return y.reshape(*x.shape[:-1], *w.shape[:-1])


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    contracted = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, w, contracted, precision=matmul_precision(x.dtype))


def product(x: Float[Array, "... i"], weight: Weight) -> jax.Array:
    """Activations [..., in] times one of a `FusedLayer`'s weights: [..., *out].

    The only place in generation where the arrangement of a computation depends on the platform.
    """
    if isinstance(weight, Codes):
        outputs = "pqr"[: weight.codes.ndim - 1]
        equation = f"...i,i{outputs}->...{outputs}"
        return quantized_product(equation, x, weight, precision=matmul_precision(x.dtype))
    with jax.named_scope("products"):
        return jax.lax.platform_dependent(x, weight, cpu=_on_cpu, default=_product)
