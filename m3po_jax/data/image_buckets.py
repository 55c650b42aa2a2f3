"""Sizes that rows of images are padded to, where images have several: few programs, little padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from m3po_jax.data.lengths import rounded

# Numbers of tokens that the choice is made among; more of them are rounded to as many steps.
_STEPS = 512


@dataclass(frozen=True)
class ImageBuckets:
    """Sizes of rows that were chosen for some data; other rows find one too.

    Attributes:
        tokens: Image tokens of a row's images together, in rising order.
        images: The most images that a row has.
    """

    tokens: tuple[int, ...] = ()
    images: int = 1

    def holding(self, tokens: int) -> int:
        """The least size that holds so many; beyond the chosen ones there are eight an octave."""
        step = 1 << max(tokens.bit_length() - 4, 0)
        return next((size for size in self.tokens if size >= tokens), -(-tokens // step) * step)

    def length(self, length: int, tokens: int, images: int) -> int:
        """What an array of a row is padded to.

        Args:
            length: Its own: a multiple of the tokens, or one entry an image. Of other arrays it stays.
            tokens, images: Of the row.
        """
        if length == images:
            return self.images if images <= self.images else 1 << (images - 1).bit_length()
        return length // tokens * self.holding(tokens) if length % tokens == 0 else length


def choose_buckets(rows: Iterable[Sequence[int]], most: int) -> ImageBuckets:
    """At most so many sizes that add the least padding to these rows; the largest row fits.

    Args:
        rows: Of every row, the tokens that each of its images takes; those without images do not count.
    """
    counts = [list(row) for row in rows if len(row)]
    if not counts:
        return ImageBuckets()
    totals = np.array([sum(row) for row in counts])
    step = -(-int(totals.max()) // _STEPS)
    sizes, times = np.unique(-(-totals // step) * step, return_counts=True)
    ends = _cheapest_ends(sizes, times, most)
    return ImageBuckets(tuple(sorted({rounded(int(sizes[end])) for end in ends})), max(map(len, counts)))


def _cheapest_ends(sizes: Int[np.ndarray, " n"], times: Int[np.ndarray, " n"], most: int) -> list[int]:
    """Where to cut rising sizes in at most `most` runs, each of which costs its largest size for every member."""
    before = np.concatenate([[0], np.cumsum(times)])
    cost = sizes * before[1:]  # of sizes up to each, in one run
    cuts: list[np.ndarray] = []
    for _ in range(min(most, len(sizes)) - 1):
        # cost of a last run that begins behind `first` and ends at `end`, and of the best runs up to `first`
        last = cost[:, None] + sizes[None, :] * (before[1:][None, :] - before[1:][:, None])
        last = np.where(np.tri(len(sizes), k=-1, dtype=bool).T, last, np.iinfo(np.int64).max)
        first = np.argmin(last, axis=0)
        best = np.take_along_axis(last, first[None], axis=0)[0]
        first = np.where(best < cost, first, -1)
        cost = np.minimum(best, cost)
        cuts.append(first)
    ends = [len(sizes) - 1]
    for first in reversed(cuts):
        if first[ends[-1]] >= 0:
            ends.append(int(first[ends[-1]]))
    return ends[::-1]
