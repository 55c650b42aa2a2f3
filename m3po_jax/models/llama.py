"""The LLaMA decoder (Touvron et al., arXiv:2302.13971), grouped-query attention included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.hosts.sharding import constrain
from m3po_jax.models.attention import LastLayout, Layout
from m3po_jax.models.layers import (
    ACTIVATIONS,
    REMAT_POLICIES,
    Columns,
    Embedding,
    Linear,
    RMSNorm,
    layer_at,
    matmul_precision,
    scan_layers,
    stack_layers,
)

MAX_LOGITS = 2**26  # that may exist at once on a device when log-probabilities are computed: 256 MiB


class TokenScores(NamedTuple):
    """What the logits before each token say; only `log_probs` carries a gradient, and what is not read costs nothing.

    Attributes:
        log_probs: log π(token), nats.
        entropy: Of the whole distribution, −Σ π log π, nats.
        is_top1: No token is more likely.
        mean_logits: Of the logits of the whole vocabulary.
    """

    log_probs: Float[Array, "b n"]
    entropy: Float[Array, "b n"]
    is_top1: Bool[Array, "b n"]
    mean_logits: Float[Array, "b n"]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder by Hugging Face's names; `num_heads` · `head_dim` is the queries' width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    activation: str = "silu"
    tie_word_embeddings: bool = False
    max_positions: int = 4096
    attention: str = "xla"  # see `models/kernels`


def rotary_tables(
    positions: Int[Array, "b s"], head_dim: int, theta: float
) -> tuple[Float[Array, "b s 1 d"], Float[Array, "b s 1 d"]]:
    """cos and sin of the rotary embedding (Su et al., arXiv:2104.09864), in the half-split order of Hugging Face."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Float[Array, "b s h d"], tables: tuple[jax.Array, jax.Array]) -> Float[Array, "b s h d"]:
    """Queries or keys turned by the `rotary_tables` of their positions, in float32; the dtype stays."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x.dtype)


class LlamaAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions; `layout` says who sees whom."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        c = config
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_width, axes=("embed", "heads"), **kinds)
        self.k_proj = Linear(c.hidden_size, kv_width, axes=("embed", "kv_heads"), **kinds)
        self.v_proj = Linear(c.hidden_size, kv_width, axes=("embed", "kv_heads"), **kinds)
        self.o_proj = Linear(q_width, c.hidden_size, axes=("heads", "embed"), **kinds)
        self.head_dim = c.head_dim

    def __call__(
        self, x: jax.Array, rotary: Any, layout: Layout, cache: Any, pick: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, Any]:
        """`pick` takes the tokens that have queries out of a row."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q = apply_rotary(heads(self.q_proj(pick(x))), jax.tree.map(pick, rotary))
        k = apply_rotary(heads(self.k_proj(x)), rotary)
        out, cache = layout(q, k, heads(self.v_proj(x)), cache)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), cache


class LlamaMLP(nnx.Module):
    """down(act(gate(x)) · up(x)) (SwiGLU, Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = Linear(d, f, axes=("embed", "mlp"), **kinds)
        self.up_proj = Linear(d, f, axes=("embed", "mlp"), **kinds)
        self.down_proj = Linear(f, d, axes=("mlp", "embed"), **kinds)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.input_norm = RMSNorm(config.hidden_size, **norm)
        self.attention = LlamaAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = LlamaMLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotary: Any,
        layout: Layout,
        cache: Any,
        pick: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> tuple[jax.Array, Any]:
        """States of the tokens that `pick` takes (default: all) after the layer, and its cache."""
        attended, cache = self.attention(self.input_norm(x), rotary, layout, cache, pick)
        x = constrain(pick(x) + attended, "batch", None, None)
        x = constrain(x + self.mlp(self.post_attention_norm(x)), "batch", None, None)
        return x, cache


class Llama(nnx.Module):
    """Embeddings in, hidden states out; `logits` is separate so that only response positions pay for it."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, axes=("vocab", "embed"), rngs=rngs, **kinds
        )
        self.layers = stack_layers(lambda r: LlamaLayer(config, rngs=r, **kinds), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kinds)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, axes=("embed", "vocab"), rngs=rngs, **kinds)
        )

    def rotary(self, positions: Int[Array, "b s"]) -> tuple[jax.Array, jax.Array]:
        """cos and sin [B, S, 1, head_dim] of the positions."""
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        layout: Layout,
        *,
        keep_cache: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "b s d"], Any]:
        """Hidden states after the final norm and, with `keep_cache`, each layer's keys and values [L, B, S, G, D]."""
        rotary = self.rotary(positions)

        def apply(layer: LlamaLayer, x: jax.Array, _: None) -> tuple[jax.Array, Any]:
            x, cache = layer(x, rotary, layout, None)
            return x, cache if keep_cache else None

        x, cache = scan_layers(self.layers, apply, constrain(x, "batch", None, None), remat=remat)
        return self.norm(x), cache

    def needed_states(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        layout: Layout,
        last: LastLayout,
        *,
        remat: str = "none",
        base_learns: bool = False,
    ) -> Float[Array, "b n d"]:
        """States after the final norm of the tokens that `last.pick` takes: the last layer computes no others.

        Args:
            layout: Of all layers but the last.
            base_learns: The stacked base weights have gradients. The last layer is then scanned with the others and
                computes every token: set apart, it would cost a copy of the weights or of their gradients.
        """
        if base_learns:
            hidden, _ = self(x, positions, layout, remat=remat)
            return last.pick(hidden)
        rotary = self.rotary(positions)

        def apply(layer: LlamaLayer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x, rotary, layout, None)[0], None

        count = self.config.num_layers - 1
        x, _ = scan_layers(self.layers, apply, constrain(x, "batch", None, None), remat=remat, count=count)

        def end(layer: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, layer)(x, rotary, last, None, last.pick)[0]

        graph, layer = nnx.split(layer_at(self.layers, count))
        return self.norm(jax.checkpoint(end, policy=REMAT_POLICIES[remat])(layer, x))

    def token_scores(self, hidden: Float[Array, "b n d"], token_ids: Int[Array, "b n"]) -> TokenScores:
        """log softmax(logits)[token] in float32 and what else the logits say, without the full softmax.

        More than `MAX_LOGITS` logits never exist at once: a large vocabulary is taken in chunks with a running
        log-sum-exp, and the backward pass computes a chunk's logits again.
        """
        vocabulary = self.config.vocab_size
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.size
        chunks = -(-token_ids.size * vocabulary // (MAX_LOGITS * shards))
        # The head is linear: one more column of it, the mean of all, says what no logits are needed for.
        mean = self.logits(hidden, lambda w, axis: jnp.mean(w, axis=axis, keepdims=True))[..., 0]
        mean = jax.lax.stop_gradient(mean)
        if chunks <= 1:
            logits = self.logits(hidden)
            chosen = jnp.take_along_axis(logits, token_ids[..., None], axis=-1)[..., 0]
            total = jax.nn.logsumexp(logits, axis=-1)
            all_log_probs = jax.lax.stop_gradient(logits - total[..., None])
            entropy = -jnp.sum(jnp.exp(all_log_probs) * all_log_probs, axis=-1)
            is_top1 = jax.lax.stop_gradient(chosen) >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
            return TokenScores(chosen - total, entropy, is_top1, mean)
        return TokenScores(*self._chunked_scores(hidden, token_ids, chunks), mean)

    def _chunked_scores(
        self, hidden: jax.Array, token_ids: jax.Array, chunks: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log π, entropy and whether no token is likelier, as in `TokenScores`."""
        vocabulary = self.config.vocab_size
        mesh = jax.sharding.get_abstract_mesh()
        # A chunk takes its share of every device's part of the vocabulary, so that no weights travel.
        parts = 1 if mesh.empty or vocabulary % mesh.shape["tensor"] else mesh.shape["tensor"]
        rows = vocabulary // parts
        width = -(-rows // chunks)
        graph, state = nnx.split(self)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def chunk(carry: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            top, total, chosen, weighted = carry
            start = jnp.minimum(index * width, rows - width)  # the last chunk overlaps the one before

            def columns(w: jax.Array, axis: int) -> jax.Array:
                axis %= w.ndim
                split = w.reshape(*w.shape[:axis], parts, rows, *w.shape[axis + 1 :])
                taken = jax.lax.dynamic_slice_in_dim(split, start, width, axis=axis + 1)
                return taken.reshape(*w.shape[:axis], parts * width, *w.shape[axis + 1 :])

            ids = (jnp.arange(parts)[:, None] * rows + start + jnp.arange(width)).reshape(-1)
            new = jnp.tile(start + jnp.arange(width) >= index * width, parts)
            logits = jnp.where(new, nnx.merge(graph, state).logits(hidden, columns), -jnp.inf)
            highest = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1)))
            share = jnp.exp(logits - highest[..., None])
            # Σ exp(l − highest) (l − highest), without gradient: large logits do not cancel as they would in Σ p l.
            below = jnp.where(new, logits, highest[..., None]) - highest[..., None]
            weighted = (weighted + total * (top - highest)) * jnp.exp(top - highest) + jnp.sum(share * below, axis=-1)
            total, weighted = (
                total * jnp.exp(top - highest) + jnp.sum(share, axis=-1),
                jax.lax.stop_gradient(weighted),
            )
            here = (ids == token_ids[..., None]) & new
            return (highest, total, chosen + jnp.sum(jnp.where(here, logits, 0.0), axis=-1), weighted), None

        zeros = jnp.zeros(token_ids.shape, jnp.float32)
        start = (jnp.full(token_ids.shape, -1e30), zeros, zeros, zeros)
        (top, total, chosen, weighted), _ = jax.lax.scan(chunk, start, jnp.arange(chunks))
        entropy = jax.lax.stop_gradient(jnp.log(total) - weighted / total)
        return chosen - top - jnp.log(total), entropy, jax.lax.stop_gradient(chosen) >= top

    def logits(
        self, hidden: Float[Array, "... d"], columns: Columns = lambda w, axis: w
    ) -> Float[Array, "... vocab"]:
        """Next-token logits in float32; of the tokens that `columns` takes from an axis of the vocabulary."""
        if self.lm_head is not None:
            return self.lm_head(hidden, columns).astype(jnp.float32)
        table = columns(self.embed_tokens.table[...], 0).astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden.astype(self.dtype), table, precision=matmul_precision(self.dtype))
        return logits.astype(jnp.float32)
