"""Training objectives: pure functions of arrays."""

from m3po_jax.objectives.conditional import anchor_loss, conditional_logits, conditional_loss
from m3po_jax.objectives.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from m3po_jax.objectives.divergences import DIVERGENCES, divergence_score
from m3po_jax.objectives.length import length_desensitised_sums
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.preference import LOSSES, MIXTURE, check_loss, loss_mixture, preference_loss
from m3po_jax.objectives.reward import reward_loss
from m3po_jax.objectives.sft import sft_loss, token_nll

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "MIXTURE",
    "anchor_loss",
    "check_loss",
    "conditional_logits",
    "conditional_loss",
    "divergence_score",
    "length_desensitised_sums",
    "loss_mixture",
    "preference_loss",
    "preference_metrics",
    "reward_loss",
    "sft_loss",
    "sigmoid_contrastive_loss",
    "softmax_contrastive_loss",
    "token_nll",
]
