"""Stopping between batches, and agreement between hosts about what is left to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from m3po_jax.errors import Interrupted, UserError
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


def look(what: str) -> None:
    """Stops here if a signal has arrived since the last look, on all hosts together.

    Raises:
        Interrupted: before `what` has begun.
    """
    with stop_signal() as stop:
        if stop.any_host():
            raise Interrupted(
                f"stopped by {stop.received or 'another host'} before {what}; what is finished is saved"
            )


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


def from_writer(make: Callable[[], Any]) -> Any:
    """What `make` gives on process 0, on every process; as JSON, so that tuples become lists.

    Raises:
        Exception: on process 0 what `make` raised; elsewhere an error that says so, so that no host waits forever.
    """
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    failure: BaseException | None = None
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": make()}
        except BaseException as error:
            failure = error
            outcome = {"stopped": isinstance(error, Interrupted), "error": f"on process 0: {error}"}
    data = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    data = np.asarray(
        multihost_utils.broadcast_one_to_all(data if jax.process_index() == 0 else np.zeros(size, np.uint8))
    )
    if failure is not None:
        raise failure
    outcome = json.loads(data.astype(np.uint8).tobytes())
    if "error" in outcome:
        raise (Interrupted if outcome["stopped"] else UserError)(outcome["error"])
    return outcome["value"]
