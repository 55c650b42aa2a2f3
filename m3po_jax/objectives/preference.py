"""The objective `preference`: a preference loss on pairs of answers, and the terms that may stand beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.errors import UserError
from m3po_jax.models.forward import EncodedImages, encode_images
from m3po_jax.objectives.conditional import anchor_loss, conditional_logits, conditional_loss
from m3po_jax.objectives.length import length_desensitised_sums
from m3po_jax.objectives.loss_types import LOSSES, PairLogProbs
from m3po_jax.objectives.metrics import preference_metrics
from m3po_jax.objectives.model_passes import (
    adapters_off,
    answer_log_probs,
    answer_scores,
    corrupted_images,
    reference_log_probs,
    reference_sums,
    token_sums,
)
from m3po_jax.objectives.objective import BATCH_ALONE, LossContext, LossOutput, Objective, Reads, first_branch_tokens
from m3po_jax.objectives.pair_loss import PairLoss
from m3po_jax.objectives.sft import token_nll

# What the recipe's own system is called beside its arms, from its pairing rule.
RULE_NAMES = {"m3p": "m3po", "mas_only": "mas_dpo", "vanilla": "dpo"}


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    """Learns to prefer chosen (branch 0) to rejected answers (branch 1).

    Attributes:
        pair_loss: The preference loss; the others are keys under `train`.
    """

    pair_loss: PairLoss
    pairs: str
    ld_alpha: float | None
    ld_alpha_reference: bool
    chosen_nll_weight: float
    conditional_weight: float
    conditional_image: str
    anchor_weight: float
    anchor_delta: float
    reference: str
    harm_metrics_steps: int

    name: ClassVar[str] = "preference"
    draws_candidates: ClassVar[bool] = True
    answers: ClassVar[int | None] = 2
    uses_reference: ClassVar[bool] = True

    @classmethod
    def _settings(cls, config: TrainConfig) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)} & vars(config).keys()
        return {name: getattr(config, name) for name in names} | {"pair_loss": PairLoss.of(config)}

    def loss(self, model: Any, batch: TreeBatch, context: LossContext = BATCH_ALONE) -> LossOutput:
        """A preference loss on chosen and rejected answers; both go through the policy with their prompt in one pass.

        Loss = mean(losses) + `chosen_nll_weight` × token-mean NLL of the chosen answers (RPO, arXiv:2404.19733) +
        `conditional_weight` × mean conditional loss + `anchor_weight` × mean anchor loss (mDPO, arXiv:2406.11839); a
        row's loss is its part without the NLL.

        With `ld_alpha` the losses and rewards read length-desensitised sums, as in TRL; the metrics ``logps`` and
        ``delta_logps`` and mDPO's terms keep the plain ones.

        A reference model computes the reference in the same step, as it is, for every row, or for the rows without
        recorded log-probs when `reference` is ``recorded``. Without one all are recorded; what no record can hold
        (see `needs_reference_pass`) is computed by the policy without its adapters.
        """
        images = encode_images(model, batch.images, remat=context.remat)
        scores = answer_scores(model, batch, images, remat=context.remat, base_learns=self.base_learns)
        log_probs = scores.log_probs
        policy, reference = jnp.sum(log_probs, axis=-1), batch.reference
        computed: Any = None
        reference_model = context.reference_model
        every_row_recorded = reference_model is None
        if every_row_recorded and self.needs_reference_pass:
            reference_model = adapters_off(model)
        if not every_row_recorded or self._desensitises_reference:
            # A frozen tower's features serve the reference too; an adapted tower's are the policy's own.
            shared = None if self.tower_learns else images
            computed = reference_log_probs(reference_model, batch, shared, remat=context.remat)
        if not every_row_recorded:
            keep = jnp.isfinite(reference) & (not self.computes_reference)
            reference = jnp.where(keep, reference, jnp.sum(computed, axis=-1))
        compared, compared_reference = policy, reference
        if self.ld_alpha is not None:
            compared = length_desensitised_sums(log_probs, batch.branch_mask, self.ld_alpha)
            if self._desensitises_reference:
                compared_reference = length_desensitised_sums(computed, batch.branch_mask, self.ld_alpha)
        lengths = jnp.sum(batch.branch_mask, axis=-1)
        losses, chosen_rewards, rejected_rewards = self.pair_loss(
            PairLogProbs(
                *compared.T,
                *compared_reference.T,
                *lengths.T,
                chosen_nll=-policy[:, 0],
                chosen_tokens=context.tokens,
            )
        )
        metrics = preference_metrics(
            *policy.T,
            *reference.T,
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
        )
        nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
        nll = nll / context.denominator(count)
        metrics["nll/chosen"] = nll
        metrics["loss/preference"] = jnp.mean(losses)
        row_losses, beta = losses, self.pair_loss.beta
        if self.conditional_weight:
            logits = self._conditional(
                model, reference_model, batch, images, policy[:, 0], reference[:, 0], context.remat
            )
            conditional = conditional_loss(logits, beta)
            row_losses = row_losses + self.conditional_weight * conditional
            metrics["loss/conditional"] = jnp.mean(conditional)
            metrics["rewards/conditional_margins"] = beta * jnp.mean(logits)
            metrics["rewards/conditional_accuracies"] = jnp.mean((logits > 0).astype(logits.dtype))
        if self.anchor_weight:
            anchor = anchor_loss(policy[:, 0], reference[:, 0], beta, self.anchor_delta)
            row_losses = row_losses + self.anchor_weight * anchor
            metrics["loss/anchor"] = jnp.mean(anchor)
        # TRL's: the mean of all logits of the vocabulary, over the tokens of either answer.
        logits_sums = {
            f"logits/{side}": (jnp.sum(scores.mean_logits[:, k]), jnp.sum(batch.branch_mask[:, k], dtype=jnp.float32))
            for k, side in enumerate(("chosen", "rejected"))
        }
        loss = jnp.mean(row_losses)
        if self.chosen_nll_weight:
            loss = loss + self.chosen_nll_weight * nll
        return LossOutput(loss, metrics, row_losses, token_sums(scores, batch.branch_mask) | logits_sums)

    def _conditional(
        self,
        model: Any,
        reference_model: Any,
        batch: TreeBatch,
        images: EncodedImages | None,
        policy: Float[Array, " b"],
        reference: Float[Array, " b"],
        remat: str,
    ) -> Float[Array, " b"]:
        """mDPO's conditional logits: the chosen answers once more, with corrupted images, in policy and reference.

        0 for rows without an image, which have nothing to corrupt.
        """
        if images is None:
            return jnp.zeros_like(policy)
        corrupted = corrupted_images(model, images, self.conditional_image)
        chosen = batch._replace(branch_ids=batch.branch_ids[:, :1], branch_mask=batch.branch_mask[:, :1])
        policy_corrupted = answer_log_probs(model, chosen, corrupted, remat=remat, base_learns=self.base_learns)
        policy_corrupted = jnp.sum(policy_corrupted, axis=-1)[:, 0]
        reference_corrupted = reference_sums(reference_model, chosen, corrupted, remat=remat)[:, 0]
        return conditional_logits(policy, policy_corrupted, reference, reference_corrupted)

    def answer_tokens(self, batch: Any) -> jax.Array | None:
        return first_branch_tokens(batch)

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        self.pair_loss.check()
        if config.train_vision:
            raise UserError(
                "the whole vision tower learns in sft only",
                where="train.train_vision",
                remedy="set false, or adapt it: train.lora.target_modules=[vision_tower.q_proj, …]",
            )
        if self.tower_learns and (self.conditional_weight or self.harm_metrics_steps):
            raise UserError(
                "conditional_weight and harm_metrics_steps need a frozen vision tower",
                where="train.lora.target_modules",
                remedy="leave vision_tower.* out",
            )
        mixture = self.pair_loss.mixture
        if self.ld_alpha is not None:
            for name in mixture:
                if LOSSES[name].reference_free:
                    raise UserError(f"ld_alpha has no meaning for loss {name!r}", where="train.ld_alpha")
        swaps = self.conditional_weight > 0 and self.conditional_image == "swap"
        if swaps and config.batch_size < 2:
            raise UserError("no other row's image in a batch of one", where="train.conditional_image", remedy="blank")
        if config.gradient_accumulation_steps > 1:
            coupled = [f"loss {name!r}" for name in mixture if LOSSES[name].coupled]
            coupled += ["conditional_image 'swap'"] if swaps else []
            if coupled:
                raise UserError(
                    f"{coupled[0]} couples the rows of a batch and cannot be accumulated",
                    where="train.gradient_accumulation_steps",
                    remedy="set it to 1",
                )
        only_adapters = config.lora.lora_rank > 0 and not config.lora.train_projector
        if self.needs_reference_pass and not self.computes_reference and not only_adapters:
            raise UserError(
                "ld_alpha, conditional_weight and harm_metrics_steps need the reference model, and more than "
                "adapters is trained",
                where="train.reference",
                remedy="set it to computed",
            )

    def first_values(self, tolerance: float) -> dict[str, tuple[float, float]]:
        """The terms' closed forms, evaluated where policy and reference agree.

        Every log-ratio is 0 then, so a loss of log-ratios has one value, whatever the answers. Losses that read the
        policy alone (simpo, cpo, orpo, sft) have none, nor has `ld_alpha` on the policy's sums alone. The tolerance
        of a value is how far it moves when both log-ratios of a pair are off by `tolerance` nats in opposite
        directions.
        """
        values: dict[str, tuple[float, float]] = {}
        same_sums = self.ld_alpha is None or self.ld_alpha_reference
        if same_sums and (start := self.pair_loss.at_reference(tolerance)) is not None:
            values["loss/preference"] = (start[0], start[1] + 1e-5)
        if self.anchor_weight:
            values["loss/anchor"] = (_softplus(self.anchor_delta), self.pair_loss.beta * tolerance + 1e-5)
        return values

    @property
    def _desensitises_reference(self) -> bool:
        return self.ld_alpha is not None and self.ld_alpha_reference

    @property
    def computes_reference(self) -> bool:
        return self.reference != "recorded"

    @property
    def needs_reference_pass(self) -> bool:
        """Sums over an answer hold neither its tokens (`ld_alpha` on the reference) nor other images (mDPO's
        conditional term, the text-only accuracies)."""
        return self._desensitises_reference or self.conditional_weight > 0 or self.harm_metrics_steps > 0

    @property
    def reads(self) -> Reads:
        return Reads.PAIRS

    def batches_of_pairs(self, pairs: PairRows, processor: Any, *, where: str, **options: Any) -> BatchSource[Any]:
        return pair_batches(pairs, processor, where=where, **options)

    def system_name(self, rule: str) -> str:
        return "pairs" if self.pairs else RULE_NAMES.get(rule, rule)

    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        losses = ", ".join(name for name, _ in self.pair_loss.loss_weights)
        return (
            f"preference optimisation on the model's own answers: pairs chosen by the rule `{rule}`, alignment "
            f"scores of the `{judge}` backend, loss `{losses or self.pair_loss.loss_type}`",
            ["preference-optimization", "dpo", *(["m3po"] if rule == "m3p" else [])],
        )

    def facts(self) -> dict[str, str]:
        return {"beta": f"{self.pair_loss.beta:g}"}

    @classmethod
    def starting_loss(cls, train: Mapping[str, Any]) -> tuple[float, str] | None:
        # Only the plain sigmoid loss starts at ln 2; an anchor or another loss adds to it.
        plain = train.get("loss_type") == "sigmoid" and train.get("chosen_nll_weight", 0.0) == 0
        return (math.log(2), "ln 2: start of DPO") if plain else None


def _softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)
