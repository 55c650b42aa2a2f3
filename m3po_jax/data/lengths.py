"""Which rows share a batch and how wide it is padded: little padding in few compiled shapes.

Rows are shuffled as ever; a window of some batches of that order is then divided again so that a batch holds rows
of similar length, and the batches of the window follow each other in random order. Batch i stays a function of
(lengths, seed, i) alone, and every row still comes once an epoch. Batches are padded to one of a few shapes that
are chosen for the rows at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

# Shapes are chosen by looking at so many batches of the first epoch; a larger width is always among them.
_SAMPLED_BATCHES = 512


@dataclass(frozen=True)
class Lengths:
    """Token counts of the rows: their prefix, and their longest branch, which all `branches` are padded to."""

    prefix: Int[np.ndarray, " rows"]
    branch: Int[np.ndarray, " rows"]
    branches: int

    @property
    def sides(self) -> Int[np.ndarray, "rows sides"]:
        return np.stack([self.prefix, self.branch], axis=1).astype(np.int64)

    @property
    def weights(self) -> Int[np.ndarray, " sides"]:
        """Computed tokens of a row for one token more of either width."""
        return np.array([1, self.branches])


def rounded(length: int) -> int:
    """`length` rounded up to a multiple that accelerators like: of 8 from 128 on, of 4 from 64 on, of 2 from 32
    on. At most 6 % are added."""
    step = 8 if length > 128 else 4 if length > 64 else 2 if length > 32 else 1
    return -(-length // step) * step


def partition(
    sides: Int[np.ndarray, "rows sides"], sizes: Sequence[int], weights: Int[np.ndarray, " sides"]
) -> list[Int[np.ndarray, " group"]]:
    """Row numbers in groups of the given sizes, each group with rows of similar widths.

    The rows are cut in two, by the width whose cut leaves less padding, until a group is left: a k-d tree with
    leaves of the given sizes. Within a group, rows keep their order.
    """

    def divide(rows: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        if len(sizes) == 1:
            return [np.sort(rows)]
        half = len(sizes) // 2
        cut = sum(sizes[:half])
        best: tuple[int, np.ndarray] | None = None
        for side in (1, 0):
            # Ties are ordered by the other width, then as they came.
            order = rows[np.lexsort((rows, sides[rows, 1 - side], sides[rows, side]))]
            cost = _cost(sides[order], sizes, weights)
            if best is None or cost < best[0]:
                best = cost, order
        assert best is not None
        return divide(best[1][:cut], sizes[:half]) + divide(best[1][cut:], sizes[half:])

    return divide(np.arange(len(sides)), sizes)


def _cost(sides: np.ndarray, sizes: Sequence[int], weights: np.ndarray) -> int:
    """Computed tokens if rows in this order were cut in groups of these sizes."""
    starts = np.cumsum([0, *sizes[:-1]])
    return int((np.maximum.reduceat(sides, starts) @ weights) @ np.asarray(sizes))


@dataclass(frozen=True)
class Order:
    """Rows of batch i of an endless stream in which every row comes once an epoch, each epoch in another order.

    Epochs follow each other without a gap, so a batch may hold the last rows of one and the first of the next.

    Args:
        count: Rows of an epoch.
        window: Batches of the shuffled order whose rows are divided among them by length; 1: none are.
        lengths: None where rows do not differ: the order is shuffled only.
    """

    count: int
    seed: int
    batch_size: int
    window: int = 1
    lengths: Lengths | None = None

    @functools.cached_property
    def shuffled(self) -> grain.MapDataset:
        # Grain's own endless repeat has sys.maxsize elements and overflows in batches of one row.
        return grain.MapDataset.range(self.count).seed(self.seed).shuffle().repeat(1_000_000)

    @property
    def batches(self) -> int:
        """Length of the stream: without an end for all purposes."""
        return self.count * 1_000_000 // self.batch_size

    def rows(self, batch: int) -> list[int]:
        first, last = batch * self.batch_size, (batch + 1) * self.batch_size - 1
        rows: list[int] = []
        for epoch in range(first // self.count, last // self.count + 1):
            opening = epoch * self.count // self.batch_size  # the batch that the epoch begins in
            window, place = divmod(batch - opening, self.window)
            rows += self._windows(epoch, window)[place]
        return rows

    @functools.cached_property
    def _windows(self) -> Callable[[int, int], list[list[int]]]:
        return functools.lru_cache(maxsize=8)(self._window)

    def _window(self, epoch: int, number: int) -> list[list[int]]:
        """Rows of the consecutive batches of one window of an epoch; only its share of batches that it cuts."""
        begin, end = epoch * self.count, (epoch + 1) * self.count
        first = begin // self.batch_size + number * self.window
        edges = [(first + i) * self.batch_size for i in range(self.window + 1)]
        cuts = sorted({min(max(edge, begin), end) for edge in edges})
        rows = np.array([self.shuffled[place] for place in range(cuts[0], cuts[-1])])
        sizes = np.diff(cuts)
        if self.window == 1 or self.lengths is None or len(sizes) == 1:
            return [part.tolist() for part in np.split(rows, np.cumsum(sizes)[:-1])]
        places = self._places(epoch, number, len(sizes), (cuts[0] == begin, cuts[-1] == end))
        groups = partition(self.lengths.sides[rows], sizes[places].tolist(), self.lengths.weights)
        batches: list[list[int]] = [[]] * len(sizes)
        for place, group in zip(places, groups, strict=True):
            batches[place] = rows[group].tolist()
        return batches

    def _places(self, epoch: int, number: int, count: int, ends: tuple[bool, bool]) -> list[int]:
        """The window's batches from the shortest rows' to the longest's: at random, so that length tells nothing
        about time. Where an epoch ends within a batch, both its parts get rows of about the same length."""
        inner = np.arange(ends[0], count - ends[1])
        order = np.random.default_rng([self.seed, epoch, number, 1]).permutation(inner).tolist()
        for is_end, place, border in ((ends[0], 0, epoch), (ends[1], count - 1, epoch + 1)):
            if is_end:
                share = np.random.default_rng([self.seed, border, 2]).random()
                order.insert(int(share * (len(order) + 1)), place)
        return order


Shape = tuple[int, int]


def plan_shapes(order: Order, lengths: Lengths, limit: int) -> tuple[Shape, ...]:
    """At most `limit` (prefix width, branch width), one of which holds any row.

    The batches of the first epoch are what they would be without padding; the two shapes whose common cover adds
    the fewest computed tokens become one, until `limit` are left.
    """
    epoch = range(min(-(-order.count // order.batch_size), _SAMPLED_BATCHES))
    needed = np.array([lengths.sides[order.rows(batch)].max(axis=0) for batch in epoch])
    # A later epoch may put the longest prefix and the longest answer together.
    shapes, counts = np.unique(np.vstack([needed, lengths.sides.max(axis=0)]), axis=0, return_counts=True)
    while len(shapes) > limit:
        cover = np.maximum(shapes[:, None], shapes[None])
        used = shapes @ lengths.weights * counts
        added = cover @ lengths.weights * (counts[:, None] + counts[None]) - used[:, None] - used[None]
        np.fill_diagonal(added, np.iinfo(np.int64).max)
        pair = np.unravel_index(np.argmin(added), added.shape)
        merged, total = shapes[list(pair)].max(axis=0), counts[list(pair)].sum()
        shapes = np.vstack([np.delete(shapes, pair, axis=0), merged])
        counts = np.append(np.delete(counts, pair), total)
    return tuple(sorted({(rounded(int(prefix)), rounded(int(branch))) for prefix, branch in shapes}))


def cheapest(shapes: Sequence[Shape], prefix: int, branch: int, branches: int) -> Shape:
    """The shape with the fewest computed tokens that holds the given lengths."""
    fitting = [shape for shape in shapes if shape[0] >= prefix and shape[1] >= branch]
    return min(fitting, key=lambda shape: (shape[0] + branches * shape[1], shape))


def padding_share(batch: Any) -> float:
    """Share of a batch's token slots (prompts once, and every answer) that are computed for nothing."""
    return 1.0 - sum(int(mask.sum()) for mask in batch.masks) / sum(mask.size for mask in batch.masks)
