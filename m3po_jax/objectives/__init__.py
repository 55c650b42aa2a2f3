"""Training objectives: pure functions of arrays."""

from m3po_jax.objectives.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.preference import LOSSES, check_loss, preference_loss
from m3po_jax.objectives.sft import sft_loss, token_nll

__all__ = [
    "LOSSES",
    "check_loss",
    "preference_loss",
    "preference_metrics",
    "sft_loss",
    "sigmoid_contrastive_loss",
    "softmax_contrastive_loss",
    "token_nll",
]
