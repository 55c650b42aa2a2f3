"""Attention with its gradient, and the layouts in which the tokens of a row attend to each other.

A layer computes queries, keys and values for whatever tokens it is given and hands them to a *layout*, which knows
who sees whom. In `Tree`, the layout of scoring and training, a prompt's *prefix* (image and instruction) is computed
once for all of its *branches* (candidate answers). Prefill is `Causal` and `CausalEnd`; a decode step, whose keys lie
in caches, is in `inference/attention.py`. What both are made of is `attention_parts.py`.

A layer's *window* is how many tokens a token sees, itself included and counted backwards in places of the row, as
transformers counts them; None: all before it. A *span* is tokens that see each other forwards too: an image's, where
a decoder is made so. A *soft cap* bounds the scores, see `layers.soft_capped`.

Shape suffixes: B prompts, P prefix tokens, K branches of a prompt, T tokens of a branch, H query heads, G key/value
heads, R = H / G, D head width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.attention_parts import KV, join, normalize, part, scores
from m3po_jax.models.kernels import choice
from m3po_jax.models.layers import KEPT, matmul_precision

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


class Spans(NamedTuple):
    """Which tokens of a row see each other whatever their order.

    Attributes:
        numbers: Of the span that a token is in; −1: none.
        longest: Tokens that no span has more than.
    """

    numbers: Int[Array, "b s"]
    longest: int

    @classmethod
    def of_runs(cls, member: Bool[Array, "b s"], longest: int) -> Spans:
        """Every run of members is a span."""
        before = jnp.pad(member, ((0, 0), (1, 0)))[:, :-1]
        return cls(jnp.where(member, jnp.cumsum(member & ~before, axis=1) - 1, -1), longest)

    def pairs(self, queries: slice, keys: slice) -> Bool[Array, "b q k"]:
        """Which queries and keys are of one span."""
        q, k = self.numbers[:, queries, None], self.numbers[:, None, keys]
        return (q == k) & (q >= 0)


def _scores(axes: str, q: jax.Array, k: jax.Array, mask: jax.Array, soft_cap: float | None) -> jax.Array:
    return scores(f"bgkrtd,{axes}->bgkrt{axes[-2]}", q, k, mask, soft_cap)


def _attend(
    axes: tuple[str, ...], soft_cap: float | None, q: jax.Array, parts: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the scores (float32) of one softmax over several sets of (k, v, mask)."""
    whole = functools.reduce(
        join,
        (
            part(f"bgkrtd,{names}->bgkrt{names[-2]}", f"bgkrt{names[-2]},{names}->bgkrtd", q, (k, v), mask, soft_cap)
            for names, (k, v, mask) in zip(axes, parts, strict=True)
        ),
    )
    return normalize(whole).astype(q.dtype), whole.top + jnp.log(jnp.maximum(whole.total, 1e-30))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(axes: tuple[str, ...], soft_cap: float | None, q: jax.Array, parts: tuple[Any, ...]) -> jax.Array:
    return _attend(axes, soft_cap, q, parts)[0]


def _attention_forward(
    axes: tuple[str, ...], soft_cap: float | None, q: jax.Array, parts: tuple[Any, ...]
) -> tuple[jax.Array, Any]:
    # Under rematerialisation these two are kept, and the square of scores is made again.
    out, lse = (checkpoint_name(x, KEPT) for x in _attend(axes, soft_cap, q, parts))
    return out, (q, parts, out, lse)


def _attention_backward(
    axes: tuple[str, ...], soft_cap: float | None, kept: Any, g: jax.Array
) -> tuple[jax.Array, Any]:
    """Dao et al., arXiv:2205.14135, algorithm 4: the weights from the scores and their log-sum-exp."""
    q, parts, out, lse = kept
    shared = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dq, gradients = jnp.zeros(q.shape, jnp.float32), []
    for names, (k, v, mask) in zip(axes, parts, strict=True):
        scored = f"bgkrt{names[-2]}"
        capped = _scores(names, q, k, mask, soft_cap)
        weights = jnp.exp(capped - lse)
        dv = _product(f"{scored},bgkrtd->{names}", weights.astype(g.dtype), g)
        ds = weights * (_product(f"bgkrtd,{names}->{scored}", g, v) - shared) * q.shape[-1] ** -0.5
        if soft_cap is not None:  # the slope of c · tanh(x / c)
            ds = ds * (1.0 - jnp.square(jnp.where(mask, capped, 0.0) / soft_cap))
        ds = ds.astype(q.dtype)
        dq = dq + _product(f"{scored},{names}->bgkrtd", ds, k)
        dk = _product(f"{scored},bgkrtd->{names}", ds, q)
        gradients.append((dk.astype(k.dtype), dv.astype(v.dtype), None))
    return dq.astype(q.dtype), tuple(gradients)


_attention.defvjp(_attention_forward, _attention_backward)


def attend(q: Float[Array, "b g k r t d"], *keys: Keys, soft_cap: float | None = None) -> Float[Array, "b g k r t d"]:
    """One softmax over all `keys` in float32, none of them copied together; zeros where nothing may be seen.

    The gradient keeps no square array: scores are computed again from queries and keys.
    """
    return _attention(tuple(part.axes for part in keys), soft_cap, q, tuple(part[1:] for part in keys))


def _grouped(q: Float[Array, "... h d"], groups: int) -> jax.Array:
    """Queries [B, K, T, H, D] (or [B, T, H, D]: one branch) as [B, G, K, R, T, D]."""
    q = q if q.ndim == 5 else q[:, None]
    b, k, t, h, d = q.shape
    return q.reshape(b, k, t, groups, h // groups, d).transpose(0, 3, 1, 4, 2, 5)


def _ungrouped(out: Float[Array, "b g k r t d"]) -> Float[Array, "b k t h d"]:
    b, g, k, r, t, d = out.shape
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, k, t, g * r, d)


def _head_major(x: Float[Array, "b *s g d"]) -> Float[Array, "b g *s d"]:
    """[B, S, G, D] as [B, G, S, D], or [B, K, N, G, D] as [B, G, K, N, D]."""
    return jnp.moveaxis(x, -2, 1)


def dense_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    mask: Bool[Array, "#b #s t"],
    soft_cap: float | None = None,
) -> Float[Array, "b s h d"]:
    """Grouped-query attention with an explicit mask (true: may attend); softmax in float32.

    The mask may have size 1 where it does not depend on the row or the query.
    """
    keys = Keys("bgpd", _head_major(k), _head_major(v), mask[:, None, None, None])
    return _ungrouped(attend(_grouped(q, k.shape[2]), keys, soft_cap=soft_cap))[:, 0]


def causal_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "b s"],
    window: int | None = None,
    soft_cap: float | None = None,
    spans: Spans | None = None,
) -> Float[Array, "b s h d"]:
    """Causal attention of padded rows, exact, a block of queries at a time.

    A block multiplies no later keys (those alone that a span may reach), and of those before its window none but what
    fills a block. This is what the kernels of `Causal` replace.
    """
    s = q.shape[1]
    block = max(QUERY_BLOCK, -(-s // (MAX_BLOCKS * QUERY_BLOCK)) * QUERY_BLOCK)
    grouped, k, v = _grouped(q, k.shape[2]), _head_major(k), _head_major(v)
    outs = []
    for start in range(0, s, block):
        stop = min(start + block, s)
        first = 0 if window is None else max(start + 1 - window, 0) // QUERY_BLOCK * QUERY_BLOCK
        end = stop if spans is None else min(stop + spans.longest - 1, s)
        may = _sight(slice(start, stop), slice(first, end), window, spans)
        may = (may & mask[:, None, first:end])[:, None, None, None]
        keys = Keys("bgpd", k[:, :, first:end], v[:, :, first:end], may)
        outs.append(attend(grouped[..., start:stop, :], keys, soft_cap=soft_cap))
    return _ungrouped(jnp.concatenate(outs, axis=4))[:, 0]


def _sight(queries: slice, keys: slice, window: int | None, spans: Spans | None = None) -> Bool[Array, "#b q k"]:
    """Which keys of a row queries see, by their places alone; padding is another matter."""
    back = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
    may = (back >= 0)[None] if spans is None else (back >= 0) | spans.pairs(queries, keys)
    return may if window is None else may & (back < window)


def branch_attention(
    q_BKTHD: jax.Array,
    prefix: KV,
    prefix_mask_BTP: jax.Array,
    answers: KV,
    own_mask_BKTN: jax.Array,
    soft_cap: float | None = None,
) -> Float[Array, "b k t h d"]:
    """Branch tokens attend to their prompt's prefix, read once for all K branches, and to their own branch.

    One softmax over both parts; `prefix` is [B, P, G, D], `answers` is [B, K, N, G, D]. The prefix's mask may have
    size 1 where it does not depend on the branch's token.
    """
    (pk, pv), (ok, ov) = prefix, answers
    shared = Keys("bgpd", _head_major(pk), _head_major(pv), prefix_mask_BTP[:, None, None, None])
    branch = Keys("bgknd", _head_major(ok), _head_major(ov), own_mask_BKTN[:, None, :, None])
    return _ungrouped(attend(_grouped(q_BKTHD, pk.shape[2]), shared, branch, soft_cap=soft_cap))


class Layout(Protocol):
    """Who attends to whom."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Queries [B, Q, H, D] against keys and values [B, S, G, D] of one layer: [B, Q, H, D]."""


class DecoderLayout(Protocol):
    """Who attends to whom in a layer with a window."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, soft_cap: float | None = None
    ) -> jax.Array:
        """Queries [B, Q, H, D] against keys and values [B, S, G, D] of one layer: [B, Q, H, D]."""


class LastLayout(DecoderLayout, Protocol):
    """A layout of the last layer, whose queries are only the tokens that `pick` takes of a row."""

    def pick(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] to [B, N, ...]: the tokens that have queries."""


class Causal(NamedTuple):
    """Plain causal self-attention over [B, S] tokens with padding at either end."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"  # see `models/kernels`
    spans: Spans | None = None

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, soft_cap: float | None = None
    ) -> jax.Array:
        """q [B, S, H, D], k and v [B, S, G, D] to [B, S, H, D]."""
        to_kernel = self.spans is None or choice.has_spans(self.attention)
        if not (to_kernel and choice.fits(self.attention, q.shape[-1])):
            return causal_attention(q, k, v, self.mask_BS, window, soft_cap, self.spans)
        visible = None
        if self.spans is not None:
            everything = slice(0, q.shape[1])
            visible = _sight(everything, everything, window, self.spans)
        limits: dict[str, Any] = {"causal": True, "window": window, "soft_cap": soft_cap, "visible": visible}
        return choice.self_attention(q, k, v, self.mask_BS, kind=self.attention, **limits)

    @property
    def last(self) -> CausalEnd:
        """The layout of the last layer, where only the last token is asked for."""
        return CausalEnd(self.mask_BS)


class CausalEnd(NamedTuple):
    """The last layer of a `Causal`: the query of the last unpadded token, keys and values of all.

    No span reaches beyond the last token.
    """

    mask_BS: Bool[Array, "b s"]

    def pick(self, x: Float[Array, "b s ..."]) -> Float[Array, "b 1 ..."]:
        """The last unpadded token."""
        return last_valid(x, self.mask_BS)

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, soft_cap: float | None = None
    ) -> jax.Array:
        """q [B, 1, H, D], k and v [B, S, G, D] to [B, 1, H, D]."""
        return dense_attention(q, k, v, _within(self.mask_BS, last_place(self.mask_BS)[:, None], window), soft_cap)


class Bidirectional(NamedTuple):
    """Every token sees every unpadded token (vision towers, SigLIP's text tower)."""

    mask_BS: Bool[Array, "b s"]
    attention: str = "xla"

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q, k and v [B, S, H, D] to [B, S, H, D]."""
        if choice.fits(self.attention, q.shape[-1]):
            return choice.self_attention(q, k, v, self.mask_BS, causal=False, kind=self.attention)
        return dense_attention(q, k, v, self.mask_BS[:, None, :])


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
    spans: Spans | None = None  # of the prefix

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, soft_cap: float | None = None
    ) -> jax.Array:
        """q [B, P + K·T, H, D], k and v [B, P + K·T, G, D] to [B, P + K·T, H, D]."""
        p = self.prefix_mask_BP.shape[1]
        causal = Causal(self.prefix_mask_BP, self.attention, self.spans)
        prefix = causal(q[:, :p], k[:, :p], v[:, :p], window, soft_cap)
        return jnp.concatenate([prefix, self.branches(q[:, p:], k, v, window, soft_cap)], axis=1)

    def branches(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, soft_cap: float | None
    ) -> jax.Array:
        """The branches' part, [B, K·T, H, D]; `k` and `v` are of the whole row."""
        b, p = self.prefix_mask_BP.shape
        _, branches, t = self.branch_mask_BKT.shape
        if branches * t == 0:
            return q
        split = lambda x: x.reshape(b, branches, t, *x.shape[2:])  # noqa: E731
        own_mask = _sight(slice(0, t), slice(0, t), window) & self.branch_mask_BKT[:, :, None, :]
        # A branch goes on where its prefix ends, on whichever side that is padded.
        places = last_place(self.prefix_mask_BP)[:, None] + 1 + jnp.arange(t)
        prefix, branch = (k[:, :p], v[:, :p]), (split(k[:, p:]), split(v[:, p:]))
        visible = _within(self.prefix_mask_BP, places, window)
        out = branch_attention(split(q), prefix, visible, branch, own_mask, soft_cap)
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

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, soft_cap: float | None = None
    ) -> jax.Array:
        """q [B, 1 + K·T, H, D], k and v [B, P + K·T, G, D] to [B, 1 + K·T, H, D]."""
        mask = self.tree.prefix_mask_BP
        p = mask.shape[1]
        end = CausalEnd(mask)(q[:, :1], k[:, :p], v[:, :p], window, soft_cap)
        return jnp.concatenate([end, self.tree.branches(q[:, 1:], k, v, window, soft_cap)], axis=1)


def last_place(mask: Bool[Array, "b p"]) -> Int[Array, " b"]:
    """The place of each row's last unpadded token."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def last_valid(x: Float[Array, "b p ..."], mask: Bool[Array, "b p"]) -> Float[Array, "b 1 ..."]:
    """Each row's last unpadded token."""
    return jnp.take_along_axis(x, last_place(mask).reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _within(mask: Bool[Array, "b p"], places: Int[Array, "b t"], window: int | None) -> Bool[Array, "b t_or_1 p"]:
    """Which unpadded tokens of a row later tokens at `places` see; the tokens are no earlier than the row's last."""
    if window is None:
        return mask[:, None, :]
    return mask[:, None, :] & (jnp.arange(mask.shape[1]) > places[..., None] - window)


def prefix_positions(prefix_mask: Bool[Array, "b p"]) -> Int[Array, "b p"]:
    """Rotary positions that count unpadded tokens from 0."""
    return jnp.maximum(jnp.cumsum(prefix_mask, axis=1) - 1, 0)
