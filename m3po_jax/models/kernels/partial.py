"""Attention over a part of the keys, and the exact merge of several parts by their log-sum-exp.

Shape suffixes: N prompts, G key/value heads, K candidates, R query heads of each key/value head, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3po_jax.models.layers import matmul_precision


class Partial(NamedTuple):
    """softmax-weighted values over some keys, and the log of the softmax's denominator (−inf: saw no key)."""

    out: Float[Array, "*lead d"]  # float32
    lse: Float[Array, "*lead"]  # float32


def merge(parts: Sequence[Partial]) -> Float[Array, "*lead d"]:
    """Attention over the union of disjoint sets of keys, float32; zeros where no part saw a key.

    out = Σᵢ exp(lseᵢ − m) outᵢ / Σᵢ exp(lseᵢ − m) with m = maxᵢ lseᵢ (Dao et al., arXiv:2205.14135, section 3.1).
    """
    top = parts[0].lse
    for part in parts[1:]:
        top = jnp.maximum(top, part.lse)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # NaN goes through, so that it is noticed
    total = jnp.zeros_like(top)
    out = jnp.zeros_like(parts[0].out)
    for part in parts:
        weight = jnp.exp(part.lse - top)
        total = total + weight
        out = out + weight[..., None] * part.out
    return out / jnp.maximum(total, 1e-30)[..., None]


def masked_attention(
    into_scores: str,
    into_values: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
) -> Partial:
    """The XLA form of a part, for any layout: the two einsum equations name it, scores having keys last.

    Args:
        mask: Broadcasts to the scores; true: may attend. None: every key is seen.
    """
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum(into_scores, q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = q.shape[-1] ** -0.5 * scores
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum(into_values, weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return Partial(out / jnp.maximum(total, 1e-30)[..., None], jnp.log(total) + top[..., 0])
