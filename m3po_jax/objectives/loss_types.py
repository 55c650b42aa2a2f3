"""The formulas of the preference losses: pure functions of per-sequence log-probabilities, under TRL's names.

Every loss takes sums over response tokens (nats) and gives one loss per pair; the batch loss is their mean.
`objectives.pair_loss` checks settings, mixes losses and adds the implicit rewards.
A loss is a function, whose keyword arguments are keys under `train`, and one entry of `LOSSES`.
The reference of comparison is TRL 1.16 (`trl.trainer.dpo_trainer`; the experimental CPO and ORPO trainers).
Where conventions differ between versions or papers, both are here under names of their own:

- ``sigmoid`` honours `label_smoothing` as conservative DPO does (TRL up to 0.26); TRL 1.16 ignores it. With
  smoothing 0 all agree. ``sigmoid_trl`` is TRL 1.16's, which matters in a mixture with a loss that needs
  smoothing. The unbiased form of the same idea is ``robust``.
- ``ipo`` averages log-ratios per token, as TRL does; ``ipo_sum`` is the paper's, on sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from m3po_jax.objectives.divergences import keyword_parameters, reverse_kl

Losses = Float[Array, " pairs"]


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probabilities of a batch of pairs, each of shape [pairs], in nats, summed over response tokens.

    Attributes:
        chosen_lengths: Response tokens of the chosen answers, EOS included; None where the loss needs none.
        score: f'(exp(log-ratio)) of the divergence between policy and reference (`objectives.divergences`).
        chosen_nll: −Σ log π of the chosen answers where `policy_chosen` is length-desensitised; None: −policy_chosen.
        chosen_tokens: What the sum of `chosen_nll` is divided by; None: the batch's tokens.
    """

    policy_chosen: Float[Array, " pairs"]
    policy_rejected: Float[Array, " pairs"]
    reference_chosen: Float[Array, " pairs"]
    reference_rejected: Float[Array, " pairs"]
    chosen_lengths: Num[Array, " pairs"] | None = None
    rejected_lengths: Num[Array, " pairs"] | None = None
    score: Callable[[Losses], Losses] = reverse_kl
    chosen_nll: Losses | None = None
    chosen_tokens: Num[Array, ""] | float | None = None

    @property
    def chosen_log_ratio(self) -> Losses:
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_log_ratio(self) -> Losses:
        return self.policy_rejected - self.reference_rejected

    @property
    def chosen_score(self) -> Losses:
        """The log-ratio itself under reverse KL, DPO's own divergence."""
        return self.score(self.chosen_log_ratio)

    @property
    def rejected_score(self) -> Losses:
        return self.score(self.rejected_log_ratio)

    @property
    def delta(self) -> Losses:
        """Chosen minus rejected score; under reverse KL the implicit reward margin over β."""
        return self.chosen_score - self.rejected_score

    def per_token(self, chosen: Losses, rejected: Losses) -> tuple[Losses, Losses]:
        """Sums divided by lengths (at least 1, as TRL clamps them)."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return chosen / jnp.maximum(self.chosen_lengths, 1), rejected / jnp.maximum(self.rejected_lengths, 1)


def _smoothed_logistic(logits: Losses, smoothing: float) -> Losses:
    return -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)


def sigmoid(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """DPO, −log σ(βΔ) (arXiv:2305.18290, eq. 7); with smoothing ε cDPO, −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    return _smoothed_logistic(beta * x.delta, label_smoothing)


def sigmoid_trl(x: PairLogProbs, *, beta: float) -> Losses:
    """DPO as TRL 1.16's ``sigmoid`` computes it, −log σ(βΔ) whatever the smoothing (arXiv:2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * x.delta)


def robust(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """Robust DPO, [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε) (arXiv:2403.00409, eq. 9); ε in [0, ½)."""
    epsilon, logits = label_smoothing, beta * x.delta
    clean, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (-(1 - epsilon) * clean + epsilon * flipped) / (1 - 2 * epsilon)


def hinge(x: PairLogProbs, *, beta: float) -> Losses:
    """SLiC-style hinge, max(0, 1 − βΔ) (arXiv:2309.06657)."""
    return jax.nn.relu(1 - beta * x.delta)


def ipo(x: PairLogProbs, *, beta: float) -> Losses:
    """IPO on per-token log-ratios r̄, (r̄_w − r̄_l − 1/(2β))² (arXiv:2310.12036, eq. 17; TRL's averaging)."""
    chosen, rejected = x.per_token(x.chosen_score, x.rejected_score)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def ipo_sum(x: PairLogProbs, *, beta: float) -> Losses:
    """IPO as the paper writes it, on summed log-ratios: (Δ − 1/(2β))² (arXiv:2310.12036, eq. 17)."""
    return (x.delta - 1 / (2 * beta)) ** 2


def exo_pair(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """EXO for pairs: KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε) (arXiv:2402.00856, eq. 16); ε > 0, 1e-3 advised."""
    logits, epsilon = beta * x.delta, label_smoothing
    chosen = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log1p(-epsilon))
    rejected = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(epsilon))
    return chosen + rejected


def nca_pair(x: PairLogProbs, *, beta: float) -> Losses:
    """NCA, −log σ(βr_w) − ½ log σ(−βr_w) − ½ log σ(−βr_l), r the log-ratios (arXiv:2402.05369)."""
    chosen, rejected = beta * x.chosen_log_ratio, beta * x.rejected_log_ratio
    return -jax.nn.log_sigmoid(chosen) - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)


def bco_pair(x: PairLogProbs, *, beta: float) -> Losses:
    """BCO for pairs without reward shift, −log σ(βr_w) − log σ(−βr_l) (arXiv:2404.04656; TRL 1.16).

    TRL 0.26 subtracts a running mean of the rewards, so that the loss depends on its history; 1.16 does not.
    """
    return -jax.nn.log_sigmoid(beta * x.chosen_log_ratio) - jax.nn.log_sigmoid(-beta * x.rejected_log_ratio)


def sppo_hard(x: PairLogProbs, *, beta: float) -> Losses:
    """SPPO with hard labels, (r_w − 1/(2β))² + (r_l + 1/(2β))² (arXiv:2405.00675, eq. 4.7)."""
    return (x.chosen_log_ratio - 0.5 / beta) ** 2 + (x.rejected_log_ratio + 0.5 / beta) ** 2


def aot(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """Distributional alignment: the logistic loss on sorted policy and reference margins (arXiv:2406.05882).

    Sorts over the batch: entry i is no longer pair i, and only the batch mean has a meaning.
    """
    policy = jnp.sort(x.policy_chosen - x.policy_rejected)
    reference = jnp.sort(x.reference_chosen - x.reference_rejected)
    return _smoothed_logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """`aot` on chosen and rejected log-ratios sorted apart (arXiv:2406.05882; ``aot_pair`` in TRL 0.26)."""
    delta = jnp.sort(x.chosen_log_ratio) - jnp.sort(x.rejected_log_ratio)
    return _smoothed_logistic(beta * delta, label_smoothing)


def apo_zero(x: PairLogProbs, *, beta: float) -> Losses:
    """APO-zero, 1 − σ(βr_w) + σ(βr_l): chosen up, rejected down (arXiv:2408.06266, eq. 7)."""
    # 1 − σ(a) as σ(−a): the same number without the cancellation at large a.
    return jax.nn.sigmoid(-beta * x.chosen_log_ratio) + jax.nn.sigmoid(beta * x.rejected_log_ratio)


def apo_down(x: PairLogProbs, *, beta: float) -> Losses:
    """APO-down, σ(βr_w) + 1 − σ(βΔ): both down, rejected further (arXiv:2408.06266, eq. 8)."""
    return jax.nn.sigmoid(beta * x.chosen_log_ratio) + jax.nn.sigmoid(-beta * x.delta)


def discopop(x: PairLogProbs, *, beta: float, discopop_tau: float) -> Losses:
    """DiscoPOP, −(1−s) log σ(βΔ) + s exp(−βΔ), s = σ(βΔ/τ), τ `discopop_tau` (arXiv:2406.08414, eq. 5)."""
    logits = beta * x.delta
    gate = logits / discopop_tau
    # The product s·exp(−βΔ) is formed in logs: at very negative Δ its factors are 0 and infinity.
    exponential = jnp.exp(jax.nn.log_sigmoid(gate) - logits)
    return -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-gate) + exponential


def sft(x: PairLogProbs) -> Losses:
    """Token-mean NLL of the chosen answers over the batch, the same number for every pair (TRL's ``sft``).

    Where `chosen_tokens` says what to divide by, a micro-batch's value is its share of the whole batch's.
    """
    assert x.chosen_lengths is not None
    total = -jnp.sum(x.policy_chosen) if x.chosen_nll is None else jnp.sum(x.chosen_nll)
    count = jnp.sum(x.chosen_lengths) if x.chosen_tokens is None else x.chosen_tokens
    nll = total / jnp.maximum(count, 1)
    return jnp.broadcast_to(nll, x.policy_chosen.shape)


def sigmoid_norm(x: PairLogProbs, *, beta: float) -> Losses:
    """Length-normalised DPO: per-token log-ratios r̄, −log σ(β(r̄_w − r̄_l)) (Tülu 3, arXiv:2411.15124)."""
    chosen, rejected = x.per_token(x.chosen_score, x.rejected_score)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def simpo(x: PairLogProbs, *, beta: float, label_smoothing: float, simpo_gamma: float) -> Losses:
    """SimPO, −log σ(β(ℓ̄_w − ℓ̄_l) − γ), ℓ̄ the per-token log-probs, smoothed by ε (arXiv:2405.14734, eq. 6).

    No reference. Reads `simpo_gamma`.
    """
    chosen, rejected = x.per_token(x.policy_chosen, x.policy_rejected)
    return _smoothed_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def cpo(x: PairLogProbs, *, beta: float, label_smoothing: float) -> Losses:
    """CPO's preference term, −log σ(β(ℓ_w − ℓ_l)), smoothed by ε (arXiv:2401.08417, eq. 3).

    No reference. TRL adds `cpo_alpha` × token NLL of the chosen answer: a chosen-NLL weight does the same.
    """
    return _smoothed_logistic(beta * (x.policy_chosen - x.policy_rejected), label_smoothing)


def _log1mexp(log_probs: Losses) -> Losses:
    """log(1 − exp(a)) for a < 0, in the branch that keeps its digits (Mächler 2012).

    A probability that has rounded to 1 is taken as 1 − ε of the type, so that loss and gradient stay finite.
    """
    log_probs = jnp.minimum(log_probs, -jnp.finfo(log_probs.dtype).eps)
    small = log_probs > -math.log(2)
    near_one = jnp.log(-jnp.expm1(jnp.where(small, log_probs, -1.0)))
    return jnp.where(small, near_one, jnp.log1p(-jnp.exp(jnp.where(small, -1.0, log_probs))))


def orpo(x: PairLogProbs, *, beta: float) -> Losses:
    """ORPO's odds-ratio term, −β log σ(logit p̄_w − logit p̄_l), p̄ = exp(ℓ̄) (arXiv:2403.07691, eqs. 4 and 7).

    No reference. The full objective adds 1.0 × token NLL of the chosen answer. TRL rounds to float32 here; we
    keep the type of the inputs.
    """
    chosen, rejected = x.per_token(x.policy_chosen, x.policy_rejected)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * jax.nn.log_sigmoid(log_odds)


@dataclass(frozen=True)
class Excluded:
    """A value of a parameter at which a formula has no meaning, though the recipe's key may hold it.

    Attributes:
        needs: What it must be instead, in words.
    """

    parameter: str
    value: float
    needs: str
    remedy: str | None = None


@dataclass(frozen=True)
class PreferenceLoss:
    """One entry of `LOSSES`.

    Attributes:
        function: Log-probs and, by keyword, the loss's parameters -> losses [pairs]. A parameter is the key of the
            same name under `train`, whose default and range stand in config.py.
        needs_lengths: Lengths enter the formula.
        reference_free: The reference does not enter; rewards are then β × policy log-prob, as in TRL.
        of_ratios: Where the reference enters, log-ratios alone do: one value where policy and reference agree.
        mean_rewards: The rewards of a loss without reference use per-token means (of length-averaged log-probs).
        divergences: Other f-divergences than reverse KL apply: the loss reads the difference of scores alone, in
            which the unknown normaliser cancels (TRL 1.16's list).
        coupled: The rows of a batch enter together; a micro-batch's value is no share of the whole batch's.
        excluded: A value of a parameter that the formula does not take.
    """

    function: Callable[..., Losses]
    needs_lengths: bool = False
    reference_free: bool = False
    of_ratios: bool = True
    mean_rewards: bool = False
    divergences: bool = False
    coupled: bool = False
    excluded: Excluded | None = None

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        return keyword_parameters(self.function)


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, divergences=True),
    "sigmoid_trl": PreferenceLoss(sigmoid_trl, divergences=True),
    "robust": PreferenceLoss(robust, divergences=True, excluded=Excluded("label_smoothing", 0.5, "below 0.5")),
    "hinge": PreferenceLoss(hinge, divergences=True),
    "ipo": PreferenceLoss(ipo, needs_lengths=True, divergences=True),
    "ipo_sum": PreferenceLoss(ipo_sum, divergences=True),
    "exo_pair": PreferenceLoss(
        exo_pair,
        divergences=True,
        excluded=Excluded("label_smoothing", 0.0, "above 0", "its authors advise 1e-3"),
    ),
    "nca_pair": PreferenceLoss(nca_pair),
    "bco_pair": PreferenceLoss(bco_pair),
    "sppo_hard": PreferenceLoss(sppo_hard),
    "aot": PreferenceLoss(aot, coupled=True),
    "aot_unpaired": PreferenceLoss(aot_unpaired, coupled=True),
    "apo_zero": PreferenceLoss(apo_zero),
    "apo_down": PreferenceLoss(apo_down),
    "discopop": PreferenceLoss(discopop, divergences=True),
    "sft": PreferenceLoss(sft, needs_lengths=True, of_ratios=False, divergences=True),
    "sigmoid_norm": PreferenceLoss(sigmoid_norm, needs_lengths=True, divergences=True),
    "simpo": PreferenceLoss(simpo, needs_lengths=True, reference_free=True, mean_rewards=True),
    "cpo": PreferenceLoss(cpo, reference_free=True),
    "orpo": PreferenceLoss(orpo, needs_lengths=True, reference_free=True, mean_rewards=True),
}
