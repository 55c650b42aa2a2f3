"""A decode step's attention in two parts: the prompt's keys, shared by its candidates, and a lane's own.

Shape suffixes: N prompts, L lanes, G key/value heads, R query heads of each, M queries that share keys, P prefix
tokens, C slots of a lane's cache, D head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.attention_parts import Part, part
from m3po_jax.models.kernels.choice import decode_kernel


def prefix_attention(
    q: Float[Array, "n g m d"],
    kv: tuple[Float[Array, "n g p d"], Float[Array, "n g p d"]],
    length: Int[Array, " n"],
    kind: str = "xla",
    first: Int[Array, "n m"] | None = None,
    soft_cap: float | None = None,
) -> Part:
    """The queries of a prompt's candidates and heads to the first `length` of its keys, read once for all of them.

    Args:
        kind: which attention computes it, see `models.kernels.choice`; XLA does where there is `first`.
        first: the first key that a query sees, in a layer with a window; None: the prompt's first.
        soft_cap: see `models.layers.soft_capped`.
    """
    kernel = decode_kernel(kind)
    if kernel is not None and first is None:
        return Part(*kernel(q, *kv, length, soft_cap))
    places = jnp.arange(kv[0].shape[2])
    visible = places < length[:, None, None, None]
    if first is not None:
        visible &= places >= first[:, None, :, None]
    with jax.named_scope("prefix"):
        return part("ngmd,ngpd->ngmp", "ngmp,ngpd->ngmd", q, kv, visible, soft_cap)


def own_attention(
    q: Float[Array, "l g r d"],
    kv: tuple[Float[Array, "l g c d"], Float[Array, "l g c d"]],
    visible: Bool[Array, "l c"],
    soft_cap: float | None = None,
) -> Part:
    """A lane's queries to the slots of its own cache that hold its answer."""
    with jax.named_scope("answers"):
        return part("lgrd,lgcd->lgrc", "lgrc,lgcd->lgrd", q, kv, visible[:, None, None], soft_cap)
