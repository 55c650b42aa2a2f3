"""Preference losses by name: settings checked, losses mixed, implicit rewards beside them.

The formulas are in `objectives.loss_types`, the divergences in `objectives.divergences`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.objectives.divergences import REVERSE_KL, divergence_score
from m3po_jax.objectives.loss_types import LOSSES, PairLogProbs, PreferenceLoss
from m3po_jax.reading import check_value

# The `loss_type` that stands for the weighted sum in `loss_weights`.
MIXTURE = "mixture"

# What formulas read: keys under `train`. `beta` also scales the implicit rewards.
PARAMETERS = tuple(sorted({name for loss in LOSSES.values() for name in loss.parameters}))

Pairs = Float[Array, " pairs"]


@dataclass(frozen=True)
class PairLoss:
    """A loss of `LOSSES` or a weighted sum of some, with the parameters that they read.

    Attributes:
        loss_type: A key of `LOSSES`, or ``mixture``.
        loss_weights: ``mixture``: (name, weight) of each loss; the sum is not normalised.
        parameters: (name, value) of `PARAMETERS`.
        f_divergence_type: A name of `DIVERGENCES`; for losses on the difference of scores.
        f_alpha_divergence_coef: α of ``alpha_divergence``.
    """

    loss_type: str
    loss_weights: tuple[tuple[str, float], ...]
    parameters: tuple[tuple[str, float], ...]
    f_divergence_type: str
    f_alpha_divergence_coef: float

    @classmethod
    def of(cls, config: TrainConfig) -> PairLoss:
        """The loss that `train` names; `check` says whether it makes sense."""
        return cls(
            config.loss_type,
            tuple(config.loss_weights.items()),
            tuple((name, getattr(config, name)) for name in PARAMETERS),
            config.f_divergence_type,
            config.f_alpha_divergence_coef,
        )

    @property
    def beta(self) -> float:
        return dict(self.parameters)["beta"]

    @property
    def mixture(self) -> dict[str, float]:
        """{name: weight} of the losses to compute: one of weight 1, or those of `loss_weights` above 0."""
        if self.loss_type != MIXTURE:
            return {self.loss_type: 1.0}
        return {name: float(weight) for name, weight in self.loss_weights if weight > 0}

    @property
    def parts(self) -> list[PreferenceLoss]:
        return [LOSSES[name] for name in self.mixture]

    def check(self) -> None:
        """
        Raises:
            UserError: an unknown loss or divergence (the nearest name is suggested); a parameter outside its range,
                or where the formula has no meaning; weights with a `loss_type` other than ``mixture`` or the other
                way round; a weight that is negative or not finite, or all of them 0; a loss without a meaning under
                the divergence.
        """
        check_value(TrainConfig, "loss_type", self.loss_type, "train")
        for name, value in self.parameters:
            check_value(TrainConfig, name, value, "train")
        if self.loss_type != MIXTURE and self.loss_weights:
            raise UserError(
                f"loss_weights mix losses, but loss_type is {self.loss_type!r}",
                where="train.loss_weights",
                remedy=f"set train.loss_type={MIXTURE}",
            )
        check_value(TrainConfig, "loss_weights", dict(self.loss_weights), "train")
        if not self.mixture:
            raise UserError(
                "a mixture needs a loss of positive weight",
                where="train.loss_weights",
                remedy="MPO is {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}",
            )
        divergence_score(self.f_divergence_type, self.f_alpha_divergence_coef)
        with_divergences = ", ".join(name for name, loss in LOSSES.items() if loss.divergences)
        for name in self.mixture:
            loss, excluded = LOSSES[name], LOSSES[name].excluded
            if excluded is not None and dict(self.parameters)[excluded.parameter] == excluded.value:
                raise UserError(
                    f"loss_type {name!r} needs {excluded.parameter} {excluded.needs}",
                    where=f"train.{excluded.parameter}",
                    remedy=excluded.remedy,
                )
            if self.f_divergence_type != REVERSE_KL and not loss.divergences:
                raise UserError(
                    f"loss {name!r} has no form under {self.f_divergence_type}",
                    where="train.f_divergence_type",
                    remedy=f"those with one are {with_divergences}",
                )

    def __call__(self, x: PairLogProbs) -> tuple[Pairs, Pairs, Pairs]:
        """(losses, chosen_rewards, rejected_rewards) of a batch, under the divergence; see `preference_loss`."""
        for name in self.mixture:
            if LOSSES[name].needs_lengths and (x.chosen_lengths is None or x.rejected_lengths is None):
                raise UserError(
                    f"loss_type {name!r} averages over tokens", remedy="pass chosen_lengths and rejected_lengths"
                )
        score = divergence_score(self.f_divergence_type, self.f_alpha_divergence_coef)
        x = dataclasses.replace(x, score=score)
        losses, parameters, parts = jnp.zeros_like(x.policy_chosen), dict(self.parameters), self.parts
        for weight, loss in zip(self.mixture.values(), parts, strict=True):
            losses = losses + weight * loss.function(x, **{name: parameters[name] for name in loss.parameters})
        if all(loss.reference_free for loss in parts):
            rewards = (x.policy_chosen, x.policy_rejected)
            rewards = x.per_token(*rewards) if all(loss.mean_rewards for loss in parts) else rewards
        else:
            rewards = (x.chosen_log_ratio, x.rejected_log_ratio)
        beta = self.beta
        return losses, beta * jax.lax.stop_gradient(rewards[0]), beta * jax.lax.stop_gradient(rewards[1])

    def at_reference(self, nats: float) -> tuple[float, float] | None:
        """The loss of a pair where policy and reference agree, and how far it moves when both log-ratios are off by
        `nats` in opposite directions; None where a loss reads the policy alone."""
        if not all(loss.of_ratios and not loss.reference_free for loss in self.parts):
            return None
        zero, one = jnp.zeros(1), jnp.ones(1)

        def value(ratio: float) -> float:  # alone, because the coupled losses would sort several
            return float(self(PairLogProbs(ratio * one, -ratio * one, zero, zero, one, one))[0][0])

        start = value(0.0)
        return start, max(abs(value(ratio) - start) for ratio in (nats, -nats))


def preference_loss(
    policy_chosen: Pairs,
    policy_rejected: Pairs,
    reference_chosen: Pairs,
    reference_rejected: Pairs,
    *,
    loss_type: str = "sigmoid",
    loss_weights: Mapping[str, float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    chosen_lengths: Num[Array, " pairs"] | None = None,
    rejected_lengths: Num[Array, " pairs"] | None = None,
    chosen_nll: Pairs | None = None,
    chosen_tokens: Num[Array, ""] | float | None = None,
    **parameters: float,
) -> tuple[Pairs, Pairs, Pairs]:
    """Losses and implicit rewards of a batch of preference pairs.

    Args:
        policy_chosen: Σ_t log π(y_t) of the chosen answers, nats, EOS included; likewise the next three. Under
            LD-DPO the sums of `objectives.length`.
        loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef: As of `PairLoss`.
        chosen_lengths: Response tokens, needed by ipo, sigmoid_norm, sft, simpo and orpo.
        chosen_nll: −Σ_t log π(y_t) of the chosen answers for ``sft``, where `policy_chosen` is not the plain sum.
        chosen_tokens: What ``sft`` divides their sum by; None: the sum of `chosen_lengths`, as in TRL.
        parameters: Of the formulas, by the names of `PARAMETERS`; others have the defaults of a recipe's `train`:
            `beta`, the inverse temperature of the implicit reward (τ of IPO, η⁻¹ of SPPO); `label_smoothing`, the
            assumed share of flipped labels, which only some losses read; and those of one loss.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [pairs]. The batch loss is the mean of `losses`.
        Rewards are β·(policy − reference) for every loss with a reference, whatever the divergence (TRL's
        convention), and β·policy without one (per-token means for simpo and orpo); they carry no gradient.

    Raises:
        UserError: see `PairLoss.check`; or lengths missing where the loss needs them.
        TypeError: a parameter that no loss has.
    """
    if unknown := set(parameters).difference(PARAMETERS):
        raise TypeError(f"no loss has a parameter {sorted(unknown)[0]!r}")
    defaults = TrainConfig()
    loss = PairLoss(
        loss_type,
        tuple((loss_weights or {}).items()),
        tuple((name, parameters.get(name, getattr(defaults, name))) for name in PARAMETERS),
        f_divergence_type,
        f_alpha_divergence_coef,
    )
    loss.check()
    x = PairLogProbs(
        jnp.asarray(policy_chosen),
        jnp.asarray(policy_rejected),
        jnp.asarray(reference_chosen),
        jnp.asarray(reference_rejected),
        None if chosen_lengths is None else jnp.asarray(chosen_lengths),
        None if rejected_lengths is None else jnp.asarray(rejected_lengths),
        chosen_nll=None if chosen_nll is None else jnp.asarray(chosen_nll),
        chosen_tokens=chosen_tokens,
    )
    return loss(x)
