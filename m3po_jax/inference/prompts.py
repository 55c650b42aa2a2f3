"""Prompts and answers on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32

from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.model_images import Images
from m3po_jax.hosts.rows import Hosts


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        images: arrays of its images, see `data.model_images.joined`; {} for text alone. Zeros stand for pixels
            and features where the process is not one of `hosts`.
        wanted: candidates to draw; the others come back empty. None: all.
        attempt: which of a candidate's random streams to draw from; 0 is the first.
        hosts: the processes that have its images, and on whose devices it is answered; None: all have them.
    """

    id: str
    token_ids: Int32[np.ndarray, " p"]
    images: Images = field(default_factory=dict)
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


def requests_of(batch: PromptBatch, wanted: Bool[np.ndarray, "b k"] | None = None, attempt: int = 0) -> list[Request]:
    """The rows of a batch, without their padding."""
    return [
        Request(
            name,
            batch.token_ids[row][batch.mask[row].astype(bool)].astype(np.int32),
            {name: x[row] for name, x in (batch.images or {}).items()},
            None if wanted is None else tuple(np.flatnonzero(wanted[row]).tolist()),
            attempt,
        )
        for row, name in enumerate(batch.ids)
    ]
