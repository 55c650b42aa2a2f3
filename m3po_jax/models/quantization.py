"""Frozen kernels in 8 or 4 bits: codes and scales, and the product that uses them.

- ``int8``: symmetric, one scale an output channel: W ≈ codes · scale, scale = max|W| / 127.
- ``nf4``: QLoRA's NormalFloat (Dettmers et al., arXiv:2305.14314, section 3 and appendix E): blocks of 64 inputs of
  one output share max|W|; two codes a byte, the earlier one in the high bits, as bitsandbytes packs them.

Codes and scales are variables of their own type: nothing trains, decays or averages them. Kernels here are
(in, ...), stacked layers have been taken apart; int8's scale has the kernel's shape without its first axis, nf4's
has one entry for 64 inputs.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from m3po_jax.config import ModelConfig
from m3po_jax.reading import check_value

QUANTIZATION = ("none", "int8", "nf4")
BLOCK = 64  # inputs that share a scale in nf4

# Quantiles of N(0, 1), scaled to [−1, 1] and with an exact zero; bitsandbytes' values.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Quantized(nnx.Variable):
    """Codes or scales of a frozen kernel."""


class Codes(NamedTuple):
    """A kernel (in, ...) in few bits; the type of `codes` tells which kind."""

    codes: Int8[Array, "in ..."] | UInt8[Array, "pairs ..."]
    scale: Float[Array, ...]


Weight = jax.Array | Codes


def check_quantization(kind: str) -> None:
    """Raises UserError unless `kind` is one of `QUANTIZATION`."""
    check_value(ModelConfig, "quantization", kind, "model")


def kind_of(codes: Any) -> str:
    """``int8`` or ``nf4``, by the type of the codes."""
    return "int8" if codes.dtype == jnp.int8 else "nf4"


def kernel_shape(codes: Any) -> tuple[int, ...]:
    """The shape of the kernel that stacked codes stand for."""
    *layers, rows, out = codes.shape
    return (*layers, rows if kind_of(codes) == "int8" else 2 * rows, out)


def applies(kind: str, fan_in: int) -> bool:
    """Whether a kernel of this many inputs can be quantised; the few that cannot stay as they are."""
    return kind == "int8" or (kind == "nf4" and fan_in % BLOCK == 0)


def quantize(kernel: Float[Array, "in out"], kind: str) -> Codes:
    """The nearest codes; each element's error is at most half a step of its scale."""
    w = kernel.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(w), axis=0) / 127.0
        return Codes(jnp.round(w / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale)
    blocks = w.reshape(w.shape[0] // BLOCK, BLOCK, -1)
    scale = jnp.max(jnp.abs(blocks), axis=1)
    unit = blocks / jnp.where(scale == 0, 1.0, scale)[:, None]
    codes = jnp.zeros(unit.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes = codes + (unit > (low + high) / 2).astype(jnp.uint8)
    pairs = codes.reshape(w.shape[0] // 2, 2, -1)
    return Codes(pairs[:, 0] << 4 | pairs[:, 1], scale)


def _look_up(codes: jax.Array, dtype: Any) -> jax.Array:
    """NF4[codes] by a tree of selections: vector units have no fast gather."""
    values = [jnp.asarray(value, dtype) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dequantize(weight: Codes, dtype: Any) -> Float[Array, "in *out"]:
    """The kernel that the codes stand for."""
    codes, scale = weight
    if kind_of(codes) == "int8":
        return codes.astype(dtype) * scale.astype(dtype)
    out = codes.shape[1:]
    both = jnp.stack([codes >> 4, codes & 15], axis=1)  # (in / 2, 2, out)
    unit = _look_up(both, dtype).reshape(scale.shape[0], BLOCK, *out)
    return (unit * scale.astype(dtype)[:, None]).reshape(-1, *out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, precision: Any, x: jax.Array, weight: Codes) -> jax.Array:
    codes, scale = weight
    if kind_of(codes) == "int8":
        # A scale belongs to an output: it multiplies the product, and the codes enter it as they are.
        return jnp.einsum(equation, x, codes.astype(x.dtype), precision=precision) * scale.astype(x.dtype)
    return jnp.einsum(equation, x, dequantize(weight, x.dtype), precision=precision)


def _forward(equation: str, precision: Any, x: jax.Array, weight: Codes) -> tuple[jax.Array, Codes]:
    # What is kept for the gradient are the codes: autodiff would keep the kernel that they stand for.
    return _product(equation, precision, x, weight), weight


def _backward(equation: str, precision: Any, weight: Codes, g: jax.Array) -> tuple[jax.Array, None]:
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    codes, scale = weight
    if kind_of(codes) == "int8":
        g, kernel = g * scale.astype(g.dtype), codes.astype(g.dtype)
    else:
        kernel = dequantize(weight, g.dtype)
    return jnp.einsum(f"{out},{right}->{left}", g, kernel, precision=precision), None


_product.defvjp(_forward, _backward)


def product(equation: str, x: jax.Array, weight: Weight, *, precision: Any) -> jax.Array:
    """An einsum of activations and a weight, quantised or not, in x's type; gradients reach `x` through codes.

    The weight's axes after its inputs must be the last of the result.
    """
    if isinstance(weight, Codes):
        return _product(equation, precision, x, weight)
    return jnp.einsum(equation, x, weight, precision=precision)
