"""The objective `sft`: supervised fine-tuning, the negative log-likelihood of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import sft_batches
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.pair_rows import PairPrompts, PairRows, message_text
from m3po_jax.data.schema import Prompt
from m3po_jax.models.forward import encode_images
from m3po_jax.objectives.model_passes import answer_scores, token_sums
from m3po_jax.objectives.objective import BATCH_ALONE, LossContext, LossOutput, Objective, Reads, first_branch_tokens


def token_nll(
    log_probs: Float[Array, "batch tokens"], mask: Bool[Array, "batch tokens"] | Num[Array, "batch tokens"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of −log π over the tokens where `mask` is true, in nats, and how many they are.

    Two numbers, not their quotient, so that gradient accumulation can weight micro-batches by their tokens.
    What stands at masked positions (padding may hold anything, NaN too) never enters value or gradient.
    """
    keep = mask.astype(bool)
    return -jnp.sum(jnp.where(keep, log_probs, 0.0)), jnp.sum(keep, dtype=log_probs.dtype)


@dataclasses.dataclass(frozen=True)
class Sft(Objective):
    """Learns answers: reference answers of rows, or the chosen ones of pairs."""

    sft_answers: str

    name: ClassVar[str] = "sft"
    reads_rows: ClassVar[bool] = True
    answers: ClassVar[int | None] = 1

    def loss(self, model: Any, batch: TreeBatch, context: LossContext = BATCH_ALONE) -> LossOutput:
        """Negative log-likelihood of the answers (K = 1), nats per token.

        A mean over tokens, as in TRL, not of per-sequence means: long answers weigh more.
        """
        images = encode_images(model, batch.images, remat=context.remat)
        scores = answer_scores(model, batch, images, remat=context.remat, base_learns=self.base_learns)
        log_probs = scores.log_probs
        nll, count = token_nll(log_probs[:, 0], batch.branch_mask[:, 0])
        loss = nll / context.denominator(count)
        lengths = jnp.maximum(jnp.sum(batch.branch_mask[:, 0], axis=-1), 1)
        row_losses = -jnp.sum(log_probs[:, 0], axis=-1) / lengths
        metrics = {"nll/sequence": jnp.mean(row_losses)}
        return LossOutput(loss, metrics, row_losses, token_sums(scores, batch.branch_mask))

    def answer_tokens(self, batch: Any) -> jax.Array | None:
        return first_branch_tokens(batch)

    @property
    def reads(self) -> Reads:
        return Reads.PAIRS if self.sft_answers == "chosen" else Reads.REFERENCES

    def batches_of_pairs(self, pairs: PairRows, processor: Any, *, where: str, **options: Any) -> BatchSource[Any]:
        """The chosen answers, by their recorded tokens (the `sft_chosen` arm)."""
        answers = [
            row.get("chosen_token_ids") or processor.encode_answer(message_text(row["chosen"]))
            for row in pairs.without_images()
        ]
        return sft_batches(PairPrompts(pairs), processor, answer_ids=answers, **options)

    def batches_of_rows(
        self, rows: Sequence[Prompt], processor: Any, *, claim_template: str, **options: Any
    ) -> BatchSource[Any]:
        return sft_batches(rows, processor, **options)

    def system_name(self, rule: str) -> str:
        return "sft_chosen" if self.reads is Reads.PAIRS else "sft"

    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        return "supervised fine-tuning", ["sft"]
