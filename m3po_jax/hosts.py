"""What several hosts share out among themselves, and what they must agree on.

`sharding.shard_batch` takes whole batches and keeps the rows of a process's own devices. Reading, decoding and
resizing an image is by far the dearest part of a row, so a process does it for those rows alone and leaves zeros in
the others. A row that cannot be read is then known to one process only: the others hear of it before any of them
starts a program that the failing one would not join.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from m3po_jax.errors import UserError

T = TypeVar("T")
Hosts = tuple[int, ...]  # numbers of processes, ascending
OwnRows = Callable[[int], Bool[np.ndarray, " n"]]  # `own_rows` on a mesh

_NONE = np.iinfo(np.int32).max


def own_rows(count: int, mesh: Mesh) -> Bool[np.ndarray, " n"]:
    """Which rows of a batch of `count` rows `shard_batch` puts on devices of this process.

    A row whose devices belong to several processes is needed by each of them.
    """
    hosts = shard_hosts(mesh)
    if count % len(hosts):
        return np.ones(count, bool)  # not split
    return np.repeat([jax.process_index() in of for of in hosts], count // len(hosts))


def shared_out(mesh: Mesh) -> OwnRows | None:
    """`own_rows` on `mesh`; None where one process has all rows."""
    return None if jax.process_count() == 1 else lambda count: own_rows(count, mesh)


def shard_hosts(mesh: Mesh) -> list[Hosts]:
    """The processes that hold the devices of each row shard (data × fsdp)."""
    shards = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    return [tuple(sorted({device.process_index for device in devices})) for devices in shards]


class Shares:
    """Deals prompts out to the hosts that answer them: the next one to those that have the fewest for their shards.

    All processes deal alike, since they see the same answers. A host whose answers are short gets more prompts.
    """

    def __init__(self, mesh: Mesh):
        self.shards = Counter(shard_hosts(mesh))
        self.open = dict.fromkeys(self.shards, 0)

    def deal(self) -> Hosts:
        """The hosts of the next prompt."""
        chosen = min(self.open, key=lambda hosts: (self.open[hosts] / self.shards[hosts], hosts))
        self.open[chosen] += 1
        return chosen

    def answered(self, hosts: Hosts | None) -> None:
        """A prompt that was dealt to `hosts` needs their devices no more."""
        if hosts is not None:
            self.open[hosts] -= 1


def first_failure(own: tuple[int, UserError] | None) -> tuple[int, UserError] | None:
    """(place, error) of the least place at which any process failed; the same on all, which call it together.

    Args:
        own: Of this process. Alone it comes back as it is.
    """
    if jax.process_count() == 1:
        return own
    from jax.experimental import multihost_utils

    message = b"" if own is None else json.dumps([own[1].what, own[1].where, own[1].remedy]).encode()
    heads = np.array([_NONE if own is None else own[0], len(message)], np.int32)
    heads = np.asarray(multihost_utils.process_allgather(heads))
    chosen = int(np.argmin(heads[:, 0]))
    place, size = (int(x) for x in heads[chosen])
    if place == _NONE:
        return None
    padded = np.zeros(int(heads[:, 1].max()), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    told = np.asarray(multihost_utils.process_allgather(padded))[chosen, :size]
    what, where, remedy = json.loads(told.astype(np.uint8).tobytes())
    return place, UserError(what, where=where, remedy=remedy)


def together(make: Callable[[], T]) -> T:
    """What `make` gives; where it raised a UserError on any process, that on all, which call it together."""
    failure = None
    try:
        made = make()
    except UserError as error:
        failure = 0, error
    failure = first_failure(failure)
    if failure is not None:
        raise failure[1]
    return made


def shared_hashes(count: int, hash_of: Callable[[int], str]) -> list[str]:
    """`hash_of(place)`, a SHA-256 in hex, of all places; each process makes its share of them, and all get all.

    Raises:
        UserError: on every process, what the first place raised on its own.
    """
    hosts = jax.process_count()
    made = load_shared(hash_of, lambda _: "00" * 32, np.arange(count) % hosts == jax.process_index())
    if hosts == 1 or count == 0:
        return made
    from jax.experimental import multihost_utils

    table = np.array([list(bytes.fromhex(key)) for key in made], np.uint8)
    whole = np.max(multihost_utils.process_allgather(table), axis=0).astype(np.uint8)
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
