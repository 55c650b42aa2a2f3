"""Passes of models over batches that losses are made of: image features, log-probs, corrupted images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from m3po_jax.data.collation import TreeBatch
from m3po_jax.models import lora
from m3po_jax.models.decoder import TokenScores
from m3po_jax.models.forward import branch_scores, encode_images

CORRUPTIONS = ("blank", "swap")


def image_features(model: Any, batch: Any, *, remat: str = "none") -> Float[Array, "b m n v"] | None:
    """Tower features of a batch's images: those that it brings along (a frozen tower's, cached), or computed here."""
    if batch.features is not None:
        return batch.features
    return encode_images(model, batch.pixel_values, remat=remat)


def branch_inputs(batch: Any, features: Any) -> tuple[Any, ...]:
    """What the functions of `models.forward` and `models.heads` take after the model, of a `TreeBatch` or alike."""
    return batch.prefix_ids, batch.prefix_mask, features, batch.branch_ids, batch.branch_mask


def answer_scores(
    model: Any, batch: Any, features: Any, *, remat: str = "none", base_learns: bool = False
) -> TokenScores:
    """`models.forward.branch_scores` of the answers [b, k, t] of a `TreeBatch` or what has its fields, float32."""
    return branch_scores(model, *branch_inputs(batch, features), remat=remat, base_learns=base_learns)


def answer_log_probs(
    model: Any, batch: Any, features: Any, *, remat: str = "none", base_learns: bool = False
) -> Float[Array, "b k t"]:
    """log π of every answer token, nats, float32; 0 where masked."""
    return answer_scores(model, batch, features, remat=remat, base_learns=base_learns).log_probs


def token_sums(scores: TokenScores, mask: Bool[Array, "b k t"]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """TRL's ``entropy`` (over all answers) and ``mean_token_accuracy`` (over the first of each row)."""
    count = lambda x: jnp.sum(x, dtype=jnp.float32)  # noqa: E731
    return {
        "entropy": (jnp.sum(scores.entropy), count(mask)),
        "mean_token_accuracy": (count(scores.is_top1[:, 0]), count(mask[:, 0])),
    }


def reference_log_probs(
    model: Any, batch: TreeBatch, features: Any = None, *, remat: str = "none"
) -> Float[Array, "b k t"]:
    """log π_ref of every answer token, nats, without gradient, of the reference model as given."""
    if features is None:
        features = image_features(model, batch, remat=remat)
    return jax.lax.stop_gradient(answer_log_probs(model, batch, features, remat=remat))


def reference_sums(model: Any, batch: TreeBatch, features: Any = None, *, remat: str = "none") -> Float[Array, "b k"]:
    """Σ_t log π_ref of every answer, nats; see `reference_log_probs`."""
    return jnp.sum(reference_log_probs(model, batch, features, remat=remat), axis=-1)


def adapters_off(model: Any) -> Any:
    """The model's own reference where adapters are all that learns: a copy with them switched off, no gradient."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.lax.stop_gradient(state))
    lora.set_scale(copy, 0.0)
    return copy


def corrupted_features(
    model: Any, batch: TreeBatch, features: Float[Array, "b m n v"], corruption: str
) -> Float[Array, "b m n v"]:
    """Image features that say nothing about their row.

    ``blank``: those of the processor's mean colour (zeros after normalisation), as in the `prior` confidence.
    ``swap``: those of the row before in the batch, which needs at least two rows; a row may meet its own image
    where a batch holds one image twice.
    """
    if corruption == "swap":
        return jnp.roll(features, 1, axis=0)
    if batch.blank_features is not None:
        return jnp.broadcast_to(batch.blank_features.astype(features.dtype), features.shape)
    assert batch.pixel_values is not None
    blank = model.image_features(jnp.zeros_like(batch.pixel_values[0, :1]))
    return jnp.broadcast_to(blank, features.shape)


def text_only_accuracies(model: Any, batch: TreeBatch, *, reference_model: Any) -> dict[str, Float[Array, ""]]:
    """Preference accuracy on images that say nothing about their row: what was learned from the text alone.

    ``rewards/accuracies_blank`` and ``rewards/accuracies_swap`` (see `corrupted_features`; the second not for
    batches of one row) are the shares of pairs whose implicit reward margin, β(r_w − r_l), stays above 0. Beside
    ``rewards/accuracies`` of the same step: where the three agree, the images were not needed. Empty for batches
    without images.

    Args:
        reference_model: As it is to be read (`adapters_off` makes one of the policy).
    """
    features = image_features(model, batch)
    if features is None:
        return {}
    accuracies = {}
    for corruption in CORRUPTIONS:
        if corruption == "swap" and features.shape[0] == 1:
            continue
        corrupted = corrupted_features(model, batch, features, corruption)
        policy = jnp.sum(answer_log_probs(model, batch, corrupted), axis=-1)
        ratios = policy - reference_sums(reference_model, batch, corrupted)
        right = ratios[:, 0] > ratios[:, 1]
        accuracies[f"rewards/accuracies_{corruption}"] = jnp.mean(right.astype(jnp.float32))
    return accuracies
