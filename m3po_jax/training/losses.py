"""Losses of the three training objectives, as functions of a model and a batch.

Each returns its loss, its metrics (means over the batch's rows) and one loss per row, which names the guilty
rows when something is not finite. Under gradient accumulation the micro-batches' results are averaged.

`tokens` is what the sum of an NLL is divided by; None: the batch's own answer tokens. In training it is the number of
an average micro-batch: of the whole batch (`token_mean: batch`), which makes the average over micro-batches the token
mean of the batch, or of all data (`token_mean: data`), so that a token weighs the same whichever rows it shares a
batch with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from m3po_jax.config import TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.contrastive import ContrastiveBatch
from m3po_jax.models import lora
from m3po_jax.models.decoder import TokenScores
from m3po_jax.models.forward import branch_scores, encode_images
from m3po_jax.objectives.conditional import anchor_loss, conditional_logits, conditional_loss
from m3po_jax.objectives.length import length_desensitised_sums
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.preference import preference_loss
from m3po_jax.objectives.sft import token_nll

CORRUPTIONS = ("blank", "swap")


class LossOutput(NamedTuple):
    """`token_sums`: metrics that are means over answer tokens, as (sum, number of tokens), so that those of
    micro-batches add up."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    row_losses: Float[Array, " b"]
    token_sums: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def image_features(model: Any, batch: Any, *, remat: str = "none") -> Float[Array, "b m n v"] | None:
    """Tower features of a batch's images: those that it brings along (a frozen tower's, cached), or computed here."""
    if batch.features is not None:
        return batch.features
    return encode_images(model, batch.pixel_values, remat=remat)


def base_learns(config: TrainConfig) -> bool:
    """Whether more of the decoder than its adapters has gradients; see `Decoder.needed_states`."""
    return config.lora.lora_rank == 0


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


def _conditional(
    model: Any,
    reference_model: Any,
    batch: TreeBatch,
    features: Any,
    config: TrainConfig,
    policy: Float[Array, " b"],
    reference: Float[Array, " b"],
    remat: str,
) -> Float[Array, " b"]:
    """mDPO's conditional logits: the chosen answers once more, with corrupted images, in policy and reference.

    0 for rows without an image, which have nothing to corrupt.
    """
    if features is None:
        return jnp.zeros_like(policy)
    corrupted = corrupted_features(model, batch, features, config.conditional_image)
    chosen = batch._replace(branch_ids=batch.branch_ids[:, :1], branch_mask=batch.branch_mask[:, :1])
    policy_corrupted = answer_log_probs(model, chosen, corrupted, remat=remat, base_learns=base_learns(config))
    policy_corrupted = jnp.sum(policy_corrupted, axis=-1)[:, 0]
    reference_corrupted = reference_sums(reference_model, chosen, corrupted, remat=remat)[:, 0]
    return conditional_logits(policy, policy_corrupted, reference, reference_corrupted)


def preference(
    model: Any,
    batch: TreeBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """A preference loss of the family in `objectives.preference` on chosen (branch 0) and rejected (branch 1).

    Both answers and the prompt go through the policy in one pass. Loss = mean(losses) + `chosen_nll_weight` ×
    token-mean NLL of the chosen answers (RPO, arXiv:2404.19733) + `conditional_weight` × mean conditional loss +
    `anchor_weight` × mean anchor loss (mDPO, arXiv:2406.11839); a row's loss is its part without the NLL.

    With `ld_alpha` the losses and rewards read length-desensitised sums, as in TRL; the metrics ``logps`` and
    ``delta_logps`` and mDPO's terms keep the plain ones.

    Args:
        reference_model: Computes the reference in the same step, as it is, for every row, or for the rows without
            recorded log-probs when `config.reference` is ``recorded``. None: all recorded; what no record can hold
            (see `needs_reference_pass`) is computed by the policy without its adapters.
    """
    features = image_features(model, batch, remat=remat)
    scores = answer_scores(model, batch, features, remat=remat, base_learns=base_learns(config))
    log_probs = scores.log_probs
    policy, reference = jnp.sum(log_probs, axis=-1), batch.reference
    computed: Any = None
    desensitise_reference = config.ld_alpha is not None and config.ld_alpha_reference
    every_row_recorded = reference_model is None
    if every_row_recorded and needs_reference_pass(config):
        reference_model = adapters_off(model)
    if not every_row_recorded or desensitise_reference:
        # A frozen tower's features serve the reference too; an adapted tower's are the policy's own.
        seen = None if tower_learns(config) else features
        computed = reference_log_probs(reference_model, batch, seen, remat=remat)
    if not every_row_recorded:
        keep = jnp.isfinite(reference) & (config.reference == "recorded")
        reference = jnp.where(keep, reference, jnp.sum(computed, axis=-1))
    compared, compared_reference = policy, reference
    if config.ld_alpha is not None:
        compared = length_desensitised_sums(log_probs, batch.branch_mask, config.ld_alpha)
        if desensitise_reference:
            compared_reference = length_desensitised_sums(computed, batch.branch_mask, config.ld_alpha)
    lengths = jnp.sum(batch.branch_mask, axis=-1)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        compared[:, 0],
        compared[:, 1],
        compared_reference[:, 0],
        compared_reference[:, 1],
        loss_type=config.loss_type,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        discopop_tau=config.discopop_tau,
        simpo_gamma=config.simpo_gamma,
        loss_weights=config.loss_weights,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        chosen_nll=-policy[:, 0],
        chosen_tokens=tokens,
    )
    metrics = preference_metrics(
        policy[:, 0],
        policy[:, 1],
        reference[:, 0],
        reference[:, 1],
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
    )
    nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
    nll = nll / jnp.maximum(count if tokens is None else tokens, 1)
    metrics["nll/chosen"] = nll
    metrics["loss/preference"] = jnp.mean(losses)
    row_losses = losses
    if config.conditional_weight:
        logits = _conditional(model, reference_model, batch, features, config, policy[:, 0], reference[:, 0], remat)
        conditional = conditional_loss(logits, config.beta)
        row_losses = row_losses + config.conditional_weight * conditional
        metrics["loss/conditional"] = jnp.mean(conditional)
        metrics["rewards/conditional_margins"] = config.beta * jnp.mean(logits)
        metrics["rewards/conditional_accuracies"] = jnp.mean((logits > 0).astype(logits.dtype))
    if config.anchor_weight:
        anchor = anchor_loss(policy[:, 0], reference[:, 0], config.beta, config.anchor_delta)
        row_losses = row_losses + config.anchor_weight * anchor
        metrics["loss/anchor"] = jnp.mean(anchor)
    # TRL's: the mean of all logits of the vocabulary, over the tokens of either answer.
    logits_sums = {
        f"logits/{side}": (jnp.sum(scores.mean_logits[:, k]), jnp.sum(batch.branch_mask[:, k], dtype=jnp.float32))
        for k, side in enumerate(("chosen", "rejected"))
    }
    loss = jnp.mean(row_losses)
    if config.chosen_nll_weight:
        loss = loss + config.chosen_nll_weight * nll
    return LossOutput(loss, metrics, row_losses, token_sums(scores, batch.branch_mask) | logits_sums)


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


def sft(
    model: Any,
    batch: TreeBatch,
    config: TrainConfig,
    *,
    tokens: jax.Array | None = None,
    reference_model: Any = None,
    remat: str = "none",
) -> LossOutput:
    """Negative log-likelihood of the answers (K = 1), nats per token; see the module on `tokens`."""
    features = image_features(model, batch, remat=remat)
    scores = answer_scores(model, batch, features, remat=remat, base_learns=base_learns(config))
    log_probs = scores.log_probs
    nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
    loss = nll / jnp.maximum(count if tokens is None else tokens, 1)
    lengths = jnp.maximum(jnp.sum(batch.branch_mask[:, 0], axis=-1), 1)
    row_losses = -jnp.sum(log_probs[:, 0], axis=-1) / lengths
    metrics = {"nll/sequence": jnp.mean(row_losses)}
    return LossOutput(loss, metrics, row_losses, token_sums(scores, batch.branch_mask))


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
    return LossOutput(jnp.mean(row_losses), metrics, row_losses, {})


def needs_reference_pass(config: TrainConfig) -> bool:
    """Whether the reference must run in the step even where the generator's sums are recorded.

    Sums over an answer hold neither its tokens (`ld_alpha` on the reference) nor other images (mDPO's conditional
    term, the text-only accuracies).
    """
    if config.objective != "preference":
        return False
    desensitised = config.ld_alpha is not None and config.ld_alpha_reference
    return desensitised or config.conditional_weight > 0 or config.harm_metrics_steps > 0


def tower_learns(config: TrainConfig) -> bool:
    """Whether the vision tower's output changes in training: it learns, or carries adapters."""
    names = config.lora.target_modules if config.lora.lora_rank > 0 else []
    adapted = any(name.startswith("vision_tower.") for name in names)
    return config.train_vision or adapted or config.objective == "contrastive"
