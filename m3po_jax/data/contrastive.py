"""Batches for dual encoders: images against the claims that are true of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from m3po_jax.data.batch_source import BatchSource, SharedRows, endless_batches, fingerprint_of, require_rows
from m3po_jax.data.lengths import Order
from m3po_jax.data.row_inputs import ImageSource, images_of, where_of
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import OwnRows


class ContrastiveBatch(NamedTuple):
    """B images, C texts and which text is true of which image: +1 or −1."""

    pixel_values: Float[Any, "b h w 3"]
    labels: Int[Any, "b c"]
    text_ids: Int[Any, "c t"]
    text_mask: Bool[Any, "c t"]
    row_index: Int[Any, " b"]

    @property
    def masks(self) -> tuple[np.ndarray, ...]:
        """What is no padding, of a batch on the host."""
        return (self.text_mask,)


def claims_of(prompt: Prompt) -> frozenset[str]:
    """The claims that are true of a row's image.

    Raises:
        UserError: they are no list of texts, or there is not exactly one image.
    """
    named = prompt.metadata.get("objects")
    if not isinstance(named, (list, tuple)) or not all(isinstance(claim, str) for claim in named):
        raise UserError("metadata.objects is not a list of texts", where=where_of(prompt))
    if len(prompt.images) != 1:
        raise UserError(f"{len(prompt.images)} images where one is needed", where=where_of(prompt))
    return frozenset(named)


def contrastive_batches(
    prompts: Sequence[Prompt],
    processor: ImageSource[np.ndarray],
    *,
    encode_texts: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    seed: int,
    claim_template: str = "{claim}",
    max_texts: int = 256,
    own_rows: OwnRows | None = None,
) -> BatchSource[ContrastiveBatch]:
    """Images against the claims that are true of them, which each prompt lists in ``metadata["objects"]``.

    The texts of a batch are all claims of the data set when there are at most `max_texts`, so that absent
    objects are negatives too; else the union over the batch, filled up to `max_texts` with other claims (a
    static shape).

    Args:
        processor: Gives the pixels, at the dual encoder's size; an example has exactly one image.
        encode_texts: Texts to (ids [C, T], mask [C, T]) at a fixed T, by the dual encoder's tokenizer.
        claim_template: Text that stands for one claim, e.g. ``a photo of {claim}``.
        own_rows: On several hosts: the rows of a batch whose images this one reads, see `SharedRows`.

    Raises:
        UserError: no rows, a row without objects or without exactly one image, or a batch with too many
            claims.
    """
    require_rows(len(prompts), batch_size)
    ids, objects = [], []
    for prompt in prompts:
        ids.append(prompt.id)
        objects.append(claims_of(prompt))
    vocabulary = sorted(set().union(*objects))
    if not vocabulary:
        raise UserError("no row names an object", remedy="fill metadata.objects")
    text_ids, text_mask = encode_texts([claim_template.replace("{claim}", claim) for claim in vocabulary])
    column = {claim: place for place, claim in enumerate(vocabulary)}

    def load(index: int, needed: bool) -> tuple[np.ndarray, int]:
        prompt = prompts[index]
        pixels = images_of(processor, prompt) if needed else processor.absent_images(prompt)
        return pixels[0], index

    shared = SharedRows(load, lambda row: (np.full_like(row[0], np.nan), row[1]), own_rows)

    def collate(rows: Sequence[tuple[np.ndarray, int]]) -> ContrastiveBatch:
        chosen = np.arange(len(vocabulary))
        if len(vocabulary) > max_texts:
            present = sorted({column[claim] for _, index in rows for claim in objects[index]})
            if len(present) > max_texts:
                raise UserError(
                    f"{len(present)} claims in one batch, more than {max_texts}", remedy="use a smaller batch"
                )
            # Fillers depend on the batch alone, so that a resumed run sees the same ones.
            others = np.setdiff1d(chosen, present)
            order = np.random.default_rng([seed, *(index for _, index in rows)]).permutation(others)
            chosen = np.sort(np.concatenate([present, order[: max_texts - len(present)]])).astype(int)
        labels = np.full((len(rows), len(chosen)), -1, np.int32)
        for row, (_, index) in enumerate(rows):
            labels[row, np.isin(chosen, [column[claim] for claim in objects[index]])] = 1
        return ContrastiveBatch(
            pixel_values=np.stack([pixels for pixels, _ in rows]),
            labels=labels,
            text_ids=np.asarray(text_ids, np.int32)[chosen],
            text_mask=np.asarray(text_mask, bool)[chosen],
            row_index=np.array([index for _, index in rows], np.int32),
        )

    return BatchSource(
        dataset=endless_batches(Order(len(prompts), seed, batch_size), shared, collate),
        failures=shared.failures,
        ids=tuple(ids),
        batch_size=batch_size,
        fingerprint=fingerprint_of(
            seed,
            batch_size,
            claim_template,
            ids,
            [sorted(named) for named in objects],
        ),
    )
