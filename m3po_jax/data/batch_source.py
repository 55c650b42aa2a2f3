"""A stream of batches by number, with a deterministic order and a resumable position.

Batch i is a function of (rows, seed, i) alone, so the position of an iterator is one integer and a restored run sees
exactly the batches that it would have seen. Images are decoded lazily, in Grain's prefetching threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from m3po_jax.config import TrainConfig
from m3po_jax.data.lengths import Order, Shape
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import load_shared
from m3po_jax.hosts.rows import OwnRows
from m3po_jax.reading import check_value

Batch = TypeVar("Batch")
Row = TypeVar("Row")


@dataclass(frozen=True)
class BatchSource(Generic[Batch]):
    """Batches by number. Iterators start at batch 0 and have `get_state()` and `set_state(state)` (JSON).

    Attributes:
        dataset: Batch i of the (for training: endless) stream.
        ids: Row ids; `row_index` points into them.
        batch_size: Rows of a batch.
        fingerprint: Hash of the rows, their order and the batch size.
        has_reference: Every answer comes with recorded reference log-probs.
        take: Row numbers to one batch of these rows.
        row_key: Row number to a hash of its prompt, images and answers.
        answer_tokens: Mean number of tokens of the answers that an NLL is taken of (sft's, a pair's chosen one).
        cut_answers: How many of these answers have no end token.
        shapes: The (prefix width, branch width) that batches are padded to; empty: any of `LENGTHS`.
        failures: Why rows were spoilt, see `SharedRows`.
    """

    dataset: grain.MapDataset
    ids: tuple[str, ...]
    batch_size: int
    fingerprint: str
    has_reference: bool = False
    take: Callable[[Sequence[int]], Batch] | None = None
    row_key: Callable[[int], str] | None = None
    answer_tokens: float | None = None
    cut_answers: int = 0
    shapes: tuple[Shape, ...] = ()
    failures: Mapping[int, UserError] = field(default_factory=dict)

    def __iter__(self) -> grain.DatasetIterator:
        return read_ahead(self.dataset)

    def steps(self, epochs: float) -> int:
        """Batches in `epochs` passes over the rows, rounded up."""
        return max(1, math.ceil(epochs * len(self.ids) / self.batch_size - 1e-9))

    def row_ids(self, row_index: Iterable[int]) -> list[str]:
        return [self.ids[i] for i in row_index if i >= 0]


def read_ahead(batches: grain.MapDataset, threads: int = 4) -> grain.DatasetIterator:
    """Iterates over batches, of which threads read as many ahead."""
    # Grain's default keeps 500 elements, here whole batches, in flight.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


class SharedRows(Generic[Row]):
    """Rows of training batches; on several hosts each reads the images of the rows on its own devices.

    There a row that cannot be read is known to one host, in one of its loading threads, while all must stop at
    the same step. It becomes *spoilt*: with NaN for its images, so that the step finds a loss that is not finite,
    keeps its state, and says so on every host. The training loop then looks into `failures` for the reason.

    Args:
        read: Row number, and whether its images are needed (else zeros stand for them), to an element.
        spoil: An element to the same with NaN for its images.
        own_rows: Size of a batch to the rows whose images this process needs. None: it is alone, needs all of them,
            and raises what cannot be read.
    """

    def __init__(
        self, read: Callable[[int, bool], Row], spoil: Callable[[Row], Row], own_rows: OwnRows | None = None
    ):
        self.read, self.spoil, self.own_rows = read, spoil, own_rows
        self.failures: dict[int, UserError] = {}

    def of_batch(self, rows: Sequence[int]) -> list[Row]:
        """The elements of a batch, for loading threads.

        Raises:
            UserError: what is wrong with a row's text; alone, also with its images.
        """
        if self.own_rows is None:
            return [self.read(row, True) for row in rows]
        return [self._read(row, bool(needed)) for row, needed in zip(rows, self.own_rows(len(rows)), strict=True)]

    def _read(self, row: int, needed: bool) -> Row:
        try:
            return self.read(row, needed)
        except UserError as error:
            blank = self.read(row, False)
            self.failures[row] = error
            return self.spoil(blank)

    def together(self, rows: Sequence[int]) -> list[Row]:
        """The elements of a batch, in a call that all processes make; what cannot be read is raised by all."""
        needed = [True] * len(rows) if self.own_rows is None else self.own_rows(len(rows))
        return load_shared(lambda at: self.read(rows[at], True), lambda at: self.read(rows[at], False), needed)


def endless_batches(order: Order, shared: SharedRows[Row], collate: Callable[[list[Row]], Any]) -> Any:
    """Batches of an endless stream that visits all rows once an epoch, each epoch in an order of its own."""
    dataset = grain.MapDataset.range(order.batches)
    return dataset.map(lambda number: collate(shared.of_batch(order.rows(number))))


def fingerprint_of(*parts: Any) -> str:
    """A hash of nested sequences of texts, numbers and arrays."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, (list, tuple)):
            digest.update(b"[%d" % len(part))
            for item in part:
                add(item)
        else:
            content = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
            digest.update(b"%d:" % len(content) + content)

    add(parts)
    return digest.hexdigest()


def require_rows(count: int, batch_size: int) -> None:
    if count == 0:
        raise UserError("there is no row to train on", remedy="look at the earlier stages' reports")
    check_value(TrainConfig, "batch_size", batch_size, "train")
