"""The LLaMA decoder as generation wants it: fused products, one prefix for all candidates.

The arithmetic is that of `models/llama.py`; the arrangement is not. The weights are those of `fused.py`; keys and
values lie head-major, as the attention products read them.

Shape suffixes: B prompts, A row shards, L lanes of a shard, M lanes and N prompts of all shards, K candidates, P
prefix tokens, C slots of a lane's cache, G key/value heads, R query heads of each, D head width, E model width, F MLP
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.generation.attention import KV, merge, normalize, own_attention, part, prefix_attention
from m3po_jax.generation.fused import FusedLayer, adapted, product
from m3po_jax.hosts.sharding import constrain
from m3po_jax.models.forward import prefix_positions
from m3po_jax.models.kernels.choice import self_attention
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.llama import LlamaConfig, apply_rotary, rotary_tables

QUERY_BLOCK = 256  # prefill attends this many queries at a time, to the keys up to them


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return scale * y.astype(scale.dtype)


def _project(config: LlamaConfig, layer: FusedLayer, x: jax.Array, rotary: Any) -> tuple[jax.Array, ...]:
    """Rotated queries [..., G, R, D], rotated keys and values [..., G, D] of normalised inputs [B, S, E]."""
    y = product(x, layer.qkv)
    q, k, v = y[..., :-2, :], y[..., -2, :], y[..., -1, :]
    q = adapted(layer, "q_proj", x, q)
    k = adapted(layer, "k_proj", x, k)
    v = adapted(layer, "v_proj", x, v)
    flat = q.reshape(*q.shape[:2], config.num_heads, config.head_dim)
    return apply_rotary(flat, rotary).reshape(q.shape), apply_rotary(k, rotary), v


def _finish(config: LlamaConfig, layer: FusedLayer, x: jax.Array, attended: jax.Array, pin: Any) -> jax.Array:
    """Output projection, residuals and MLP; `attended` is [B, S, H·D]."""
    x = pin(x + adapted(layer, "o_proj", attended, product(attended, layer.out)))
    normal = _rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    both = product(normal, layer.gate_up)
    gate = adapted(layer, "gate_proj", normal, both[..., 0, :])
    up = adapted(layer, "up_proj", normal, both[..., 1, :])
    hidden = ACTIVATIONS[config.activation](gate) * up
    return pin(x + adapted(layer, "down_proj", hidden, product(hidden, layer.down)))


def prefill(
    config: LlamaConfig,
    layers: tuple[FusedLayer, ...],
    x: Float[Array, "b p e"],
    mask: Bool[Array, "b p"],
    keep: Callable[[int, KV], None],
) -> Float[Array, "b e"]:
    """The last unpadded token's state before the final norm.

    Only that one state is needed, so the last layer computes queries and MLP for it alone.

    Args:
        keep: called with each layer's number and its keys and values [B, G, P, D].
    """
    b, p, _ = x.shape
    rotary = rotary_tables(prefix_positions(mask), config.head_dim, config.rope_theta)
    last = p - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    pin = lambda y: constrain(y, "batch", None, None)  # noqa: E731
    pick = lambda y: jnp.take_along_axis(y, last.reshape(b, *(1,) * (y.ndim - 1)), axis=1)  # noqa: E731
    by_heads = lambda y: y.transpose(0, 2, 3, 1, 4)  # noqa: E731
    by_rows = lambda y: y.transpose(0, 3, 1, 2, 4)  # noqa: E731
    scale = config.head_dim**-0.5
    equations = ("bgrsd,bgpd->bgrsp", "bgrsp,bgpd->bgrsd")
    causal = jnp.arange(p)[:, None] >= jnp.arange(p)[None, :]
    x = pin(x)
    for index, layer in enumerate(layers):
        final = index == len(layers) - 1
        normal = _rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = _project(config, layer, normal, rotary)
        by_token = (q.reshape(b, p, config.num_heads, config.head_dim), k, v)
        k, v = (constrain(y.transpose(0, 2, 1, 3), "batch", "kv_heads", None, None) for y in (k, v))
        keep(index, (k, v))
        if final:
            seen = mask[:, None, None, None, :]
            attended, x = by_rows(normalize(part(*equations, by_heads(pick(q)), (k, v), seen, scale))), pick(x)
        elif config.attention != "xla":
            attended = self_attention(*by_token, mask, causal=True, kind=config.attention)
        else:
            q, blocks = by_heads(q), []
            for start in range(0, p, QUERY_BLOCK):
                stop = min(start + QUERY_BLOCK, p)
                seen = (causal[start:stop, :stop] & mask[:, None, :stop])[:, None, None]
                own = (k[:, :, :stop], v[:, :, :stop])
                blocks.append(normalize(part(*equations, q[:, :, :, start:stop], own, seen, scale)))
            attended = by_rows(jnp.concatenate(blocks, axis=3))
        attended = attended.astype(v.dtype).reshape(b, x.shape[1], -1)
        x = _finish(config, layer, x, attended, pin)
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
    config: LlamaConfig,
    layers: tuple[FusedLayer, ...],
    x: Float[Array, "a l e"],
    positions: Int[Array, "a l"],
    *,
    prefix: list[KV],
    length: Int[Array, " n"],
    to_grid: Callable[[jax.Array], jax.Array],
    from_grid: Callable[[jax.Array], jax.Array],
    cache: list[KV],
    slot: Int[Array, ""],
    seen: Bool[Array, "m c"],
) -> tuple[Float[Array, "a l e"], list[KV]]:
    """One token of every lane: states before the final norm, and the cache with the token in `slot`.

    Caches have one axis for the lanes (M) or prompts (N) of all shards: one of length 1 before it would keep the
    compiler from writing in place.

    Args:
        prefix: each layer's keys and values of the prompts [N, G, P, D], the first `length` of them real.
        to_grid: lanes [M, ...] to the candidates of the prompts [N, K, ...]; `from_grid` back.
        cache: each layer's own keys and values [M, G, C, D].
        seen: slots that hold a lane's answer, `slot` included.
    """
    a, lanes, _ = x.shape
    rotary = rotary_tables(positions, config.head_dim, config.rope_theta)
    put, updated = jax.lax.dynamic_update_slice_in_dim, []
    flat = lambda y: constrain(y.reshape(-1, *y.shape[2:]), "batch", "kv_heads", *(None,) * (y.ndim - 3))  # noqa: E731
    x = pin_stationary(x)
    for layer, shared, (keys, values) in zip(layers, prefix, cache, strict=True):
        normal = _rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = map(flat, _project(config, layer, normal, rotary))
        own = (
            put(keys, k[..., None, :].astype(keys.dtype), slot, axis=2),
            put(values, v[..., None, :].astype(values.dtype), slot, axis=2),
        )
        updated.append(own)
        grid = to_grid(q).transpose(0, 2, 1, 3, 4)  # [N, G, K, R, D]
        asked = grid.reshape(*grid.shape[:2], -1, config.head_dim)
        on_prefix = prefix_attention(asked, shared, length, config.attention)
        back = lambda y, like=grid: from_grid(y.reshape(*like.shape[:4], -1).transpose(0, 2, 1, 3, 4))  # noqa: E731
        attended = merge(type(on_prefix)(*map(back, on_prefix)), own_attention(q, own, seen))
        x = _finish(config, layer, x, attended.astype(x.dtype).reshape(a, lanes, -1), pin_stationary)
    return x, updated
