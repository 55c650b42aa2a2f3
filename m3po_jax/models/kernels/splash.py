"""Self-attention on TPUs by jax's splash attention kernel, gradient included.

The kernel (jax.experimental.pallas.ops.tpu.splash_attention) never writes the scores to memory, in either
direction. It wants whole blocks of 128 tokens; rows are padded to that here. Segment ids keep padding apart: real
tokens are segment 1, padding segment 0, so that padded queries see padding alone and stay finite.

Shape suffixes: B rows, S tokens, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float

from m3po_jax.models.kernels.mesh import head_axis, per_device

LANES = 128
LARGEST_BLOCK = 5  # of 128 tokens: 640² float32 scores take 1.6 MB of a core's 16 MB and more


def block_size(tokens: int) -> int:
    """The largest block of at most 640 tokens that divides `tokens`, a multiple of 128."""
    lanes = tokens // LANES
    return LANES * max(size for size in range(1, min(lanes, LARGEST_BLOCK) + 1) if lanes % size == 0)


def splash_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "b s"],
    *,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "b s h d"]:
    """Grouped-query self-attention over the unpadded tokens; padded positions hold finite values of no meaning.

    Scores and sums are float32. On a TPU, float32 inputs are multiplied at the kernel's default precision.
    """
    s, d = q.shape[1], q.shape[3]
    padded = -(-s // LANES) * LANES
    wider = lambda x: jnp.pad(x, ((0, 0), (0, padded - s), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)  # the kernel does not scale
    heads = lambda x: wider(x).transpose(0, 2, 1, 3)  # noqa: E731
    args = (heads(q), heads(k), heads(v), wider(mask).astype(jnp.int32))

    def attend(q_BHSD: jax.Array, k_BGSD: jax.Array, v_BGSD: jax.Array, segments_BS: jax.Array) -> jax.Array:
        shape = (padded, padded)
        if window is not None:
            one: Any = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
        elif causal:
            one = splash_attention_mask.CausalMask(shape)
        else:
            one = splash_attention_mask.FullMask(shape)
        size = block_size(padded)
        sizes = splash_attention_kernel.BlockSizes(
            block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
        )
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([one] * q_BHSD.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap,
            interpret=interpret,
        )
        segments = splash_attention_kernel.SegmentIds(segments_BS, segments_BS)
        return jax.vmap(kernel)(q_BHSD, k_BGSD, v_BGSD, segments)

    axes = ("batch", head_axis(k.shape[2]), None, None)
    out = per_device(attend, args, (axes, axes, axes, ("batch", None)), ((axes, args[0].shape),))
    return out[:, :, :s].transpose(0, 2, 1, 3)
