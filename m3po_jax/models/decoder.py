"""The decoder of every language model: one layer's arithmetic (`decoder_layer.py`), scanned over stacked weights.

Layers differ in what `DecoderConfig.layer_pattern` says. That is data of the scan: a layer's number in
`DecoderConfig.kinds` chooses its rotary table and, by `lax.switch`, its attention, so that projections and MLP are
compiled once whatever the pattern is, and a window's attention multiplies no keys that it does not see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.hosts.sharding import constrain
from m3po_jax.models.attention import DecoderLayout, LastLayout
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.decoder_layer import Pick, Rotary, decoder_layer, rotary_of_kinds
from m3po_jax.models.layers import (
    REMAT_POLICIES,
    Columns,
    Embedding,
    Linear,
    RMSNorm,
    layer_at,
    matmul_precision,
    scan_layers,
    soft_capped,
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


def _norm(config: DecoderConfig, features: int, **kinds: Any) -> RMSNorm:
    return RMSNorm(features, eps=config.rms_norm_eps, offset=config.norm_offset, **kinds)


def _pin(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", None, None)


def _with_injected(x: Float[Array, "b s e"], more: Float[Array, "b p e"]) -> Float[Array, "b s e"]:
    """The first P tokens' states with `more` added."""
    return jnp.concatenate([x[:, : more.shape[1]] + more.astype(x.dtype), x[:, more.shape[1] :]], axis=1)


class DecoderAttention(nnx.Module):
    """The four projections of a layer's attention, and the norms of queries and keys where there are some."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, biases = config.hidden_size, config.biases
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(d, queries, axes=("embed", "heads"), use_bias="q_proj" in biases, **kinds)
        self.k_proj = Linear(d, keys, axes=("embed", "kv_heads"), use_bias="k_proj" in biases, **kinds)
        self.v_proj = Linear(d, keys, axes=("embed", "kv_heads"), use_bias="v_proj" in biases, **kinds)
        self.o_proj = Linear(queries, d, axes=("heads", "embed"), use_bias="o_proj" in biases, **kinds)
        if config.norms_of_heads:
            self.q_norm, self.k_norm = (
                _norm(config, config.head_dim, dtype=dtype, param_dtype=param_dtype) for _ in range(2)
            )


class DecoderMLP(nnx.Module):
    """The three projections of a gated MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, f, biases = config.hidden_size, config.intermediate_size, config.biases
        self.gate_proj = Linear(d, f, axes=("embed", "mlp"), use_bias="gate_proj" in biases, **kinds)
        self.up_proj = Linear(d, f, axes=("embed", "mlp"), use_bias="up_proj" in biases, **kinds)
        self.down_proj = Linear(f, d, axes=("mlp", "embed"), use_bias="down_proj" in biases, **kinds)


class DecoderLayer(nnx.Module):
    """The weights of a layer, a linear layer for each projection: the `LayerWeights` of training and scoring."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        norm = functools.partial(_norm, config, config.hidden_size, dtype=dtype, param_dtype=param_dtype)
        self.input_norm = norm()
        self.attention = DecoderAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_norm = norm()
        self.mlp = DecoderMLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if config.norms_of_results:
            self.attention_result_norm, self.mlp_result_norm = norm(), norm()
        self.head_dim = config.head_dim

    def gain(self, norm: str) -> Float[Array, " e_or_d"]:
        """See `LayerWeights`, as for the others."""
        owner = self.attention if norm in ("q_norm", "k_norm") else self
        return getattr(owner, norm).gain

    def queries_keys_values(self, x: Float[Array, "b s e"], pick: Pick) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Only the tokens that `pick` takes are multiplied for queries."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        a = self.attention
        return heads(a.q_proj(pick(x))), heads(a.k_proj(x)), heads(a.v_proj(x))

    def output(self, attended: Float[Array, "b q hd"]) -> Float[Array, "b q e"]:
        """One product."""
        return self.attention.o_proj(attended)

    def gate_and_up(self, x: Float[Array, "b q e"]) -> tuple[Float[Array, "b q f"], Float[Array, "b q f"]]:
        """Two products."""
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def down(self, x: Float[Array, "b q f"]) -> Float[Array, "b q e"]:
        """One product."""
        return self.mlp.down_proj(x)


class Decoder(nnx.Module):
    """Embeddings in, hidden states out; `logits` is separate so that only response positions pay for it."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            axes=("vocab", "embed"),
            rngs=rngs,
            scale=config.embedding_scale,
            **kinds,
        )
        self.layers = stack_layers(lambda r: DecoderLayer(config, rngs=r, **kinds), config.num_layers, rngs)
        self.norm = _norm(config, config.hidden_size, **kinds)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, axes=("embed", "vocab"), rngs=rngs, **kinds)
        )

    def _scan(
        self,
        x: Float[Array, "b s e"],
        tables: tuple[Rotary, ...],
        layout: DecoderLayout,
        injected: Float[Array, "l b p e"] | None,
        *,
        remat: str,
        count: int | None = None,
    ) -> Float[Array, "b s e"]:
        """States after the first `count` layers (None: all); `tables` as of `rotary_of_kinds`."""
        c = self.config
        windows = tuple(kind.window for kind in c.kinds)
        one_table = all(table is tables[0] for table in tables)
        stacked = None if one_table else jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)
        numbers = None if len(c.kinds) == 1 else jnp.asarray(c.kind_numbers[:count], jnp.int32)
        places = None if injected is None else jnp.arange(c.num_layers if count is None else count)

        def apply(layer: DecoderLayer, x: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
            number, place = of_layer
            rotary = tables[0] if stacked is None else jax.tree.map(lambda leaf: leaf[number], stacked)
            branches = [functools.partial(layout, window=w, soft_cap=c.attention_soft_cap) for w in windows]
            attend: Any = branches[0]
            if len(set(windows)) > 1:
                attend = functools.partial(jax.lax.switch, number, branches)
            x = decoder_layer(c, layer, x, rotary, attend, pin=_pin)
            if injected is not None:
                more = injected[jnp.minimum(place, len(injected) - 1)]
                x = _with_injected(x, jnp.where(place < len(injected), more, jnp.zeros((), more.dtype)))
            return x, None

        return scan_layers(self.layers, apply, _pin(x), (numbers, places), remat=remat, count=count)[0]

    def __call__(
        self,
        x: Float[Array, "b s e"],
        positions: Int[Array, "b s *axes"],
        layout: DecoderLayout,
        injected: Float[Array, "l b p e"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "b s e"]:
        """Hidden states after the final norm.

        Args:
            injected: What is added to the states of the first P tokens after each of the first L layers (DeepStack,
                Meng et al., arXiv:2406.04334).
        """
        return self.norm(self._scan(x, rotary_of_kinds(self.config, positions), layout, injected, remat=remat))

    def needed_states(
        self,
        x: Float[Array, "b s e"],
        positions: Int[Array, "b s *axes"],
        layout: DecoderLayout,
        last: LastLayout,
        injected: Float[Array, "l b p e"] | None = None,
        *,
        remat: str = "none",
        base_learns: bool = False,
    ) -> Float[Array, "b n e"]:
        """States after the final norm of the tokens that `last.pick` takes: the last layer computes no others.

        Args:
            layout: Of all layers but the last.
            injected: See `__call__`.
            base_learns: The stacked base weights have gradients. The last layer is then scanned with the others and
                computes every token: set apart, it would cost a copy of the weights or of their gradients.
        """
        if base_learns:
            return last.pick(self(x, positions, layout, injected, remat=remat))
        c, tables = self.config, rotary_of_kinds(self.config, positions)
        final = c.num_layers - 1
        x = self._scan(x, tables, layout, injected, remat=remat, count=final)

        def end(layer: nnx.State, x: jax.Array) -> jax.Array:
            attend = functools.partial(last, window=c.kind(final).window, soft_cap=c.attention_soft_cap)
            rotary = tables[c.kind_numbers[final]]
            y = decoder_layer(c, nnx.merge(graph, layer), x, rotary, attend, pin=_pin, pick=last.pick)
            if injected is not None and final < len(injected):
                y = y + last.pick(_with_injected(jnp.zeros_like(x), injected[final]))
            return y

        graph, layer = nnx.split(layer_at(self.layers, final))
        return self.norm(jax.checkpoint(end, policy=REMAT_POLICIES[remat])(layer, x))

    def token_scores(self, hidden: Float[Array, "b n e"], token_ids: Int[Array, "b n"]) -> TokenScores:
        """log softmax(logits)[token] in float32 and what else the logits say, without the full softmax.

        More than `MAX_LOGITS` logits never exist at once: a large vocabulary is taken in chunks with a running
        log-sum-exp, and the backward pass computes a chunk's logits again.
        """
        vocabulary = self.config.vocab_size
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.size
        chunks = -(-token_ids.size * vocabulary // (MAX_LOGITS * shards))
        if chunks <= 1:
            logits = self.logits(hidden)
            chosen = jnp.take_along_axis(logits, token_ids[..., None], axis=-1)[..., 0]
            total = jax.nn.logsumexp(logits, axis=-1)
            all_log_probs = jax.lax.stop_gradient(logits - total[..., None])
            entropy = -jnp.sum(jnp.exp(all_log_probs) * all_log_probs, axis=-1)
            is_top1 = jax.lax.stop_gradient(chosen) >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
            mean = self._mean_logits(hidden, lambda: jnp.mean(logits, axis=-1))
            return TokenScores(chosen - total, entropy, is_top1, mean)
        log_probs, entropy, is_top1, summed = self._chunked_scores(hidden, token_ids, chunks)
        return TokenScores(log_probs, entropy, is_top1, self._mean_logits(hidden, lambda: summed / vocabulary))

    def _mean_logits(self, hidden: jax.Array, capped: Callable[[], jax.Array]) -> jax.Array:
        """Of the whole vocabulary, without gradient; `capped` is what the logits that exist say of it.

        A head without a cap is linear: one more column of it, the mean of all, says what no logits are needed for.
        """
        linear = lambda w, axis: jnp.mean(w, axis=axis, keepdims=True)  # noqa: E731
        mean = self.logits(hidden, linear)[..., 0] if self.config.logits_soft_cap is None else capped()
        return jax.lax.stop_gradient(mean)

    def _chunked_scores(
        self, hidden: jax.Array, token_ids: jax.Array, chunks: int
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """log π, entropy and whether no token is likelier, as in `TokenScores`, and the sum of the logits."""
        vocabulary = self.config.vocab_size
        mesh = jax.sharding.get_abstract_mesh()
        # A chunk takes its share of every device's part of the vocabulary, so that no weights travel.
        parts = 1 if mesh.empty or vocabulary % mesh.shape["tensor"] else mesh.shape["tensor"]
        rows = vocabulary // parts
        width = -(-rows // chunks)
        graph, state = nnx.split(self)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def chunk(carry: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            top, total, chosen, weighted, summed = carry
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
            chosen = chosen + jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
            if self.config.logits_soft_cap is not None:
                summed = summed + jax.lax.stop_gradient(jnp.sum(jnp.where(new, logits, 0.0), axis=-1))
            return (highest, total, chosen, weighted, summed), None

        zeros = jnp.zeros(token_ids.shape, jnp.float32)
        start = (jnp.full(token_ids.shape, -1e30), zeros, zeros, zeros, zeros)
        (top, total, chosen, weighted, summed), _ = jax.lax.scan(chunk, start, jnp.arange(chunks))
        entropy = jax.lax.stop_gradient(jnp.log(total) - weighted / total)
        return chosen - top - jnp.log(total), entropy, jax.lax.stop_gradient(chosen) >= top, summed

    def logits(
        self, hidden: Float[Array, "... d"], columns: Columns = lambda w, axis: w
    ) -> Float[Array, "... vocab"]:
        """Next-token logits in float32; of the tokens that `columns` takes from an axis of the vocabulary."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden, columns)
        else:
            table, exact = columns(self.embed_tokens.table[...], 0).astype(self.dtype), matmul_precision(self.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden.astype(self.dtype), table, precision=exact)
        return soft_capped(logits.astype(jnp.float32), self.config.logits_soft_cap)
