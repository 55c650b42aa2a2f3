"""Who decodes what: free lanes take waiting candidates, and cache slots are used again when nobody needs them.

A *lane* is a row of the decode step. A *place* is one candidate of one prompt slot, number slot · K + candidate.
Everything here is a pure function of small integer arrays of one row shard, without scatter or sort, so that it
runs inside the compiled loop, stays on its device and costs nothing beside a layer.

The answers' cache is a ring: at every step all lanes write the same slot, the one written longest ago, and a lane
sees the slots written since it started. The order of slots does not matter, since positions are rotated into the
keys before these are cached.

Shape suffixes: L lanes, N prompt slots, K candidates, C cache slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NEVER = -1  # when a cache slot was written that was not
VECTOR = 8  # cache slots


class Assignment(NamedTuple):
    """Who decodes what after lanes took candidates.

    Attributes:
        fresh: the lane took a candidate just now.
        place: each lane's candidate; of no meaning where the lane is free.
        pending: candidates that still wait.
        lane: each candidate's lane, L where none decodes it.
    """

    fresh: Bool[Array, " l"]
    place: Int[Array, " l"]
    pending: Bool[Array, "n k"]
    lane: Int[Array, "n k"]


def assign(
    busy: Bool[Array, " l"],
    place: Int[Array, " l"],
    pending: Bool[Array, "n k"],
    lane: Int[Array, "n k"],
    arrival: Int[Array, " n"],
    *,
    identity: bool,
) -> Assignment:
    """Free lanes, in order, take waiting candidates in the order in which their prompts arrived.

    Args:
        identity: every candidate has a lane of its own, number `place`; L is N · K.
    """
    lanes, (slots, k) = busy.shape[0], pending.shape
    numbers = jnp.arange(lanes, dtype=jnp.int32)
    if identity:
        fresh = pending.reshape(-1)
        return Assignment(
            fresh, numbers, jnp.zeros_like(pending), jnp.where(pending, numbers.reshape(slots, k), lane)
        )
    earlier = arrival[None, :] < arrival[:, None]
    before = jnp.sum(jnp.where(earlier, jnp.sum(pending, axis=1)[None, :], 0), axis=1)
    rank = (before[:, None] + jnp.cumsum(pending, axis=1) - 1).reshape(-1)  # of a waiting candidate
    free = jnp.cumsum(~busy) - 1  # rank of a free lane
    pairs = ~busy[:, None] & pending.reshape(-1)[None, :] & (free[:, None] == rank[None, :])
    fresh, taken = jnp.any(pairs, axis=1), jnp.any(pairs, axis=0).reshape(slots, k)
    assigned = jnp.argmax(pairs, axis=1).astype(jnp.int32)
    taker = jnp.argmax(pairs, axis=0).astype(jnp.int32).reshape(slots, k)
    return Assignment(fresh, jnp.where(fresh, assigned, place), pending & ~taken, jnp.where(taken, taker, lane))


def free_slots(pending: Bool[Array, "n k"], lane: Int[Array, "n k"], lanes: int) -> Bool[Array, " n"]:
    """Prompt slots of which no candidate waits or is being decoded."""
    return ~jnp.any(pending | (lane < lanes), axis=1)


def wants_prompts(
    busy: Bool[Array, " l"], pending: Bool[Array, "n k"], free: Bool[Array, " n"], quota: Int[Array, ""]
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the shard has room for `quota` prompts, and whether it has room for those and lanes with nothing to do.

    Without prompts for it (`quota` 0) a shard keeps no other waiting, and starves for nothing.
    """
    room = jnp.sum(free)
    starving = (quota > 0) & (room > 0) & ~jnp.any(pending) & ~jnp.all(busy)
    return room >= quota, starving


def slot_to_write(written: Int[Array, " c"]) -> Int[Array, ""]:
    """The cache slot written longest ago."""
    return jnp.argmin(written).astype(jnp.int32)


def needs_growth(written: Int[Array, " c"], feeds: Bool[Array, "*l"], start: Int[Array, "*l"]) -> Bool[Array, ""]:
    """Whether some lane that goes on still needs the slot that would be written next."""
    return jnp.any(feeds & (start <= jnp.min(written)))


def capacities(max_new_tokens: int, first: int = 32, multiple: int = VECTOR) -> list[int]:
    """Sizes that the answers' cache takes in turn: doubled, so that short answers never read long ones' slots.

    The last token drawn is never fed back, so the largest holds one less than the tokens, rounded up to whole
    vectors: a CPU takes half as long again for the scores of 63 slots as for those of 64.
    """
    most = -(-max(max_new_tokens - 1, 1) // multiple) * multiple
    sizes = [min(first, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def take(x: Array, places: Int[Array, "a m"]) -> Array:
    """``x[a, places[a, m]]`` for every shard a; places beyond the end give the last."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="clip"))(x, places)
