"""Losses of the three training objectives, as functions of a model and a batch.

Each returns its loss, its metrics (means over the batch's rows) and one loss per row, which names the guilty
rows when something is not finite. Under gradient accumulation the micro-batches' results are averaged;
`tokens` is then the mean number of answer tokens of a micro-batch, which makes that average equal the token
mean of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3po_jax.config import TrainConfig
from m3po_jax.data.batches import ContrastiveBatch, TreeBatch
from m3po_jax.errors import UserError, nearest
from m3po_jax.models import lora
from m3po_jax.models.forward import branch_log_probs, encode_images
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.preference import preference_loss
from m3po_jax.objectives.sft import token_nll

# Losses that couple the rows of a batch: a micro-batch's value is not a share of the whole batch's.
COUPLED_LOSSES = frozenset({"aot", "aot_unpaired", "sft"})
# Losses whose value is ln 2 where policy and reference agree, whatever β and the smoothing.
LN2_LOSSES = frozenset({"sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired"})


class LossOutput(NamedTuple):
    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    row_losses: Float[Array, " b"]


def _answer_log_probs(model: Any, batch: TreeBatch, features: Any, remat: str) -> Float[Array, "b k t"]:
    log_probs = branch_log_probs(
        model,
        batch.prefix_ids,
        batch.prefix_mask,
        features,
        batch.branch_ids,
        batch.branch_mask,
        remat=remat,
    )
    return log_probs.astype(jnp.float32)


def reference_sums(model: Any, batch: TreeBatch, features: Any = None, *, remat: str = "none") -> Float[Array, "b k"]:
    """Σ_t log π_ref of every answer, nats: the given model, adapters switched off, without gradient."""
    lora.set_scale(model, 0.0)
    if features is None:
        features = encode_images(model, batch.pixel_values, remat=remat)
    return jax.lax.stop_gradient(jnp.sum(_answer_log_probs(model, batch, features, remat), axis=-1))


def preference(
    model: Any,
    batch: TreeBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """A preference loss of the family in `objectives.preference` on chosen (branch 0) and rejected (branch
    1).

    Both answers and the prompt go through the policy in one pass. Loss = mean(losses) + `chosen_nll_weight` ×
    token-mean NLL of the chosen answers (RPO, arXiv:2404.19733).

    Args:
        reference_model: Computes the reference in the same step (its adapters are switched off) for every
            row, or for the rows without recorded log-probs when `config.reference` is ``recorded``. None: all
            recorded.
    """
    features = encode_images(model, batch.pixel_values, remat=remat)
    log_probs = _answer_log_probs(model, batch, features, remat)
    policy = jnp.sum(log_probs, axis=-1)
    reference = batch.reference
    if reference_model is not None:
        # The tower is frozen in preference training, so its features serve the reference too.
        computed = reference_sums(reference_model, batch, features, remat=remat)
        keep = jnp.isfinite(reference) & (config.reference == "recorded")
        reference = jnp.where(keep, reference, computed)
    lengths = jnp.sum(batch.branch_mask, axis=-1)
    pair = (policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
    losses, chosen_rewards, rejected_rewards = preference_loss(
        *pair,
        loss_type=config.loss_type,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
    )
    metrics = preference_metrics(
        *pair,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
    )
    nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
    nll = nll / jnp.maximum(count if tokens is None else tokens, 1)
    metrics["nll/chosen"] = nll
    metrics["loss/preference"] = jnp.mean(losses)
    loss = jnp.mean(losses)
    if config.chosen_nll_weight:
        loss = loss + config.chosen_nll_weight * nll
    return LossOutput(loss, metrics, losses)


def sft(
    model: Any,
    batch: TreeBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """Token-mean negative log-likelihood of the answers (K = 1), nats."""
    features = encode_images(model, batch.pixel_values, remat=remat)
    log_probs = _answer_log_probs(model, batch, features, remat)
    nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
    loss = nll / jnp.maximum(count if tokens is None else tokens, 1)
    lengths = jnp.maximum(jnp.sum(batch.branch_mask[:, 0], axis=-1), 1)
    row_losses = -jnp.sum(log_probs[:, 0], axis=-1) / lengths
    return LossOutput(loss, {"nll/sequence": jnp.mean(row_losses)}, row_losses)


def contrastive(
    model: Any,
    batch: ContrastiveBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """SigLIP's sigmoid loss (arXiv:2303.15343, eq. 1) of a dual encoder, nats per image."""
    images = model.encode_image(batch.pixel_values, remat=remat)
    texts = model.encode_text(batch.text_ids, batch.text_mask)
    logits = model.logits(images, texts)
    known = batch.labels != 0
    row_losses = -jnp.sum(jnp.where(known, jax.nn.log_sigmoid(batch.labels * logits), 0.0), axis=1)
    true = batch.labels > 0
    metrics = {
        "accuracy": jnp.mean((logits > 0) == true),
        "recall": jnp.mean(jnp.sum((logits > 0) & true, axis=1) / jnp.maximum(jnp.sum(true, axis=1), 1)),
        "logit_scale": jnp.exp(model.logit_scale[...])[0],
    }
    return LossOutput(jnp.mean(row_losses), metrics, row_losses)


OBJECTIVES: dict[str, Callable[..., LossOutput]] = {
    "preference": preference,
    "sft": sft,
    "contrastive": contrastive,
}


def check_objective(config: TrainConfig) -> Callable[..., LossOutput]:
    """The objective's loss function, once the settings that concern it are known to make sense.

    Raises:
        UserError: see the messages.
    """
    from m3po_jax.objectives.preference import check_loss

    if config.objective not in OBJECTIVES:
        raise UserError(
            f"unknown objective {config.objective!r}{nearest(config.objective, OBJECTIVES)}",
            where="train.objective",
        )
    if config.gradient_accumulation_steps < 1 or config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {config.gradient_accumulation_steps} parts",
            where="train.gradient_accumulation_steps",
        )
    if config.objective == "preference":
        check_loss(config.loss_type, config.beta, config.label_smoothing)
        if config.reference not in ("recorded", "computed"):
            raise UserError(
                f"reference is recorded or computed, not {config.reference!r}",
                where="train.reference",
            )
        if config.gradient_accumulation_steps > 1 and config.loss_type in COUPLED_LOSSES:
            raise UserError(
                f"loss_type {config.loss_type!r} couples the rows of a batch and cannot be accumulated",
                where="train.gradient_accumulation_steps",
                remedy="set it to 1",
            )
    if config.train_vision and config.objective == "preference":
        raise UserError("the vision tower learns in sft only", where="train.train_vision", remedy="set false")
    return OBJECTIVES[config.objective]
