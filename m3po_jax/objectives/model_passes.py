"""Passes of models over batches that losses are made of: image features, log-probs, corrupted images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.model_images import TOKENS
from m3po_jax.models import lora
from m3po_jax.models.decoder import TokenScores
from m3po_jax.models.forward import EncodedImages, blank_images, branch_scores, encode_images

CORRUPTIONS = ("blank", "swap")


def branch_inputs(batch: Any, images: EncodedImages | None) -> tuple[Any, ...]:
    """What the functions of `models.forward` and `models.heads` take after the model, of a `TreeBatch` or alike."""
    return batch.prefix_ids, batch.prefix_mask, images, batch.branch_ids, batch.branch_mask


def answer_scores(
    model: Any, batch: Any, images: EncodedImages | None, *, remat: str = "none", base_learns: bool = False
) -> TokenScores:
    """`models.forward.branch_scores` of the answers [b, k, t] of a `TreeBatch` or what has its fields, float32."""
    return branch_scores(model, *branch_inputs(batch, images), remat=remat, base_learns=base_learns)


def answer_log_probs(
    model: Any, batch: Any, images: EncodedImages | None, *, remat: str = "none", base_learns: bool = False
) -> Float[Array, "b k t"]:
    """log π of every answer token, nats, float32; 0 where masked."""
    return answer_scores(model, batch, images, remat=remat, base_learns=base_learns).log_probs


def token_sums(scores: TokenScores, mask: Bool[Array, "b k t"]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """TRL's ``entropy`` (over all answers) and ``mean_token_accuracy`` (over the first of each row)."""
    count = lambda x: jnp.sum(x, dtype=jnp.float32)  # noqa: E731
    return {
        "entropy": (jnp.sum(scores.entropy), count(mask)),
        "mean_token_accuracy": (count(scores.is_top1[:, 0]), count(mask[:, 0])),
    }


def reference_log_probs(
    model: Any, batch: TreeBatch, images: EncodedImages | None = None, *, remat: str = "none"
) -> Float[Array, "b k t"]:
    """log π_ref of every answer token, nats, without gradient, of the reference model as given.

    Args:
        images: None: the batch's own.
    """
    if images is None:
        images = encode_images(model, batch.images, remat=remat)
    return jax.lax.stop_gradient(answer_log_probs(model, batch, images, remat=remat))


def reference_sums(
    model: Any, batch: TreeBatch, images: EncodedImages | None = None, *, remat: str = "none"
) -> Float[Array, "b k"]:
    """Σ_t log π_ref of every answer, nats; see `reference_log_probs`."""
    return jnp.sum(reference_log_probs(model, batch, images, remat=remat), axis=-1)


def adapters_off(model: Any) -> Any:
    """The model's own reference where adapters are all that learns: a copy with them switched off, no gradient."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.lax.stop_gradient(state))
    lora.set_scale(copy, 0.0)
    return copy


def corrupted_images(model: Any, images: EncodedImages, corruption: str) -> EncodedImages:
    """Images that say nothing about their row.

    ``blank``: those of the mean colour, as in the `prior` confidence. ``swap``: those of the row before in the batch,
    which needs at least two rows; a row may meet its own image where a batch holds one image twice. Features go from
    row to row in their order, the first to the first image token; where the row before has fewer, blank ones follow,
    and where it has more, the last are not seen. Positions stay those of the row's own images.
    """
    features = images.features
    rows, most = features.shape[:2]

    def blank() -> Float[Array, "b f v"]:
        return blank_images(model, images.layout, rows, most).features.astype(features.dtype)

    if corruption == "blank":
        return images._replace(features=blank())
    counts = jnp.sum(images.layout[TOKENS], axis=1)
    others = jnp.roll(counts, 1)
    # Blank images are computed only where a row needs them.
    filler = jax.lax.cond(jnp.all(others >= counts), lambda: jnp.zeros_like(features), blank)
    given = (jnp.arange(most) < others[:, None])[..., None]
    return images._replace(features=jnp.where(given, jnp.roll(features, 1, axis=0), filler))


def text_only_accuracies(model: Any, batch: TreeBatch, *, reference_model: Any) -> dict[str, Float[Array, ""]]:
    """Preference accuracy on images that say nothing about their row: what was learned from the text alone.

    ``rewards/accuracies_blank`` and ``rewards/accuracies_swap`` (see `corrupted_images`; the second not for
    batches of one row) are the shares of pairs whose implicit reward margin, β(r_w − r_l), stays above 0. Beside
    ``rewards/accuracies`` of the same step: where the three agree, the images were not needed. Empty for batches
    without images.

    Args:
        reference_model: As it is to be read (`adapters_off` makes one of the policy).
    """
    images = encode_images(model, batch.images)
    if images is None:
        return {}
    accuracies = {}
    for corruption in CORRUPTIONS:
        if corruption == "swap" and images.features.shape[0] == 1:
            continue
        corrupted = corrupted_images(model, images, corruption)
        policy = jnp.sum(answer_log_probs(model, batch, corrupted), axis=-1)
        ratios = policy - reference_sums(reference_model, batch, corrupted)
        right = ratios[:, 0] > ratios[:, 1]
        accuracies[f"rewards/accuracies_{corruption}"] = jnp.mean(right.astype(jnp.float32))
    return accuracies
