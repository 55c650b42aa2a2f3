"""A decode step's attention in two parts: the prompt's keys, shared by its candidates, and a lane's own.

Each part is a softmax left undivided, with what joins it to another exactly: the largest score and the sum of the
weights. So either may come from a kernel of its own.

Shape suffixes: N prompts, L lanes, G key/value heads, R query heads of each, M queries that share
keys, P prefix tokens, C slots of a lane's cache, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from m3po_jax.models.kernels.choice import decode_kernel
from m3po_jax.models.layers import matmul_precision

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


def part(scores: str, values: str, q: jax.Array, kv: KV, seen: Bool[Array, ...], scale: float) -> Part:
    """Attention of `q` to `kv` where `seen`, by the einsum equations for scores and values; float32 sums."""
    k, v = kv
    exact: dict[str, Any] = {"precision": matmul_precision(q.dtype), "preferred_element_type": jnp.float32}
    s = jnp.where(seen, scale * jnp.einsum(scores, q, k, **exact), -jnp.inf)
    top = s.max(-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # NaN goes through, so that it is noticed
    weights = jnp.exp(s - top)
    out = jnp.einsum(values, weights.astype(v.dtype), v, **exact)
    return Part(out, top, weights.sum(-1, keepdims=True))


def prefix_attention(
    q: Float[Array, "n g m d"],
    kv: tuple[Float[Array, "n g p d"], Float[Array, "n g p d"]],
    length: Int[Array, " n"],
    kind: str = "xla",
) -> Part:
    """The queries of a prompt's candidates and heads to the first `length` of its keys, read once for all of them.

    Args:
        kind: which attention computes it, see `models.kernels.choice`.
    """
    kernel = decode_kernel(kind)
    if kernel is not None:
        return Part(*kernel(q, *kv, length))
    seen = jnp.arange(kv[0].shape[2]) < length[:, None, None, None]
    with jax.named_scope("prefix"):
        return part("ngmd,ngpd->ngmp", "ngmp,ngpd->ngmd", q, kv, seen, q.shape[-1] ** -0.5)


def own_attention(
    q: Float[Array, "l g r d"],
    kv: tuple[Float[Array, "l g c d"], Float[Array, "l g c d"]],
    seen: Bool[Array, "l c"],
) -> Part:
    """A lane's queries to the slots of its own cache that hold its answer."""
    with jax.named_scope("answers"):
        return part("lgrd,lgcd->lgrc", "lgrc,lgcd->lgrd", q, kv, seen[:, None, None], q.shape[-1] ** -0.5)


def merge(one: Part, other: Part) -> Float32[Array, "... m d"]:
    """The softmax over the keys of both parts."""
    top = jnp.maximum(jnp.where(one.total > 0, one.top, -jnp.inf), jnp.where(other.total > 0, other.top, -jnp.inf))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    a, b = jnp.exp(one.top - top), jnp.exp(other.top - top)
    a, b = jnp.where(one.total == 0, 0.0, a), jnp.where(other.total == 0, 0.0, b)
    return (a * one.out + b * other.out) / jnp.maximum(a * one.total + b * other.total, 1e-30)


def normalize(single: Part) -> Float32[Array, "... m d"]:
    """The softmax over the keys of one part; 0 for queries that see none."""
    return single.out / jnp.maximum(single.total, 1e-30)
