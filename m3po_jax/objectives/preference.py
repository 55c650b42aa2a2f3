"""Preference losses by name: settings checked, losses mixed, implicit rewards beside them.

The formulas are in `objectives.loss_types`, the divergences in `objectives.divergences`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.objectives.divergences import divergence_score
from m3po_jax.objectives.loss_types import LOSSES, LossParameters, PairLogProbs
from m3po_jax.reading import check_value

__all__ = ["LOSSES", "MIXTURE", "check_loss", "loss_mixture", "preference_loss"]

# The `loss_type` that stands for the weighted sum in `loss_weights`.
MIXTURE = "mixture"


def check_loss(loss_type: str, beta: float, label_smoothing: float = 0.0) -> None:
    """Checks that the settings of one loss make sense (of a mixture: those that its parts share).

    Raises:
        UserError: unknown `loss_type` (the nearest name is suggested), `beta` not positive, or a
            `label_smoothing` outside the loss's domain.
    """
    for name, value in (("loss_type", loss_type), ("beta", beta), ("label_smoothing", label_smoothing)):
        check_value(TrainConfig, name, value, "train")
    if loss_type == "robust" and label_smoothing == 0.5:
        raise UserError("loss_type 'robust' needs label_smoothing below 0.5", where="train.label_smoothing")
    if loss_type == "exo_pair" and label_smoothing == 0:
        raise UserError(
            "loss_type 'exo_pair' needs label_smoothing above 0",
            where="train.label_smoothing",
            remedy="its authors advise 1e-3",
        )


def loss_mixture(
    loss_type: str,
    loss_weights: Mapping[str, float] | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
) -> dict[str, float]:
    """{name: weight} of the losses to compute: one of weight 1, or those of `loss_weights` that do not weigh 0.

    Raises:
        UserError: see `check_loss`, for each loss; weights with a `loss_type` other than ``mixture`` or the other
            way round; a weight that is negative or not finite, or all of them 0; a loss without a meaning under
            `f_divergence_type`; a `discopop_tau` that is not positive or a `simpo_gamma` that is not finite.
    """
    check_loss(loss_type, beta, label_smoothing)
    if loss_type != MIXTURE:
        if loss_weights:
            raise UserError(
                f"loss_weights mix losses, but loss_type is {loss_type!r}",
                where="train.loss_weights",
                remedy=f"set train.loss_type={MIXTURE}",
            )
        mixture = {loss_type: 1.0}
    else:
        check_value(TrainConfig, "loss_weights", dict(loss_weights or {}), "train")
        mixture = {name: float(weight) for name, weight in (loss_weights or {}).items() if weight > 0}
        if not mixture:
            raise UserError(
                "a mixture needs a loss of positive weight",
                where="train.loss_weights",
                remedy="MPO is {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}",
            )
    for name in mixture:
        check_loss(name, beta, label_smoothing)
        if f_divergence_type != "reverse_kl" and not LOSSES[name].divergences:
            raise UserError(
                f"loss {name!r} has no form under {f_divergence_type}",
                where="train.f_divergence_type",
                remedy="those with one are " + ", ".join(name for name, loss in LOSSES.items() if loss.divergences),
            )
    check_value(TrainConfig, "discopop_tau", discopop_tau, "train")
    check_value(TrainConfig, "simpo_gamma", simpo_gamma, "train")
    return mixture


def preference_loss(
    policy_chosen: Float[Array, " pairs"],
    policy_rejected: Float[Array, " pairs"],
    reference_chosen: Float[Array, " pairs"],
    reference_rejected: Float[Array, " pairs"],
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Num[Array, " pairs"] | None = None,
    rejected_lengths: Num[Array, " pairs"] | None = None,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    loss_weights: Mapping[str, float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    chosen_nll: Float[Array, " pairs"] | None = None,
    chosen_tokens: Num[Array, ""] | float | None = None,
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"], Float[Array, " pairs"]]:
    """Losses and implicit rewards of a batch of preference pairs.

    Args:
        policy_chosen: Σ_t log π(y_t) of the chosen answers, nats, EOS included; likewise the next three. Under
            LD-DPO the sums of `objectives.length`.
        loss_type: A key of `LOSSES`, or ``mixture``.
        beta: Inverse temperature of the implicit reward (τ of IPO, η⁻¹ of SPPO).
        label_smoothing: Assumed share of flipped labels; read by sigmoid (cDPO), robust, exo_pair, aot,
            aot_unpaired, simpo and cpo, ignored by the others.
        chosen_lengths: Response tokens, needed by ipo, sigmoid_norm, sft, simpo and orpo.
        discopop_tau: Width of DiscoPOP's gate.
        simpo_gamma: SimPO's target margin, in units of reward.
        loss_weights: ``mixture``: the loss is Σ weight·loss over these names, not normalised (TRL's `loss_type`
            and `loss_weights` lists). MPO (arXiv:2411.10442) is {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}.
        f_divergence_type: A name of `objectives.divergences.DIVERGENCES`; for losses on the difference of scores.
        f_alpha_divergence_coef: α of ``alpha_divergence``.
        chosen_nll: −Σ_t log π(y_t) of the chosen answers for ``sft``, where `policy_chosen` is not the plain sum.
        chosen_tokens: What ``sft`` divides their sum by; None: the sum of `chosen_lengths`, as in TRL.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [pairs]. The batch loss is the mean of `losses`.
        Rewards are β·(policy − reference) for every loss with a reference, whatever the divergence (TRL's
        convention), and β·policy without one (per-token means for simpo and orpo); they carry no gradient.

    Raises:
        UserError: see `loss_mixture`; or lengths missing where the loss needs them.
    """
    mixture = loss_mixture(
        loss_type,
        loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
    )
    entries = [LOSSES[name] for name in mixture]
    for name in mixture:
        if LOSSES[name].needs_lengths and (chosen_lengths is None or rejected_lengths is None):
            raise UserError(
                f"loss_type {name!r} averages over tokens", remedy="pass chosen_lengths and rejected_lengths"
            )
    x = PairLogProbs(
        jnp.asarray(policy_chosen),
        jnp.asarray(policy_rejected),
        jnp.asarray(reference_chosen),
        jnp.asarray(reference_rejected),
        None if chosen_lengths is None else jnp.asarray(chosen_lengths),
        None if rejected_lengths is None else jnp.asarray(rejected_lengths),
        divergence_score(f_divergence_type, f_alpha_divergence_coef),
        None if chosen_nll is None else jnp.asarray(chosen_nll),
        chosen_tokens,
    )
    parameters = LossParameters(beta, label_smoothing, discopop_tau, simpo_gamma)
    parts = [entry.function(x, parameters) for entry in entries]
    losses = sum((w * part for w, part in zip(mixture.values(), parts, strict=True)), jnp.zeros_like(parts[0]))
    if all(entry.reference_free for entry in entries):
        rewards = (x.policy_chosen, x.policy_rejected)
        rewards = x.per_token(*rewards) if all(entry.mean_rewards for entry in entries) else rewards
    else:
        rewards = (x.chosen_log_ratio, x.rejected_log_ratio)
    return losses, beta * jax.lax.stop_gradient(rewards[0]), beta * jax.lax.stop_gradient(rewards[1])
