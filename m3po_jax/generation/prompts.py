"""Prompts and answers on the host, and the lengths that they are padded to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from m3po_jax.hosts.rows import Hosts


@dataclass
class PromptBatch:
    """Prompts on the host, right-padded.

    Attributes:
        pixel_values: normalised images; None for text alone.
        features: the vision tower's features, in place of `pixel_values`.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b p"]
    mask: Bool[np.ndarray, "b p"]
    pixel_values: Float32[np.ndarray, "b m h w 3"] | None = None
    features: Float32[np.ndarray, "b m n v"] | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        images: its m images, normalised [m, h, w, 3], or, with `encoded`, their features [m, n, v]; None for
            text alone. Zeros where the process is not one of `hosts`.
        wanted: candidates to draw; the others come back empty. None: all.
        attempt: which of a candidate's random streams to draw from; 0 is the first.
        hosts: the processes that have its images, and on whose devices it is answered; None: all have them.
    """

    id: str
    token_ids: Int32[np.ndarray, " p"]
    images: Float32[np.ndarray, "m ..."] | None = None
    encoded: bool = False
    wanted: tuple[int, ...] | None = None
    attempt: int = 0
    hosts: Hosts | None = None


@dataclass(frozen=True)
class Candidates:
    """The answers to one request; slots after an answer's end hold the padding id and log-probability 0.

    Attributes:
        log_probs: log π(token) in nats at temperature 1 without truncation, the end token included.
        lengths: tokens, the end token included.
        finished: true where the end token was drawn; false where `max_new_tokens` cut the answer.
    """

    request: Request
    token_ids: Int32[np.ndarray, "k t"]
    log_probs: Float32[np.ndarray, "k t"]
    lengths: Int32[np.ndarray, " k"]
    finished: Bool[np.ndarray, " k"]


@dataclass
class Generated:
    """Candidates of a batch; as `Candidates`, with a leading axis for prompts.

    Attributes:
        slot_steps: tokens that the device could have drawn in the time: steps × lanes. The sum of `lengths`
            over this is the occupancy.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b k t"]
    log_probs: Float32[np.ndarray, "b k t"]
    lengths: Int32[np.ndarray, "b k"]
    finished: Bool[np.ndarray, "b k"]
    slot_steps: int

    @property
    def finish_reasons(self) -> list[list[str]]:
        """``stop`` or ``length`` for every candidate."""
        return [["stop" if done else "length" for done in row] for row in self.finished]


def requests_of(batch: PromptBatch, wanted: Bool[np.ndarray, "b k"] | None = None, attempt: int = 0) -> list[Request]:
    """The rows of a batch, without their padding."""
    images = batch.pixel_values if batch.features is None else batch.features
    return [
        Request(
            name,
            batch.token_ids[row][batch.mask[row].astype(bool)].astype(np.int32),
            None if images is None or images.shape[1] == 0 else images[row],
            batch.features is not None,
            None if wanted is None else tuple(np.flatnonzero(wanted[row]).tolist()),
            attempt,
        )
        for row, name in enumerate(batch.ids)
    ]


def bucket(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `length`, at least one."""
    return max(-(-length // multiple), 1) * multiple


def prompt_bucket(length: int, multiple: int) -> int:
    """As `bucket`, in coarser steps beyond 32 multiples: long prompts need at most 16 programs an octave."""
    coarse = multiple
    while length > 32 * coarse:
        coarse *= 2
    return bucket(length, coarse)


def pad_rows(x: np.ndarray, rows: int, columns: int | None = None, value: Any = 0) -> np.ndarray:
    """`x` with its last row repeated up to `rows`, and axis 1 filled with `value` up to `columns`."""
    if columns is not None and x.shape[1] < columns:
        filler = np.full((x.shape[0], columns - x.shape[1], *x.shape[2:]), value, x.dtype)
        x = np.concatenate([x, filler], axis=1)
    if x.shape[0] < rows:
        x = np.concatenate([x, np.repeat(x[-1:], rows - x.shape[0], axis=0)], axis=0)
    return x


def right_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as one right-padded array [B, P] int32 and its mask."""
    width = max((len(row) for row in rows), default=0)
    token_ids = np.full((len(rows), width), value, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return token_ids, mask
