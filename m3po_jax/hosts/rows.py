"""What several hosts share out among themselves.

`sharding.shard_batch` takes whole batches and keeps the rows of a process's own devices. Reading, decoding and
resizing an image is by far the dearest part of a row, so a process does it for those rows alone and leaves zeros in
the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

Hosts = tuple[int, ...]  # numbers of processes, ascending
OwnRows = Callable[[int], Bool[np.ndarray, " n"]]  # `own_rows` on a mesh


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
