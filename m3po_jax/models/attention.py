"""Attention, and the layouts in which a decoder's tokens attend to each other.

A layer computes queries, keys and values for whatever tokens it is given and hands them to a *layout*, which
knows who sees whom and where the cache lies. Prefill, teacher-forced scoring, preference training and decoding
are four layouts of one forward pass; in the last three a prompt's *prefix* (image and instruction) is computed
or read once for all of its *branches* (candidate answers).

Shape suffixes: B prompts, P prefix tokens, K branches of a prompt, T tokens of a branch, N cache slots of a
branch, H query heads, G key/value heads, R = H / G, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.kernels import choice
from m3po_jax.models.layers import matmul_precision

KV = tuple[jax.Array, jax.Array]


def _scores(q: jax.Array, k: jax.Array, equation: str, scale: float) -> jax.Array:
    """Scaled attention scores, accumulated and returned in float32."""
    precision = matmul_precision(q.dtype)
    return scale * jnp.einsum(equation, q, k, precision=precision, preferred_element_type=jnp.float32)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask` allows; rows that see nothing get zeros, not NaN."""
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def dense_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    mask: Bool[
        Array,
        (
            b  # s t
        ),
    ],
) -> Float[Array, "b s h d"]:
    """Grouped-query attention with an explicit mask (true: may attend); softmax in float32."""
    b, s, h, d = q.shape
    groups = k.shape[2]
    q = q.reshape(b, s, groups, h // groups, d)
    weights = _softmax(_scores(q, k, "bsgrd,btgd->bgrst", d**-0.5), mask[:, None, None])
    out = jnp.einsum("bgrst,btgd->bsgrd", weights.astype(v.dtype), v, precision=matmul_precision(v.dtype))
    return out.reshape(b, s, h, d)


def branch_attention(
    q_BKTHD: jax.Array,
    prefix: KV,
    prefix_mask_BP: jax.Array,
    own: KV,
    own_mask_BKTN: jax.Array,
) -> Float[Array, "b k t h d"]:
    """Branch tokens attend to their prompt's prefix, read once for all K branches, and to their own branch.

    One softmax over both parts; `prefix` is [B, P, G, D], `own` is [B, K, N, G, D].
    """
    (pk, pv), (ok, ov) = prefix, own
    b, k, t, h, d = q_BKTHD.shape
    groups = pk.shape[2]
    q = q_BKTHD.reshape(b, k, t, groups, h // groups, d)
    shape = (b, k, groups, h // groups, t)
    seen = jnp.broadcast_to(prefix_mask_BP[:, None, None, None, None, :], (*shape, pk.shape[1]))
    own_mask = jnp.broadcast_to(own_mask_BKTN[:, :, None, None], (*shape, ok.shape[2]))
    scores = jnp.concatenate(
        [_scores(q, pk, "bktgrd,bpgd->bkgrtp", d**-0.5), _scores(q, ok, "bktgrd,bkngd->bkgrtn", d**-0.5)],
        axis=-1,
    )
    weights = _softmax(scores, jnp.concatenate([seen, own_mask], axis=-1)).astype(pv.dtype)
    on_prefix, on_own = weights[..., : pk.shape[1]], weights[..., pk.shape[1] :]
    precision = matmul_precision(pv.dtype)
    out = jnp.einsum("bkgrtp,bpgd->bktgrd", on_prefix, pv, precision=precision)
    out = out + jnp.einsum("bkgrtn,bkngd->bktgrd", on_own, ov, precision=precision)
    return out.reshape(b, k, t, h, d)


class Layout(Protocol):
    """Who attends to whom. `cache` and the second result are one layer's keys and values, or None."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]: ...


class Causal(NamedTuple):
    """Plain causal self-attention over [B, S] tokens with padding anywhere; returns the keys and values."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"  # see `models/kernels`

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, KV]:
        s = q.shape[1]
        if choice.fits(self.attention, q.shape[-1]):
            return choice.self_attention(q, k, v, self.mask_BS, causal=True, kind=self.attention), (k, v)
        causal = jnp.tril(jnp.ones((s, s), bool))
        return dense_attention(q, k, v, causal & self.mask_BS[:, None, :]), (k, v)


class Bidirectional(NamedTuple):
    """Every token sees every unpadded token (vision towers, SigLIP's text tower)."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, None]:
        if choice.fits(self.attention, q.shape[-1]):
            return choice.self_attention(q, k, v, self.mask_BS, causal=False, kind=self.attention), None
        return dense_attention(q, k, v, self.mask_BS[:, None, :]), None


class Tree(NamedTuple):
    """A prefix and its branches in one row of P + K·T tokens: the layout of scoring and of training.

    The row is the prefix followed by branch 0, branch 1, …; a branch sees the prefix and itself. For P = 2,
    K = 2, T = 2 (rows: queries, columns: keys; tokens p0 p1 a0 a1 b0 b1):

        p0  1 . . . . .
        p1  1 1 . . . .
        a0  1 1 1 . . .
        a1  1 1 1 1 . .
        b0  1 1 . . 1 .
        b1  1 1 . . 1 1

    The prefix goes through every layer once, with its gradient summed over the branches: exact, not approximate.
    """

    prefix_mask_BP: Bool[Array, "b p"]
    branch_mask_BKT: Bool[Array, "b k t"]
    attention: str = "xla"  # of the prefix to itself; branches are short

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, None]:
        b, p = self.prefix_mask_BP.shape
        _, branches, t = self.branch_mask_BKT.shape
        prefix_out, prefix = Causal(self.prefix_mask_BP, self.attention)(q[:, :p], k[:, :p], v[:, :p], None)
        split = lambda x: x[:, p:].reshape(b, branches, t, *x.shape[2:])  # noqa: E731
        own_mask = jnp.tril(jnp.ones((t, t), bool)) & self.branch_mask_BKT[:, :, None, :]
        out = branch_attention(split(q), prefix, self.prefix_mask_BP, (split(k), split(v)), own_mask)
        return jnp.concatenate([prefix_out, out.reshape(b, branches * t, *out.shape[3:])], axis=1), None


class DecodeCache(NamedTuple):
    """One layer's cache: the prefix once per prompt, the answers once per candidate."""

    prefix: KV  # [B, P, G, D] each, never written
    own: KV  # [B, K, N, G, D] each, written one slot a step


class Decode(NamedTuple):
    """One new token for each of K candidates of B prompts, given as a row of K tokens a prompt."""

    prefix_mask_BP: Bool[Array, "b p"]
    num_candidates: int
    step: Int[Array, ""]  # the cache slot that this token takes

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: DecodeCache) -> tuple[jax.Array, DecodeCache]:
        b, c = q.shape[0], self.num_candidates
        split = lambda x: x.reshape(b, c, 1, *x.shape[2:])  # noqa: E731
        own_k, own_v = cache.own
        own_k = jax.lax.dynamic_update_slice_in_dim(own_k, split(k), self.step, axis=2)
        own_v = jax.lax.dynamic_update_slice_in_dim(own_v, split(v), self.step, axis=2)
        written = jnp.arange(own_k.shape[2]) <= self.step
        own_mask = jnp.broadcast_to(written, (b, c, 1, own_k.shape[2]))
        out = branch_attention(split(q), cache.prefix, self.prefix_mask_BP, (own_k, own_v), own_mask)
        return out.reshape(b, c, *out.shape[3:]), DecodeCache(cache.prefix, (own_k, own_v))
