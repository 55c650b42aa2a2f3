"""Ragged rows to arrays, padded at the end of every axis, to a shape chosen for the data or up to `LENGTHS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.lengths import Shape, cheapest
from m3po_jax.data.padding import pad_ragged, padded_length


@dataclass
class PromptBatch:
    """Prompts on the host, right-padded, as the engines of `inference` take them.

    Attributes:
        pixel_values: Normalised images; None for text alone.
        features: The vision tower's features, in place of `pixel_values`.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b p"]
    mask: Bool[np.ndarray, "b p"]
    pixel_values: Float32[np.ndarray, "b m h w 3"] | None = None
    features: Float[np.ndarray, "b m n v"] | None = None


class TreeBatch(NamedTuple):
    """B prompts (images included) with K answers each: the layout of `models.forward.branch_log_probs`.

    Arrays are NumPy's on the host and JAX's in a step. Padding is at the end of every axis. `reference` holds
    Σ_t log π_ref(token) of each answer in nats, NaN where nothing was recorded; `row_index` is the row's place in
    the source (see `BatchSource.ids`). Where a frozen tower's output is cached, `features` stand in for
    `pixel_values`, and `blank_features` are those of the mean colour.
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    pixel_values: Float[Any, "b m h w 3"] | None
    branch_ids: Int[Any, "b k t"]
    branch_mask: Bool[Any, "b k t"]
    reference: Float[Any, "b k"]
    row_index: Int[Any, " b"]
    features: Float[Any, "b m n v"] | None = None
    blank_features: Float[Any, "1 n v"] | None = None

    def prompts(self, ids: Sequence[str]) -> PromptBatch:
        """The prompts alone, by name; of a batch on the host."""
        return PromptBatch(list(ids), self.prefix_ids, self.prefix_mask, self.pixel_values, self.features)


class TreeRow(NamedTuple):
    """One element before batching; the ragged form of a `TreeBatch` row."""

    prefix: np.ndarray
    pixels: np.ndarray | None
    branches: tuple[np.ndarray, ...]
    reference: tuple[float, ...]
    row: int
    features: np.ndarray | None = None


def _stack_images(pixels: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Each row's images [m, H, W, 3], padded with black ones to the most that a row has; None without any."""
    most = max((len(images) for images in pixels if images is not None), default=0)
    if most == 0:
        return None
    size = next(images.shape[1:] for images in pixels if images is not None and len(images))
    kind = next(images.dtype for images in pixels if images is not None and len(images))
    stacked = np.zeros((len(pixels), most, *size), kind)
    for row, images in enumerate(pixels):
        if images is not None and len(images):
            stacked[row, : len(images)] = images
    return stacked


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
        pixel_values=_stack_images([row.pixels for row in rows]),
        branch_ids=branch_ids,
        branch_mask=branch_mask,
        reference=np.array([row.reference for row in rows], np.float32).reshape(len(rows), branches),
        row_index=np.array([row.row for row in rows], np.int32),
        features=_stack_images([row.features for row in rows]),
    )


def collation(features: PromptFeatures | None, shapes: Sequence[Shape]) -> Callable[[Sequence[TreeRow]], TreeBatch]:
    """`collate_tree`, with the blank image's features beside cached ones."""

    def collate(rows: Sequence[TreeRow]) -> TreeBatch:
        most = max((len(row.features) for row in rows if row.features is not None), default=0)
        if features is None or most == 0:
            return collate_tree(rows, shapes)
        # Padding is what the tower makes of black padding: swapped images meet the same either way.
        padding = np.repeat(features.blank, most, axis=0)
        seen = [padding[:0] if row.features is None else row.features for row in rows]
        whole = [np.concatenate([given, padding])[:most] for given in seen]
        filled = [row._replace(features=given) for row, given in zip(rows, whole, strict=True)]
        return collate_tree(filled, shapes)._replace(blank_features=features.blank)

    return collate
