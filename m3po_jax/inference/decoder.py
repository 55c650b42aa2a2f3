"""The decoder as generation runs it: fused products, one prefix for all candidates.

The arithmetic is that of `models/decoder_layer.py`, the weights are those of `fused.py`; keys and values lie
head-major, as the attention products read them.

Shape suffixes: B prompts, A row shards, L lanes of a shard, M lanes and N prompts of all shards, K candidates, P
prefix tokens, C slots of a lane's cache, G key/value heads, R query heads of each, D head width, E model width, F MLP
width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.hosts.sharding import constrain
from m3po_jax.inference.attention import own_attention, prefix_attention
from m3po_jax.inference.fused import FusedLayer
from m3po_jax.models.attention import Causal, DecoderLayout, Spans
from m3po_jax.models.attention_parts import KV, Part, join, normalize
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.decoder_layer import decoder_layer, rotary_of_kinds


def prefill(
    config: DecoderConfig,
    layers: tuple[FusedLayer, ...],
    x: Float[Array, "b p e"],
    positions: Int[Array, "b p *axes"],
    mask: Bool[Array, "b p"],
    keep: Callable[[int, KV], None],
    *,
    injected: Float[Array, "l b p e"] | None = None,
    spans: Spans | None = None,
) -> Float[Array, "b e"]:
    """The last unpadded token's state before the final norm.

    Only that one state is needed, so the last layer computes attention and MLP for it alone.

    Args:
        keep: called with each layer's number and its keys and values [B, G, P, D].
        injected: what is added to the states after each of the first layers.
        spans: of the prompts' images, see `models.forward.PromptInputs`.
    """
    rotary = rotary_of_kinds(config, positions)
    layout = Causal(mask, config.attention, spans)
    pin = lambda y: constrain(y, "batch", None, None)  # noqa: E731
    x = pin(x)
    for index, layer in enumerate(layers):
        final = index == len(layers) - 1
        who: DecoderLayout = layout.last if final else layout
        window = config.kind(index).window

        def attend(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            index: int = index,
            who: DecoderLayout = who,
            window: int | None = window,
        ) -> jax.Array:
            cached = [constrain(y.transpose(0, 2, 1, 3), "batch", "kv_heads", None, None) for y in (k, v)]
            keep(index, (cached[0], cached[1]))
            return who(q, k, v, window, config.attention_soft_cap)

        pick = layout.last.pick if final else lambda y: y
        x = decoder_layer(config, layer, x, rotary[config.kind_numbers[index]], attend, pin=pin, pick=pick)
        if injected is not None and index < len(injected):
            x = x + pick(injected[index]).astype(x.dtype)
    return x[:, 0]


def pin_stationary(x: jax.Array) -> jax.Array:
    """Splits a decode step's activations by width instead of by prompt over ``fsdp``.

    The weights then stay where they are, and a few rows of activations travel: gathering the weights for
    every token would move gigabytes a step (Pope et al., arXiv:2211.05102, the weight-stationary layout).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[-1] % mesh.shape["fsdp"] or x.shape[0] % mesh.shape["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))


def decode_step(
    config: DecoderConfig,
    layers: tuple[FusedLayer, ...],
    x: Float[Array, "a l e"],
    positions: Int[Array, "a l"],
    places: Int[Array, "a l"],
    *,
    prefix: list[KV],
    length: Int[Array, " n"],
    to_grid: Callable[[jax.Array], jax.Array],
    from_grid: Callable[[jax.Array], jax.Array],
    cache: list[KV],
    slot: Int[Array, ""],
    written: Bool[Array, "m c"],
    back: Int[Array, " c"],
) -> tuple[Float[Array, "a l e"], list[KV]]:
    """One token of every lane: states before the final norm, and the cache with the token in `slot`.

    Caches have one axis for the lanes (M) or prompts (N) of all shards: one of length 1 before it would keep the
    compiler from writing in place.

    Args:
        positions: of the tokens, as the rotary embedding has them; after an image these need not be
        places: of the tokens, counted from the first of the prompt.
        prefix: each layer's keys and values of the prompts [N, G, P, D], the first `length` of them real.
        to_grid: lanes [M, ...] to the candidates of the prompts [N, K, ...]; `from_grid` back.
        cache: each layer's own keys and values [M, G, C, D].
        written: slots that hold a lane's answer, `slot` included.
        back: how many tokens ago a slot was written; 0 for `slot`.
    """
    rotary, cap = rotary_of_kinds(config, positions), config.attention_soft_cap
    put, updated = jax.lax.dynamic_update_slice_in_dim, []
    flat = lambda y: constrain(y.reshape(-1, *y.shape[2:]), "batch", "kv_heads", *(None,) * (y.ndim - 3))  # noqa: E731
    x = pin_stationary(x)
    for index, (layer, shared, (keys, values)) in enumerate(zip(layers, prefix, cache, strict=True)):
        window = config.kind(index).window

        def attend(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            shared: KV = shared,
            keys: jax.Array = keys,
            values: jax.Array = values,
            window: int | None = window,
        ) -> jax.Array:
            by_group = flat(q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim))
            k, v = flat(k), flat(v)
            cached = (
                put(keys, k[..., None, :].astype(keys.dtype), slot, axis=2),
                put(values, v[..., None, :].astype(values.dtype), slot, axis=2),
            )
            updated.append(cached)
            grid = to_grid(by_group).transpose(0, 2, 1, 3, 4)  # [N, G, K, R, D]
            asked = grid.reshape(*grid.shape[:2], -1, config.head_dim)
            first, visible = None, written
            if window is not None:
                oldest = to_grid(places.reshape(-1)) - (window - 1)  # [N, K]
                first = jnp.repeat(oldest, grid.shape[3], axis=1)
                visible = written & (back < window)
            on_prefix = prefix_attention(asked, shared, length, config.attention, first, cap)
            to_lanes = lambda y: from_grid(y.reshape(*grid.shape[:4], -1).transpose(0, 2, 1, 3, 4))  # noqa: E731
            on_prefix = Part(*map(to_lanes, on_prefix))
            attended = normalize(join(on_prefix, own_attention(by_group, cached, visible, cap)))
            return attended.astype(q.dtype).reshape(*q.shape[:2], -1)

        number = config.kind_numbers[index]
        x = decoder_layer(config, layer, x, rotary[number], attend, pin=pin_stationary)
    return x, updated
