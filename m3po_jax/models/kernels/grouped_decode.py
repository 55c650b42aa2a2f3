"""Attention of K candidates' new tokens to their prompt's prefix, whose keys and values are read once for all K.

A decode step is bound by the bytes it reads. The kernel runs over (prompt, group of heads, block of the prefix):
a block of keys and values comes into on-chip memory once and meets the queries of all K candidates, flash-style
(Dao et al., arXiv:2205.14135; for shared prefixes Juravsky et al., arXiv:2402.05099). Blocks beyond a prompt's
length are neither read nor computed.

Shape suffixes: N prompts, G key/value heads, M queries that share a head's keys (candidates × query heads of each
key/value head), P prefix tokens, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from m3po_jax.models.kernels.mesh import head_axis, per_device
from m3po_jax.models.layers import matmul_precision, soft_capped

LANES = 128
ROWS = 16  # queries are padded to whole tiles: 16 rows of bfloat16 (8 of float32 would do)
LARGEST_BLOCK = 1024  # prefix tokens
BLOCK_BYTES = 1 << 20  # of keys in flight; values take as much again, and both are double-buffered
MASKED = -1e30  # finite, so that a block without any key makes no NaN


def block_shape(heads: int, tokens: int, width: int, itemsize: int) -> tuple[int, int]:
    """(heads, tokens) of one block: as much of the prefix as fits, then as many heads.

    Transfers well under a megabyte are dominated by their start-up time.
    """
    block = min(-(-tokens // LANES) * LANES, LARGEST_BLOCK)
    if tokens > block:  # equal parts, so that the last one is not mostly empty
        block = -(-tokens // (-(-tokens // block)) // LANES) * LANES
    size = max(BLOCK_BYTES // (block * max(width, LANES) * itemsize), 1)
    return max(h for h in range(1, heads + 1) if heads % h == 0 and h <= size), block


def _kernel(
    length_N: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    scale: float,
    soft_cap: float | None,
) -> None:
    """Results stay on the chip over the blocks of a prefix, the last axis of the grid, and leave with the last."""
    block, j = k_ref.shape[2], pl.program_id(2)
    left = length_N[pl.program_id(0)] - j * block

    @pl.when(j == 0)
    def start() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(left > 0)
    def add() -> None:
        q, k, v = q_ref[0], k_ref[0], v_ref[0]
        precision = matmul_precision(q.dtype)
        product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        scores = soft_capped(scale * product(q, k, (((2,), (2,)), ((0,), (0,)))), soft_cap)  # heads, M, block
        within = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) < left
        # Beyond the length lies anything, NaN included, and 0 · NaN is no 0.
        v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < left, v, jnp.zeros_like(v))
        scores = jnp.where(within, scores, MASKED)
        before = top_ref[0, :, :, :1]
        top = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(within, jnp.exp(scores - top), 0.0)
        decay = jnp.exp(before - top)
        total = decay * total_ref[0, :, :, :1] + jnp.sum(weights, axis=-1, keepdims=True)
        out_ref[0] = decay * out_ref[0] + product(weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))))
        top_ref[0] = jnp.broadcast_to(top, top_ref.shape[1:])
        total_ref[0] = jnp.broadcast_to(total, total_ref.shape[1:])


def _on_one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array, *, soft_cap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (n, g, real, d), p = q.shape, k.shape[2]
    rows = -(-real // ROWS) * ROWS
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - real), (0, 0)))
    heads, block = block_shape(g, p, d, k.dtype.itemsize)
    # Where nothing is left to do the index stays, and a block that stays is not fetched again.
    last = lambda i, length_N: jnp.maximum(-(-length_N[i] // block) - 1, 0)  # noqa: E731
    rows_spec = lambda width: pl.BlockSpec((1, heads, rows, width), lambda i, h, j, _: (i, h, 0, 0))  # noqa: E731
    cache_spec = pl.BlockSpec(
        (1, heads, block, d), lambda i, h, j, length_N: (i, h, jnp.minimum(j, last(i, length_N)), 0)
    )
    shape = lambda width: jax.ShapeDtypeStruct((n, g, rows, width), jnp.float32)  # noqa: E731
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, scale=d**-0.5, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, g // heads, -(-p // block)),
            in_specs=[rows_spec(d), cache_spec, cache_spec],
            out_specs=[rows_spec(d), rows_spec(LANES), rows_spec(LANES)],
        ),
        out_shape=[shape(d), shape(LANES), shape(LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_prefix_attention",
    )(length.astype(jnp.int32), q, k, v)
    top = jnp.where(total > 0, top, 0.0)
    return out[:, :, :real], top[:, :, :real, :1], total[:, :, :real, :1]


def grouped_prefix_attention(
    q: Float[Array, "n g m d"],
    k: Float[Array, "n g p d"],
    v: Float[Array, "n g p d"],
    length: Int[Array, " n"],
    soft_cap: float | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, "n g m d"], Float32[Array, "n g m 1"], Float32[Array, "n g m 1"]]:
    """The softmax over the first `length` keys of each prompt, left undivided, to be merged with other keys.

    Not differentiable: decoding needs no gradient. `soft_cap` as of `layers.soft_capped`.

    Returns:
        (Σ exp(score − top) · value, top = the largest score, Σ exp(score − top)); without keys all are 0.
    """
    cache = ("batch", head_axis(k.shape[1]), None, None)
    small = (*q.shape[:3], 1)
    return per_device(
        functools.partial(_on_one_device, soft_cap=soft_cap, interpret=interpret),
        (q, k, v, length),
        (cache, cache, cache, ("batch",)),
        ((cache, q.shape), (cache, small), (cache, small)),
    )
