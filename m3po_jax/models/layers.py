"""Building blocks that every model family shares.

Parameters carry their logical axes as metadata (``nnx.Param(..., axes=("embed", "heads"))``); `hosts.sharding` maps
them to the mesh. Shape suffixes: B batch, S sequence, D model width, F MLP width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from m3po_jax.models.quantization import Codes, Weight, product

M = TypeVar("M", bound=nnx.Module)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


Columns = Callable[[jax.Array, int], jax.Array]

# The name of what the ``dots`` rematerialisation keeps.
KEPT = "kept"


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products where float32 was asked for; TPUs would use one bfloat16 pass by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; the variable type is what separates adapter from base weights."""


class Linear(nnx.Module):
    """``y = x W + b``, plus ``(α/r) (x A) B`` once `lora.attach` has added the factors.

    `kernel` is (in, out). The rank-r product is computed beside the base product, so that the base weight is
    never rewritten and the reference model is the same module with `lora_scale` 0 (Hu et al., arXiv:2106.09685).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        use_bias: bool = False,
    ):
        # 1/sqrt(fan-in): 0.016 at LLaMA-7B's width, and still a signal at the widths of tiny models.
        kernel = in_features**-0.5 * jax.random.normal(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel: Any = nnx.Param(kernel.astype(param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[1:]) if use_bias else None
        self.kernel_scale: Any = nnx.data(None)  # where `quantized_base` has made codes of the kernel
        # A `LoRAParam` each, once `lora.attach` has been here; both or none.
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_scale = 0.0
        self.in_features, self.dtype = in_features, dtype

    @property
    def weight(self) -> Weight:
        """The base kernel (in, out), or the codes that stand for it."""
        if self.kernel_scale is None:
            return self.kernel[...]
        return Codes(self.kernel[...], self.kernel_scale[...])

    def __call__(self, x: Float[Array, "... in"], columns: Columns = lambda w, axis: w) -> Float[Array, "... out"]:
        """`columns` takes some of the outputs from an array, given its output axis."""
        precision = matmul_precision(self.dtype)
        x = x.astype(self.dtype)
        weight = jax.tree.map(lambda w: columns(w, -1), self.weight)  # of codes, their scales too
        if not isinstance(weight, Codes):
            weight = weight.astype(self.dtype)
        y = product("...i,io->...o", x, weight, precision=precision)
        if self.bias is not None:
            y = y + columns(self.bias[...], -1).astype(self.dtype)
        if self.lora_a is not None and self.lora_scale != 0.0:
            low = checkpoint_name(jnp.matmul(x, self.lora_a[...].astype(self.dtype), precision=precision), KEPT)
            b = columns(self.lora_b[...], -1).astype(self.dtype)
            y = y + self.lora_scale * jnp.matmul(low, b, precision=precision)
        return checkpoint_name(y, KEPT)


class Embedding(nnx.Module):
    """A table of `rows` vectors, drawn from N(0, std²), which are read `scale` times as long."""

    def __init__(
        self,
        rows: int,
        features: int,
        *,
        axes: Any,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        std: float = 0.02,
        scale: float = 1.0,
    ):
        table = std * jax.random.normal(rngs.params(), (rows, features), jnp.float32)
        self.table = nnx.Param(table.astype(param_dtype), axes=axes)
        self.dtype, self.scale = dtype, scale

    def __call__(self, ids: Int[Array, ...]) -> Float[Array, "... features"]:
        """The ids' rows, in `dtype`; ids must lie in [0, rows). The scale is rounded to the table's type."""
        rows = jnp.take(self.table[...], ids, axis=0)
        if self.scale != 1.0:
            rows = rows * jnp.asarray(self.scale, rows.dtype)
        return rows.astype(self.dtype)


def rms_norm(x: Float[Array, "... d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "... d"]:
    """x / rms(x) · g, in float32 (Zhang and Sennrich, arXiv:1910.07467), cast to the gain's type before the gain.

    The result is in the gain's type: a caller whose gain is not in the type of the computation casts it.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return gain * y.astype(gain.dtype)


def soft_capped(x: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """c · tanh(x / c), which lies within ±c (Gemma 2, arXiv:2408.00118); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nnx.Module):
    """`rms_norm` with a gain that learns: what is stored plus `offset`."""

    def __init__(self, features: int, *, eps: float, dtype: Any, param_dtype: Any, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full((features,), 1.0 - offset, param_dtype), axes=("norm",))
        self.eps, self.dtype, self.offset = eps, dtype, offset

    @property
    def gain(self) -> Float[Array, " d"]:
        """In the type of the computation; with an offset in float32, as Gemma adds and multiplies it."""
        if self.offset:
            return self.offset + self.scale[...].astype(jnp.float32)
        return self.scale[...].astype(self.dtype)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Over the last axis; the result is in `dtype`."""
        return rms_norm(x, self.gain, self.eps).astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / std · g + b over the last axis, in float32 (Ba et al., arXiv:1607.06450)."""

    def __init__(self, features: int, *, eps: float, dtype: Any, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype), axes=("norm",))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Over the last axis; the result is in `dtype`."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x.astype(self.dtype)


def stack_layers(make_layer: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """One module whose parameters hold `count` layers along a new leading axis named ``layers``."""

    @nnx.vmap
    def make(key: jax.Array) -> M:
        return make_layer(nnx.Rngs(key))

    stacked = make(jax.random.split(rngs.params(), count))
    for _, variable in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        variable.set_metadata("axes", ("layers", *variable.get_metadata()["axes"]))
    return stacked


def _no_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Everything may be kept but a layer's slice of the stacked weights, which can be sliced again."""
    return primitive.name != "dynamic_slice"


REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "none": _no_weights,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
}


def scan_layers(
    stacked: nnx.Module,
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str = "none",
    count: int | None = None,
) -> tuple[Any, Any]:
    """Runs `apply(layer, carry, x) -> (carry, y)` over the layers of `stacked`, compiled once.

    `xs` and the returned ys have a leading layer axis. `remat` names what the backward pass keeps: everything
    (``none``), nothing but each layer's input (``full``), or the results of matrix products (``dots``: of linear
    layers and of attention, whose weights are made again). `count` runs the first layers only, without a copy of
    their base weights; gradients then should be asked for adapters alone, since those of base weights would be
    added up in arrays of all layers, once for each layer.
    """
    if count is None:
        graph, state = nnx.split(stacked)
        given: Any = (state, xs)
        layer_of = lambda x: x  # noqa: E731
    else:
        graph, adapters, base = nnx.split(stacked, LoRAParam, ...)
        first = jax.tree.map(lambda x: x[:count], adapters)
        given = ((jnp.arange(count), first), xs)

        def layer_of(x: Any) -> Any:
            index, adapter = x
            at = lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False)  # noqa: E731
            return nnx.merge_state(adapter, jax.tree.map(at, base))

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer, x = inputs
        return apply(nnx.merge(graph, layer_of(layer)), carry, x)

    if remat != "none" or count is not None:
        # Under a scan the loop itself prevents the common-subexpression merging that `prevent_cse` guards against.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, given)


def layer_at(stacked: M, index: int) -> M:
    """One layer of a stacked module."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda x: x[index], state))
