"""Attention to some of the keys, left undivided, and what joins it exactly to attention to others.

Each part is a softmax without its division, with the largest score and the sum of the weights beside it (Milakov and
Gimelshein, arXiv:1805.02867). So a prompt's keys, shared by its answers, and an answer's own are never copied
together, and either part may come from a kernel.

Shape suffixes: M queries, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from m3po_jax.models.layers import matmul_precision, soft_capped

KV = tuple[jax.Array, jax.Array]


class Part(NamedTuple):
    """Attention to some of the keys; a query that sees none has `top` 0 and `total` 0.

    Attributes:
        out: Σ exp(score − top) · value.
        top: the largest score.
        total: Σ exp(score − top).
    """

    out: Float32[Array, "... m d"]
    top: Float32[Array, "... m 1"]
    total: Float32[Array, "... m 1"]


def scores(
    equation: str, q: jax.Array, k: jax.Array, mask: Bool[Array, ...], soft_cap: float | None = None
) -> jax.Array:
    """q · k / √D in float32 by an einsum equation, `soft_capped`; −∞ where `mask` (true: may attend) is false."""
    exact: dict[str, Any] = {"precision": matmul_precision(q.dtype), "preferred_element_type": jnp.float32}
    products = q.shape[-1] ** -0.5 * jnp.einsum(equation, q, k, **exact)
    return jnp.where(mask, soft_capped(products, soft_cap), -jnp.inf)


def part(
    to_scores: str, to_values: str, q: jax.Array, kv: KV, mask: Bool[Array, ...], soft_cap: float | None = None
) -> Part:
    """Attention of `q` to `kv` where `mask`, by the einsum equations for scores and values; float32 sums."""
    k, v = kv
    s = scores(to_scores, q, k, mask, soft_cap)
    top = s.max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # NaN goes through, so that it is noticed
    weights = jnp.exp(s - top)
    exact: dict[str, Any] = {"precision": matmul_precision(v.dtype), "preferred_element_type": jnp.float32}
    return Part(jnp.einsum(to_values, weights.astype(v.dtype), v, **exact), top, weights.sum(-1, keepdims=True))


def join(one: Part, other: Part) -> Part:
    """Attention to the keys of both."""
    top = jnp.maximum(jnp.where(one.total > 0, one.top, -jnp.inf), jnp.where(other.total > 0, other.top, -jnp.inf))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    a, b = jnp.exp(one.top - top), jnp.exp(other.top - top)
    a, b = jnp.where(one.total == 0, 0.0, a), jnp.where(other.total == 0, 0.0, b)
    return Part(a * one.out + b * other.out, top, a * one.total + b * other.total)


def normalize(single: Part) -> Float32[Array, "... m d"]:
    """The softmax over the keys of a part; 0, not NaN, for queries that see none."""
    return single.out / jnp.maximum(single.total, 1e-30)
