"""Attention of rows in which several images, or windows of them, stand end to end and see only themselves.

`segments` says for every token of a row what it belongs to: tokens of one number see each other, and nobody sees a
token of a negative number, which sees nothing.

Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m3po_jax.models.attention import MAX_BLOCKS, dense_attention

QUERY_BLOCK = 512  # least queries that are taken at a time


def packed_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    segments: Int[Array, "b s"],
) -> Float[Array, "b s h d"]:
    """Every token sees its segment; zeros where it has none. Scores exist for a block of queries at a time."""
    s = q.shape[1]
    block = max(QUERY_BLOCK, -(-s // MAX_BLOCKS))
    outs = []
    for start in range(0, s, block):
        asking = segments[:, start : start + block, None]
        may = (asking == segments[:, None, :]) & (asking >= 0)
        outs.append(dense_attention(q[:, start : start + block], k, v, may))
    return jnp.concatenate(outs, axis=1)


def local_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    segments: Int[Array, "b s"],
    longest: int,
) -> Float[Array, "b s h d"]:
    """As `packed_attention`, for segments without gaps of at most `longest` tokens, in time linear in the row.

    A block of `longest` queries meets the keys of itself and of its two neighbours: no segment reaches further.
    """
    b, s = segments.shape
    if s <= 3 * longest:
        return packed_attention(q, k, v, segments)
    blocks = -(-s // longest)
    more = blocks * longest - s

    def with_neighbours(x: Array, filler: int = 0) -> Array:
        """[B, S, ...] to [B·blocks, 3·longest, ...]."""
        ends = ((0, 0), (longest, longest + more)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, ends, constant_values=filler).reshape(b, blocks + 2, longest, *x.shape[2:])
        x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return x.reshape(b * blocks, *x.shape[2:])

    asked = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0))).reshape(b * blocks, longest, *q.shape[2:])
    asking = jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1).reshape(b * blocks, longest, 1)
    may = (asking == with_neighbours(segments, -1)[:, None, :]) & (asking >= 0)
    out = dense_attention(asked, with_neighbours(k), with_neighbours(v), may)
    return out.reshape(b, blocks * longest, *out.shape[2:])[:, :s]
