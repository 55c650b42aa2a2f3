"""Attention of K candidates' new tokens to their prompt's prefix, whose keys and values are read once for all K.

A decode step is bound by the bytes it reads. The kernel runs over (prompt, group of heads, block of the prefix):
a block of keys and values comes into on-chip memory once and meets the queries of all K candidates, flash-style
(Dao et al., arXiv:2205.14135; for shared prefixes Juravsky et al., arXiv:2402.05099). Blocks beyond a prompt's
last real token are neither read nor computed.

Shape suffixes: N prompts, G key/value heads, K candidates, R query heads of each key/value head, P prefix tokens,
D head width; in the kernel M = K·R rows of queries and a block of heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from m3po_jax.models.kernels.mesh import head_axis, per_device
from m3po_jax.models.kernels.partial import Partial, masked_attention
from m3po_jax.models.layers import matmul_precision

LANES = 128
ROWS = 16  # queries are padded to whole tiles: 16 rows of bfloat16 (8 of float32 would do)
LARGEST_BLOCK = 1024  # prefix tokens
BLOCK_BYTES = 1 << 20  # of keys in flight; values take as much again, and both are double-buffered
MASKED = -1e30  # finite, so that a block without any key makes no NaN


def _blocks(heads: int, tokens: int, width: int, itemsize: int) -> tuple[int, int]:
    """(heads, tokens) of one block: as much of the prefix as fits, then as many heads.

    Transfers well under a megabyte are dominated by their start-up time.
    """
    block = min(-(-tokens // LANES) * LANES, LARGEST_BLOCK)
    if tokens > block:  # equal parts, so that the last one is not mostly empty
        block = -(-tokens // (-(-tokens // block)) // LANES) * LANES
    size = max(BLOCK_BYTES // (block * max(width, LANES) * itemsize), 1)
    return max(h for h in range(1, heads + 1) if heads % h == 0 and h <= size), block


def _kernel(
    blocks_N: Any, q_ref: Any, k_ref: Any, v_ref: Any, mask_ref: Any, out_ref: Any, lse_ref: Any,
    top_ref: Any, total_ref: Any, sum_ref: Any, *, scale: float, tokens: int,
) -> None:  # fmt: skip
    n, j = pl.program_id(0), pl.program_id(2)
    block = k_ref.shape[2]

    @pl.when(j == 0)
    def start() -> None:
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j < blocks_N[n])
    def add() -> None:
        q, k, v = q_ref[0], k_ref[0], v_ref[0]
        precision = matmul_precision(q.dtype)
        product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        scores = scale * product(q, k, (((2,), (2,)), ((0,), (0,))))  # heads, M, block
        seen = mask_ref[0] != 0  # 1, block
        if tokens % block:  # the last block runs over the end, into memory that holds anything
            seen &= jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1) < tokens - j * block
            inside = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < tokens - j * block
            v = jnp.where(inside, v, jnp.zeros_like(v))
        scores = jnp.where(seen[None], scores, MASKED)
        before = top_ref[...][:, :, :1]
        top = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen[None], jnp.exp(scores - top), 0.0)
        decay = jnp.exp(before - top)
        total = decay * total_ref[...][:, :, :1] + jnp.sum(weights, axis=-1, keepdims=True)
        sum_ref[...] = decay * sum_ref[...] + product(weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))))
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(j == pl.num_programs(2) - 1)
    def finish() -> None:
        total = total_ref[...]
        out_ref[0] = sum_ref[...] / jnp.maximum(total[:, :, :1], 1e-30)
        lse_ref[0] = jnp.where(total == 0.0, -jnp.inf, top_ref[...] + jnp.log(total))


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, interpret: bool) -> Partial:
    n, g, candidates, r, d = q.shape
    p, real = k.shape[2], candidates * r
    rows = -(-real // ROWS) * ROWS
    q = jnp.pad(q.reshape(n, g, real, d), ((0, 0), (0, 0), (0, rows - real), (0, 0)))
    heads, block = _blocks(g, p, d, k.dtype.itemsize)
    end = p - jnp.argmax(mask[:, ::-1], axis=1)  # one past the last real token
    needed = jnp.where(mask.any(axis=1), -(-end // block), 0).astype(jnp.int32)
    # Where nothing is left to do the index stays, and a block that stays is not fetched again.
    which = lambda i, j, needed_N: jnp.minimum(j, jnp.maximum(needed_N[i] - 1, 0))  # noqa: E731
    head_spec = lambda width: pl.BlockSpec((1, heads, rows, width), lambda i, h, j, _: (i, h, 0, 0))  # noqa: E731
    cache_spec = pl.BlockSpec((1, heads, block, d), lambda i, h, j, m: (i, h, which(i, j, m), 0))
    mask_spec = pl.BlockSpec((1, 1, block), lambda i, h, j, m: (i, 0, which(i, j, m)))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, scale=d**-0.5, tokens=p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, g // heads, -(-p // block)),
            in_specs=[head_spec(d), cache_spec, cache_spec, mask_spec],
            out_specs=[head_spec(d), head_spec(LANES)],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((n, g, rows, d), jnp.float32),
            jax.ShapeDtypeStruct((n, g, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_prefix_attention",
    )(needed, q, k, v, mask.astype(jnp.int32)[:, None])
    return Partial(out[:, :, :real].reshape(n, g, candidates, r, d), lse[:, :, :real, 0].reshape(n, g, candidates, r))


def prefix_attention(
    q: Float[Array, "n g k r d"],
    k: Float[Array, "n g p d"],
    v: Float[Array, "n g p d"],
    mask: Bool[Array, "n p"],
    *,
    kind: str = "xla",
) -> Partial:
    """What the queries of K candidates of each of N prompts see of their prompt: (out [N, G, K, R, D], lse).

    Merge it with the attention to a candidate's own tokens by `merge`. Not differentiable in its kernel form:
    decoding needs no gradient.

    Args:
        kind: ``pallas`` runs the TPU kernel, ``pallas_interpret`` the same one on any machine; all others are XLA.
    """
    if not kind.startswith("pallas"):
        return masked_attention("ngkrd,ngpd->ngkrp", "ngkrp,ngpd->ngkrd", q, k, v, mask[:, None, None, None])
    axis = head_axis(k.shape[1])
    heads, cache = ("batch", axis, None, None, None), ("batch", axis, None, None)
    kernel = functools.partial(_grouped, interpret=kind == "pallas_interpret")
    out = per_device(
        lambda *args: tuple(kernel(*args)),
        (q, k, v, mask),
        (heads, cache, cache, ("batch", None)),
        ((heads, q.shape), (heads[:-1], q.shape[:-1])),
    )
    return Partial(*out)
