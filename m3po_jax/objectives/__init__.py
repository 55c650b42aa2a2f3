"""The room of losses: what is learned from which rows, by which formula.

Formulas are pure functions of arrays: `loss_types` and `pair_loss` (preference), `divergences`, `length`,
`conditional`, `policy_gradient`, `metrics`. Beside them stand the objectives, one file each (`preference`, `sft`,
`reward`, `rlhf`, `contrastive`), made of `model_passes`; `objective` says what an objective is and `registry` names
them all.
"""

from m3po_jax.objectives.conditional import anchor_loss, conditional_logits, conditional_loss
from m3po_jax.objectives.contrastive import sigmoid_contrastive_loss
from m3po_jax.objectives.divergences import DIVERGENCES, divergence_score
from m3po_jax.objectives.length import length_desensitised_sums
from m3po_jax.objectives.loss_types import LOSSES
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.pair_loss import MIXTURE, PairLoss, preference_loss
from m3po_jax.objectives.reward import reward_loss
from m3po_jax.objectives.sft import token_nll

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "MIXTURE",
    "PairLoss",
    "anchor_loss",
    "conditional_logits",
    "conditional_loss",
    "divergence_score",
    "length_desensitised_sums",
    "preference_loss",
    "preference_metrics",
    "reward_loss",
    "sigmoid_contrastive_loss",
    "token_nll",
]
