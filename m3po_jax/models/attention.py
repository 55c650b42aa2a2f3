"""Attention, and the layouts in which a decoder's tokens attend to each other.

A layer computes queries, keys and values for whatever tokens it is given and hands them to a *layout*, which
knows who sees whom and where the cache lies. Prefill, teacher-forced scoring, preference training and decoding
are four layouts of one forward pass; in the last three a prompt's *prefix* (image and instruction) is computed
or read once for all of its *branches* (candidate answers).

Shape suffixes: B prompts, P prefix tokens, K branches of a prompt, T tokens of a branch, N cache slots of a
branch, H query heads, G key/value heads, R = H / G, D head width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.kernels import choice
from m3po_jax.models.layers import KEPT, matmul_precision

KV = tuple[jax.Array, jax.Array]


QUERY_BLOCK = 128  # least queries that causal attention takes at a time, to the keys up to them
MAX_BLOCKS = 12


class Keys(NamedTuple):
    """One set of keys that queries [B, G, K, R, T, D] attend to.

    `axes` names the axes of `k` and `v`: ``bgpd`` for keys that all branches share, ``bgknd`` for a branch's own.
    `mask` (true: may attend) broadcasts against the scores: the queries' axes with the keys' token axis for D.
    """

    axes: str
    k: jax.Array
    v: jax.Array
    mask: jax.Array


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product whose sums are float32 whatever the inputs are."""
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def _scores(axes: str, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    scores = _product(f"bgkrtd,{axes}->bgkrt{axes[-2]}", q, k)
    return jnp.where(mask, q.shape[-1] ** -0.5 * scores, -jnp.inf)


def _attend(axes: tuple[str, ...], q: jax.Array, parts: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the scores (float32) of one softmax over several sets of (k, v, mask)."""
    scores = [_scores(names, q, k, mask) for names, (k, _, mask) in zip(axes, parts, strict=True)]
    top = jnp.max(scores[0], axis=-1, keepdims=True)
    for s in scores[1:]:
        top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # NaN goes through, so that it is noticed
    total, out = jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32)
    for names, s, (_, v, _) in zip(axes, scores, parts, strict=True):
        weights = jnp.exp(s - top)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        out = out + _product(f"bgkrt{names[-2]},{names}->bgkrtd", weights.astype(v.dtype), v)
    total = jnp.maximum(total, 1e-30)  # rows that see nothing get zeros, not NaN
    return (out / total).astype(q.dtype), top + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(axes: tuple[str, ...], q: jax.Array, parts: tuple[Any, ...]) -> jax.Array:
    return _attend(axes, q, parts)[0]


def _attention_forward(axes: tuple[str, ...], q: jax.Array, parts: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    # Under rematerialisation these two are kept, and the square of scores is made again.
    out, lse = (checkpoint_name(x, KEPT) for x in _attend(axes, q, parts))
    return out, (q, parts, out, lse)


def _attention_backward(axes: tuple[str, ...], kept: Any, g: jax.Array) -> tuple[jax.Array, Any]:
    """Dao et al., arXiv:2205.14135, algorithm 4: the weights from the scores and their log-sum-exp."""
    q, parts, out, lse = kept
    shared = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dq, gradients = jnp.zeros(q.shape, jnp.float32), []
    for names, (k, v, mask) in zip(axes, parts, strict=True):
        scored = f"bgkrt{names[-2]}"
        weights = jnp.exp(_scores(names, q, k, mask) - lse)
        dv = _product(f"{scored},bgkrtd->{names}", weights.astype(g.dtype), g)
        ds = weights * (_product(f"bgkrtd,{names}->{scored}", g, v) - shared) * q.shape[-1] ** -0.5
        ds = ds.astype(q.dtype)
        dq = dq + _product(f"{scored},{names}->bgkrtd", ds, k)
        dk = _product(f"{scored},bgkrtd->{names}", ds, q)
        gradients.append((dk.astype(k.dtype), dv.astype(v.dtype), None))
    return dq.astype(q.dtype), tuple(gradients)


_attention.defvjp(_attention_forward, _attention_backward)


def attend(q: Float[Array, "b g k r t d"], *keys: Keys) -> Float[Array, "b g k r t d"]:
    """One softmax over all `keys` in float32, none of them copied together; zeros where nothing may be seen.

    The gradient keeps no square array: scores are computed again from queries and keys.
    """
    return _attention(tuple(part.axes for part in keys), q, tuple(part[1:] for part in keys))


def _grouped(q: Float[Array, "... h d"], groups: int) -> jax.Array:
    """Queries [B, K, T, H, D] (or [B, T, H, D]: one branch) as [B, G, K, R, T, D]."""
    q = q if q.ndim == 5 else q[:, None]
    b, k, t, h, d = q.shape
    return q.reshape(b, k, t, groups, h // groups, d).transpose(0, 3, 1, 4, 2, 5)


def _ungrouped(out: Float[Array, "b g k r t d"]) -> Float[Array, "b k t h d"]:
    b, g, k, r, t, d = out.shape
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, k, t, g * r, d)


def _head_major(x: Float[Array, "... s g d"]) -> Float[Array, "... g s d"]:
    """[B, S, G, D] as [B, G, S, D], or [B, K, N, G, D] as [B, G, K, N, D]."""
    return jnp.moveaxis(x, -2, 1)


def dense_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    mask: Bool[Array, "b s t"],
) -> Float[Array, "b s h d"]:
    """Grouped-query attention with an explicit mask (true: may attend); softmax in float32.

    The mask may have size 1 where it does not depend on the row or the query.
    """
    keys = Keys("bgpd", _head_major(k), _head_major(v), mask[:, None, None, None])
    return _ungrouped(attend(_grouped(q, k.shape[2]), keys))[:, 0]


def causal_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "b s"],
) -> Float[Array, "b s h d"]:
    """Causal attention of padded rows, exact, a block of queries at a time: a block multiplies no later keys.

    This is what the kernels of `Causal` replace.
    """
    s = q.shape[1]
    block = max(QUERY_BLOCK, -(-s // (MAX_BLOCKS * QUERY_BLOCK)) * QUERY_BLOCK)
    grouped, k, v = _grouped(q, k.shape[2]), _head_major(k), _head_major(v)
    outs = []
    for start in range(0, s, block):
        stop = min(start + block, s)
        earlier = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        seen = (earlier & mask[:, None, :stop])[:, None, None, None]
        outs.append(attend(grouped[..., start:stop, :], Keys("bgpd", k[:, :, :stop], v[:, :, :stop], seen)))
    return _ungrouped(jnp.concatenate(outs, axis=4))[:, 0]


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
    shared = Keys("bgpd", _head_major(pk), _head_major(pv), prefix_mask_BP[:, None, None, None, None, :])
    branch = Keys("bgknd", _head_major(ok), _head_major(ov), own_mask_BKTN[:, None, :, None])
    return _ungrouped(attend(_grouped(q_BKTHD, pk.shape[2]), shared, branch))


class Layout(Protocol):
    """Who attends to whom. `cache` and the second result are one layer's keys and values, or None."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Queries [B, Q, H, D] against keys and values [B, S, G, D] of one layer: [B, Q, H, D], and the cache."""


class LastLayout(Layout, Protocol):
    """A layout of the last layer, whose queries are only the tokens that `pick` takes of a row."""

    def pick(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] to [B, N, ...]: the tokens that have queries."""


class Causal(NamedTuple):
    """Plain causal self-attention over [B, S] tokens with padding anywhere; returns the keys and values."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"  # see `models/kernels`

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, KV]:
        """q [B, S, H, D], k and v [B, S, G, D] to [B, S, H, D]; no cache is read."""
        if choice.fits(self.attention, q.shape[-1]):
            return choice.self_attention(q, k, v, self.mask_BS, causal=True, kind=self.attention), (k, v)
        return causal_attention(q, k, v, self.mask_BS), (k, v)


class Bidirectional(NamedTuple):
    """Every token sees every unpadded token (vision towers, SigLIP's text tower)."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, None]:
        """q, k and v [B, S, H, D] to [B, S, H, D]; there is no cache."""
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
        """q [B, P + K·T, H, D], k and v [B, P + K·T, G, D] to [B, P + K·T, H, D]; there is no cache."""
        p = self.prefix_mask_BP.shape[1]
        prefix, _ = Causal(self.prefix_mask_BP, self.attention)(q[:, :p], k[:, :p], v[:, :p], None)
        return jnp.concatenate([prefix, self.branches(q[:, p:], k, v)], axis=1), None

    def branches(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The branches' part, [B, K·T, H, D]; `k` and `v` are of the whole row."""
        b, p = self.prefix_mask_BP.shape
        _, branches, t = self.branch_mask_BKT.shape
        if branches * t == 0:
            return q
        split = lambda x: x.reshape(b, branches, t, *x.shape[2:])  # noqa: E731
        own_mask = jnp.tril(jnp.ones((t, t), bool)) & self.branch_mask_BKT[:, :, None, :]
        prefix, own = (k[:, :p], v[:, :p]), (split(k[:, p:]), split(v[:, p:]))
        out = branch_attention(split(q), prefix, self.prefix_mask_BP, own, own_mask)
        return out.reshape(b, branches * t, *out.shape[3:])

    @property
    def last(self) -> TreeEnd:
        """The layout of the last layer, where of the prefix only its last token is asked for."""
        return TreeEnd(self)


class TreeEnd(NamedTuple):
    """The last layer of a `Tree`: queries of 1 + K·T tokens, keys and values of all P + K·T.

    No later layer reads the prefix, and the first token of every branch is predicted from its last unpadded token.
    """

    tree: Tree

    def pick(self, x: Float[Array, "b s ..."]) -> Float[Array, "b n ..."]:
        """The prefix's last unpadded token and the branches."""
        p = self.tree.prefix_mask_BP.shape[1]
        return jnp.concatenate([last_valid(x[:, :p], self.tree.prefix_mask_BP), x[:, p:]], axis=1)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, None]:
        """q [B, 1 + K·T, H, D], k and v [B, P + K·T, G, D] to [B, 1 + K·T, H, D]; there is no cache."""
        mask = self.tree.prefix_mask_BP
        p = mask.shape[1]
        end = dense_attention(q[:, :1], k[:, :p], v[:, :p], mask[:, None, :])
        return jnp.concatenate([end, self.tree.branches(q[:, 1:], k, v)], axis=1), None


def last_valid(x: Float[Array, "b p ..."], mask: Bool[Array, "b p"]) -> Float[Array, "b 1 ..."]:
    """Each row's last unpadded token."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


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
        """q [B, K, H, D], k and v [B, K, G, D] to [B, K, H, D]; the cache comes back with slot `step` written."""
        b, c = q.shape[0], self.num_candidates
        split = lambda x: x.reshape(b, c, 1, *x.shape[2:])  # noqa: E731
        own_k, own_v = cache.own
        own_k = jax.lax.dynamic_update_slice_in_dim(own_k, split(k), self.step, axis=2)
        own_v = jax.lax.dynamic_update_slice_in_dim(own_v, split(v), self.step, axis=2)
        written = jnp.arange(own_k.shape[2]) <= self.step
        own_mask = jnp.broadcast_to(written, (b, c, 1, own_k.shape[2]))
        out = branch_attention(split(q), cache.prefix, self.prefix_mask_BP, (own_k, own_v), own_mask)
        return out.reshape(b, c, *out.shape[3:]), DecodeCache(cache.prefix, (own_k, own_v))
