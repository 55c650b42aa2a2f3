"""A scalar head on a model's hidden states: the reward of an answer, or the value of a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.forward import EncodedImages, branch_hidden

HEAD = "scalar_head"  # the attribute of a model that has one, and the first part of its parameter's path
INITIAL_STD = 0.02  # as transformers' classification heads


class ScalarHead(nnx.Module):
    """h · w in float32, whatever the backbone computes in.

    It starts near 0, but not at 0, where no gradient would reach the backbone in the first step.
    """

    def __init__(self, features: int, rngs: nnx.Rngs):
        kernel = INITIAL_STD * jax.random.normal(rngs.params(), (features,), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("embed",))

    def __call__(self, hidden: Float[Array, "... d"]) -> Float[Array, ...]:
        """A number for each state."""
        precision = jax.lax.Precision.HIGHEST
        return jnp.matmul(hidden.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision=precision)


def attach_head(model: Any, seed: int = 0) -> Any:
    """Gives a vision-language model a fresh head, drawn from `seed`, and returns it."""
    setattr(model, HEAD, ScalarHead(model.config.text.hidden_size, nnx.Rngs(seed)))
    return model


def detach_head(model: Any) -> Any:
    """Takes the head off, where there is one: what generates and is exported has none."""
    if hasattr(model, HEAD):
        delattr(model, HEAD)
    return model


def answer_rewards(
    model: Any,
    prefix_ids: Int[Array, "b p"],
    prefix_mask: Bool[Array, "b p"],
    images: EncodedImages | None,
    branch_ids: Int[Array, "b k t"],
    branch_mask: Bool[Array, "b k t"],
    *,
    remat: str = "none",
    base_learns: bool = False,
) -> Float[Array, "b k"]:
    """The head's reading of the hidden state after each answer's last token; the prompt is encoded once.

    `base_learns` is that of `branch_hidden`.
    """
    # `branch_hidden` gives the state before each slot; one more, masked slot gives the state after the last token.
    more = ((0, 0), (0, 0), (0, 1))
    ids, mask = jnp.pad(branch_ids, more), jnp.pad(branch_mask, more)
    hidden = branch_hidden(model, prefix_ids, prefix_mask, images, ids, mask, remat=remat, base_learns=base_learns)
    after = jnp.sum(branch_mask, axis=-1, dtype=jnp.int32)[..., None, None]
    return model.scalar_head(jnp.take_along_axis(hidden, after, axis=2)[:, :, 0])
