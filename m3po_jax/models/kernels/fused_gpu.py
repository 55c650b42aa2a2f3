"""Self-attention on GPUs by cuDNN's fused kernel, through jax's own entry point, gradient included."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from m3po_jax.models.kernels.mesh import head_axis, per_device

TOKENS = 64  # cuDNN's kernels with a mask want even lengths; whole tiles are safe in every version


def fused_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "b s"],
    *,
    causal: bool,
    window: int | None = None,
    visible: Bool[Array, "b s s"] | None = None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "b s h d"]:
    """Grouped-query self-attention over the unpadded tokens; padded positions hold values of no meaning.

    Args:
        window, visible: As of `choice.self_attention`.
        implementation: ``cudnn`` (bfloat16 and float16 only) or ``xla``, which tests the same call on a CPU.
    """
    s = q.shape[1]
    padded = -(-s // TOKENS) * TOKENS
    wider = lambda x: jnp.pad(x, ((0, 0), (0, padded - s), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    pairs = () if visible is None else (jnp.pad(visible, ((0, 0), (0, padded - s), (0, padded - s))),)
    args = (wider(q), wider(k), wider(v), wider(mask), *pairs)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask_BS: jax.Array, *pairs_BSS: jax.Array) -> jax.Array:
        may = mask_BS[:, None, :]
        for pairs in pairs_BSS:
            may = may & pairs
        # A padded query sees itself: a row without any key would be NaN, and its gradient would spread.
        may = may | jnp.eye(padded, dtype=bool)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=may[:, None],
            is_causal=causal and visible is None,
            local_window_size=None if window is None or visible is not None else (window - 1, 0),
            implementation=implementation,
        )

    axes = ("batch", None, head_axis(k.shape[2]), None)
    of_masks = (("batch", None), *(("batch", None, None) for _ in pairs))
    out = per_device(attend, args, (axes, axes, axes, *of_masks), ((axes, args[0].shape),))
    return out[:, :s]
