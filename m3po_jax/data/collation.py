"""Ragged rows to arrays, padded at the end of every axis, to a shape chosen for the data or up to `LENGTHS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from m3po_jax.data.lengths import Shape, cheapest
from m3po_jax.data.model_images import Images, stacked
from m3po_jax.data.padding import pad_ragged, padded_length


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


class TreeRow(NamedTuple):
    """One element before batching; the ragged form of a `TreeBatch` row. `images`: see `model_images.joined`."""

    prefix: np.ndarray
    images: Images
    branches: tuple[np.ndarray, ...]
    reference: tuple[float, ...]
    row: int


def collate_tree(rows: Sequence[TreeRow], shapes: Sequence[Shape] = ()) -> TreeBatch:
    """Pads rows with equally many branches to the cheapest of `shapes`; without any, to the next of `LENGTHS`."""
    branches = len(rows[0].branches)
    prefix = max(len(row.prefix) for row in rows)
    longest = max((len(branch) for row in rows for branch in row.branches), default=0)
    if shapes:
        prefix, longest = cheapest(shapes, prefix, longest, branches)
    else:
        prefix, longest = padded_length(prefix), padded_length(longest)
    prefix_ids, prefix_mask = pad_ragged([row.prefix for row in rows], (len(rows), prefix))
    branch_ids, branch_mask = pad_ragged([row.branches for row in rows], (len(rows), branches, longest))
    return TreeBatch(
        prefix_ids=prefix_ids,
        prefix_mask=prefix_mask,
        images=stacked([row.images for row in rows]),
        branch_ids=branch_ids,
        branch_mask=branch_mask,
        reference=np.array([row.reference for row in rows], np.float32).reshape(len(rows), branches),
        row_index=np.array([row.row for row in rows], np.int32),
    )
