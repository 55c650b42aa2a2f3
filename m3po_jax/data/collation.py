"""A prompt on the host, a batch of prompts, and a batch of prompts with their answers.

Ragged rows become arrays that are padded at the end of every axis, to a shape chosen for the data or up to `LENGTHS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from m3po_jax.data.lengths import Shape, cheapest
from m3po_jax.data.model_images import Images, stacked
from m3po_jax.data.padding import pad_ragged, padded_length
from m3po_jax.hosts.rows import Hosts


@dataclass(frozen=True)
class PromptRow:
    """A prompt on the host as models take it, and its answers as far as there are any.

    Generation takes it without answers and gives it back with those that it drew; judges and training take it with
    the answers that they score or learn.

    Attributes:
        images: Arrays of its images, see `data.model_images.joined`; {} for text alone. Zeros stand for pixels and
            features where the process is not one of `hosts`.
        answers: Token ids of each, the end token included.
        log_probs: Of each answer's tokens where it was drawn: log π(token) in nats at temperature 1 without
            truncation.
        reference: Σ_t log π_ref(token) of each answer in nats, NaN where nothing is recorded; (): of none is it.
        place: Of the row in its source.
        hosts: The processes that have its images, and on whose devices it is answered; None: all have them.
        wanted: Answers to draw; the others come back empty. None: all.
        attempt: Which of an answer's random streams to draw from; 0 is the first.
    """

    id: str
    token_ids: Int32[np.ndarray, " p"]
    images: Images = field(default_factory=dict)
    answers: tuple[Int32[np.ndarray, " _"], ...] = ()
    log_probs: tuple[Float32[np.ndarray, " _"], ...] = ()
    reference: tuple[float, ...] = ()
    place: int = 0
    hosts: Hosts | None = None
    wanted: tuple[int, ...] | None = None
    attempt: int = 0


@dataclass
class PromptBatch:
    """Prompts on the host, right-padded, as the engines of `inference` take them.

    Attributes:
        images: Arrays with a leading axis for rows, see `data.model_images`; None for text alone.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b p"]
    mask: Bool[np.ndarray, "b p"]
    images: Images | None = None


class TreeBatch(NamedTuple):
    """B prompts (images included) with K answers each: the layout of `models.forward.branch_log_probs`.

    Arrays are NumPy's on the host and JAX's in a step. Padding is at the end of every axis. `reference` holds
    Σ_t log π_ref(token) of each answer in nats, NaN where nothing was recorded; `row_index` is the row's place in
    the source (see `BatchSource.ids`). `images` are as `data.model_images` says: arrays with a leading axis for rows,
    where a frozen tower's output is cached with its features in place of pixels; None for text alone.
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    images: Images | None
    branch_ids: Int[Any, "b k t"]
    branch_mask: Bool[Any, "b k t"]
    reference: Float[Any, "b k"]
    row_index: Int[Any, " b"]

    @property
    def masks(self) -> tuple[np.ndarray, ...]:
        """What is no padding, of a batch on the host."""
        return self.prefix_mask, self.branch_mask

    def prompts(self, ids: Sequence[str]) -> PromptBatch:
        """The prompts alone, by name; of a batch on the host."""
        return PromptBatch(list(ids), self.prefix_ids, self.prefix_mask, self.images)


def collate_prompts(rows: Sequence[PromptRow]) -> PromptBatch:
    """The prompts of rows, padded to the next of `LENGTHS`."""
    shape = (len(rows), padded_length(max(len(row.token_ids) for row in rows)))
    token_ids, mask = pad_ragged([row.token_ids for row in rows], shape)
    return PromptBatch([row.id for row in rows], token_ids, mask, stacked([row.images for row in rows]))


def collate_tree(rows: Sequence[PromptRow], shapes: Sequence[Shape] = ()) -> TreeBatch:
    """Pads rows with equally many answers to the cheapest of `shapes`; without any, to the next of `LENGTHS`."""
    branches = len(rows[0].answers)
    prefix = max(len(row.token_ids) for row in rows)
    longest = max((len(answer) for row in rows for answer in row.answers), default=0)
    if shapes:
        prefix, longest = cheapest(shapes, prefix, longest, branches)
    else:
        prefix, longest = padded_length(prefix), padded_length(longest)
    prefix_ids, prefix_mask = pad_ragged([row.token_ids for row in rows], (len(rows), prefix))
    branch_ids, branch_mask = pad_ragged([row.answers for row in rows], (len(rows), branches, longest))
    return TreeBatch(
        prefix_ids=prefix_ids,
        prefix_mask=prefix_mask,
        images=stacked([row.images for row in rows]),
        branch_ids=branch_ids,
        branch_mask=branch_mask,
        reference=np.array([row.reference or (np.nan,) * branches for row in rows], np.float32),
        row_index=np.array([row.place for row in rows], np.int32),
    )


def rows_of(batch: PromptBatch) -> list[PromptRow]:
    """The rows of a batch, without their padding."""
    return [
        PromptRow(
            name,
            batch.token_ids[row][batch.mask[row].astype(bool)].astype(np.int32),
            {key: x[row] for key, x in (batch.images or {}).items()},
            place=row,
        )
        for row, name in enumerate(batch.ids)
    ]
