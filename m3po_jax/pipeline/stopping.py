"""Stopping between batches, and agreement between hosts about what is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from m3po_jax.errors import Interrupted
from m3po_jax.training.signals import stop_signal

T = TypeVar("T")


def stoppable(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields `items` until SIGTERM or SIGINT arrives; every host stops before the same item.

    Raises:
        Interrupted: between two items, so that what was written stays whole.
    """
    with stop_signal() as stop:
        for item in items:
            if stop.any_host():
                raise Interrupted(
                    f"stopped by {stop.received or 'another host'} while {what}; finished shards are saved"
                )
            yield item


def agreed(done: Sequence[bool]) -> list[bool]:
    """Process 0's view of what is done, on every process: file systems may show a file late."""
    if jax.process_count() == 1:
        return list(done)
    from jax.experimental import multihost_utils

    return [bool(x) for x in multihost_utils.broadcast_one_to_all(np.asarray(done, bool))]


def barrier(name: str) -> None:
    """Waits until every process is here, so that one may read what another has written."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
