"""Contrastive losses of dual encoders: SigLIP's sigmoid loss and CLIP's softmax loss.

Embeddings are normalised inside (which changes nothing for embeddings that already are), and `scale` is the
multiplier of the cosine itself: checkpoints store its logarithm.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def _normalise(embeddings: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    squared = jnp.sum(embeddings**2, axis=-1, keepdims=True)
    # A zero vector stays zero, with a zero gradient, instead of turning the batch into NaN.
    usable = squared > jnp.finfo(embeddings.dtype).tiny
    return embeddings * jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, squared, 1.0)), 0.0)


def similarity_logits(
    image_embeddings: Float[Array, "images width"],
    text_embeddings: Float[Array, "texts width"],
    scale: float | Float[Array, ""],
    bias: float | Float[Array, ""] = 0.0,
) -> Float[Array, "images texts"]:
    """scale · cosine(image, text) + bias."""
    cosine = jnp.einsum("id,td->it", _normalise(image_embeddings), _normalise(text_embeddings))
    return scale * cosine + bias


def sigmoid_contrastive_loss(
    image_embeddings: Float[Array, "images width"],
    text_embeddings: Float[Array, "texts width"],
    labels: Num[Array, "images texts"],
    scale: float | Float[Array, ""],
    bias: float | Float[Array, ""],
) -> Float[Array, ""]:
    """SigLIP's loss, −1/images · Σ_ij log σ(label_ij · (scale·cos_ij + bias)) (arXiv:2303.15343, eq. 1).

    Args:
        labels: +1 where text j is true of image i, −1 where it is not, 0 where nobody knows (left out). An
            image may have several true texts and a text several images; SigLIP's own case is 2·I − 1.
        scale: exp of the checkpoint's `logit_scale`.
        bias: The checkpoint's `logit_bias`.

    Returns:
        Nats per image.
    """
    logits = similarity_logits(image_embeddings, text_embeddings, scale, bias)
    log_likelihood = jnp.where(labels == 0, 0.0, jax.nn.log_sigmoid(labels * logits))
    return -jnp.sum(log_likelihood) / image_embeddings.shape[0]


def softmax_contrastive_loss(
    image_embeddings: Float[Array, "batch width"],
    text_embeddings: Float[Array, "batch width"],
    scale: float | Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's symmetric InfoNCE: text i belongs to image i and to no other (arXiv:2103.00020, figure 3).

    Returns:
        Nats per example, the mean of the two directions.
    """
    logits = similarity_logits(image_embeddings, text_embeddings, scale)
    of_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    of_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(jnp.mean(of_image) + jnp.mean(of_text)) / 2
