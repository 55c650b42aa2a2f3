"""What all hosts must know alike: what is done, what one has written, and at which place one of them failed.

A row that cannot be read is known to one process only: the others hear of it before any of them starts a program that
the failing one would not join. Every function here is called by all processes together, `is_writer` excepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from m3po_jax.errors import Interrupted, UserError

T = TypeVar("T")
_NONE = np.iinfo(np.int32).max


def is_writer() -> bool:
    """Whether this process writes what all processes know."""
    return jax.process_index() == 0


def writers(array: np.ndarray) -> np.ndarray:
    """Process 0's array on every process, each of which gives one of this shape."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def gathered(array: Any) -> np.ndarray:
    """The arrays of all processes, which have one shape, along a new first axis."""
    if jax.process_count() == 1:
        return np.asarray(array)[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def agreed(done: Sequence[bool]) -> list[bool]:
    """Process 0's view of what is done, on every process: file systems may show a file late."""
    return writers(np.asarray(done, bool)).astype(bool).tolist()


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
    failure: BaseException | None = None
    outcome: dict[str, Any] = {}
    if is_writer():
        try:
            outcome = {"value": make()}
        except BaseException as error:
            failure = error
            outcome = {"stopped": isinstance(error, Interrupted), "error": f"on process 0: {error}"}
    data = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(writers(np.asarray(len(data), np.int32)))
    data = writers(data if is_writer() else np.zeros(size, np.uint8))
    if failure is not None:
        raise failure
    outcome = json.loads(data.astype(np.uint8).tobytes())
    if "error" in outcome:
        raise (Interrupted if outcome["stopped"] else UserError)(outcome["error"])
    return outcome["value"]


def first_failure(failure: tuple[int, UserError] | None) -> tuple[int, UserError] | None:
    """(place, error) of the least place at which any process failed; the same on all, which call it together.

    Args:
        failure: Of this process. Alone it comes back as it is.
    """
    if jax.process_count() == 1:
        return failure
    message = b"" if failure is None else json.dumps([failure[1].what, failure[1].where, failure[1].remedy]).encode()
    heads = gathered(np.array([_NONE if failure is None else failure[0], len(message)], np.int32))
    chosen = int(np.argmin(heads[:, 0]))
    place, size = (int(x) for x in heads[chosen])
    if place == _NONE:
        return None
    padded = np.zeros(int(heads[:, 1].max()), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    encoded = gathered(padded)[chosen, :size]
    what, where, remedy = json.loads(encoded.astype(np.uint8).tobytes())
    return place, UserError(what, where=where, remedy=remedy)


def together(make: Callable[[], T]) -> T:
    """What `make` gives; where it raised a UserError on any process, that on all, which call it together."""
    return load_shared(lambda _: make(), lambda _: make(), [True])[0]


def shared_hashes(count: int, hash_of: Callable[[int], str]) -> list[str]:
    """`hash_of(place)`, a SHA-256 in hex, of all places; each process makes its share of them, and all get all.

    Raises:
        UserError: on every process, what the first place raised on its own.
    """
    hosts = jax.process_count()
    hashes = load_shared(hash_of, lambda _: "00" * 32, np.arange(count) % hosts == jax.process_index())
    if hosts == 1 or count == 0:
        return hashes
    table = np.array([list(bytes.fromhex(key)) for key in hashes], np.uint8)
    whole = np.max(gathered(table), axis=0).astype(np.uint8)
    return [row.tobytes().hex() for row in whole]


def load_shared(load: Callable[[int], T], absent: Callable[[int], T], needed: Sequence[bool] | np.ndarray) -> list[T]:
    """`load(place)` for the places that this process needs, `absent(place)` for the others.

    Raises:
        UserError: on every process, what the first place that could not be loaded raised on its own.
    """
    loaded: list[T] = []
    failure = None
    for place, wanted in enumerate(needed):
        try:
            loaded.append(load(place) if wanted else absent(place))
        except UserError as error:
            failure = place, error
            break
    failure = first_failure(failure)
    if failure is not None:
        raise failure[1]
    return loaded
