"""The objective `contrastive`: SigLIP's sigmoid loss of a dual encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.contrastive import ContrastiveBatch, contrastive_batches
from m3po_jax.data.schema import Prompt
from m3po_jax.objectives.objective import BATCH_ALONE, Learner, LossContext, LossOutput, Objective, Reads


def sigmoid_contrastive_loss(
    logits: Float[Array, "images texts"], labels: Num[Array, "images texts"]
) -> Float[Array, " images"]:
    """SigLIP's loss, −Σ_j log σ(label_ij · logit_ij) of every image i, in nats (arXiv:2303.15343, eq. 1).

    Args:
        logits: scale · cosine + bias.
        labels: +1 where text j is true of image i, −1 where it is not, 0 where nobody knows (left out). An image may
            have several true texts and a text several images; SigLIP's own case is 2·I − 1.
    """
    return -jnp.sum(jnp.where(labels == 0, 0.0, jax.nn.log_sigmoid(labels * logits)), axis=1)


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Learns which claims are true of which images."""

    name: ClassVar[str] = "contrastive"
    learner: ClassVar[Learner] = Learner.DUAL_ENCODER
    reads_rows: ClassVar[bool] = True
    # Every image is compared with every text, in whichever micro-batch it is.
    shared_fields: ClassVar[tuple[str, ...]] = ("text_ids", "text_mask")
    whole_model: ClassVar[bool] = True

    def loss(self, model: Any, batch: ContrastiveBatch, context: LossContext = BATCH_ALONE) -> LossOutput:
        """`sigmoid_contrastive_loss`, nats per image."""
        images = model.encode_image(batch.pixel_values, remat=context.remat)
        texts = model.encode_text(batch.text_ids, batch.text_mask)
        logits = model.logits(images, texts)
        row_losses = sigmoid_contrastive_loss(logits, batch.labels)
        true = batch.labels > 0
        metrics = {
            "accuracy": jnp.mean((logits > 0) == true),
            "recall": jnp.mean(jnp.sum((logits > 0) & true, axis=1) / jnp.maximum(jnp.sum(true, axis=1), 1)),
            "logit_scale": jnp.exp(model.logit_scale[...])[0],
        }
        return LossOutput(jnp.mean(row_losses), metrics, row_losses, {})

    @property
    def reads(self) -> Reads:
        return Reads.CLAIMS

    def batches_of_rows(
        self, rows: Sequence[Prompt], processor: Any, *, claim_template: str, **options: Any
    ) -> BatchSource[Any]:
        return contrastive_batches(
            _with_objects(rows),
            processor,
            encode_texts=processor.encode_texts,
            claim_template=claim_template,
            **{name: options[name] for name in ("batch_size", "seed", "own_rows")},
        )

    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        return "contrastive training on images and claims about them", ["contrastive"]


def _with_objects(rows: Sequence[Prompt]) -> list[Prompt]:
    """One row an image, and only images whose objects are known; questions about one image would repeat it."""
    images: set[str] = set()
    kept = []
    for row in rows:
        key = str(row.metadata.get("scene") or row.id)
        if key not in images and row.metadata.get("objects"):
            images.add(key)
            kept.append(row)
    return kept
