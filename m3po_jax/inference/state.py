"""What generation keeps on the devices between two programs, and how it grows.

Every array has a leading axis over row shards (A = data × fsdp; caches have it merged with the next one). Each shard
serves its own prompts with its own lanes, so that nothing but the loop's condition crosses devices.

Shape suffixes: A row shards, N prompt slots, K candidates, L lanes, V views of a prompt (2 with contrastive
decoding), P prefix tokens, C cache slots, T new tokens, G key/value heads, D head width, E model width, W words of
the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from m3po_jax.hosts.sharding import replicate, to_host
from m3po_jax.inference import lanes as lane
from m3po_jax.models.attention_parts import KV
from m3po_jax.models.decoder_config import DecoderConfig

ROWS = ("data", "fsdp")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the state; `identity`: every candidate has a lane of its own."""

    shards: int
    slots: int
    lanes: int
    candidates: int
    views: int
    tokens: int
    penalized: bool

    @property
    def identity(self) -> bool:
        return self.lanes == self.slots * self.candidates


class PromptSlots(NamedTuple):
    """Written by prefill, read by decoding."""

    kv: list[KV]  # of each layer, [A·N·V, G, P, D]
    length: Int[Array, "a n"]
    following: Int[Array, "a n"]  # rotary position of the first token after the prompt
    hidden: Float[Array, "a n v e"]  # the state that predicts the first token
    keys: UInt32[Array, "a n k 2"]
    arrival: Int[Array, "a n"]
    penalized: Bool[Array, "a n w"] | None  # what the repetition penalty counts before the first token


class Board(NamedTuple):
    """The candidates of the prompts that are held: who waits, who decodes, and what was drawn."""

    pending: Bool[Array, "a n k"]
    lane: Int[Array, "a n k"]  # L where none decodes it
    token_ids: Int[Array, "a n k t"]
    log_probs: Float[Array, "a n k t"]
    lengths: Int[Array, "a n k"]
    broken: Bool[Array, "a n"]  # NaN logits


class Lanes(NamedTuple):
    """The rows of the decode step; see `lanes.py`."""

    place: Int[Array, "a l"]
    age: Int[Array, "a l"]  # tokens drawn
    start: Int[Array, "a l"]  # the step at which the first of them was written to the cache
    token: Int[Array, "a l"]  # the latest
    busy: Bool[Array, "a l"]
    penalized: Bool[Array, "a l w"] | None


class Cache(NamedTuple):
    """Keys and values of the answers."""

    kv: list[KV]  # of each layer, [A·L·V, G, C, D]
    written: Int[Array, " c"]  # the step at which a slot was written
    step: Int[Array, ""]


class Report(NamedTuple):
    """What the host reads after decoding."""

    free: Bool[Array, "a n"]
    broken: Bool[Array, "a n"]
    grow: Bool[Array, ""]  # the cache has no slot left
    steps: Int[Array, ""]  # that were taken, each of all lanes


class StateLayout:
    """Where the arrays lie on a mesh, and programs that make and enlarge them."""

    def __init__(self, mesh: Mesh, config: DecoderConfig, dtype: Any, vocab: int):
        self.mesh, self.config, self.dtype, self.vocab = mesh, config, dtype, vocab
        heads = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
        self.rows, self.whole = NamedSharding(mesh, P(ROWS)), NamedSharding(mesh, P())
        self.kv = NamedSharding(mesh, P(ROWS, heads))
        self.prompts_sharding = PromptSlots(self.kv, *[self.rows] * 6)  # type: ignore[arg-type]
        self.cache_sharding = Cache(self.answers_kv, self.whole, self.whole)  # type: ignore[arg-type]
        self.empty = jax.jit(
            self._empty, static_argnums=(0, 1), out_shardings=(self.prompts_sharding, self.rows, self.rows)
        )
        self.empty_cache = jax.jit(self._empty_cache, static_argnums=(0, 1), out_shardings=self.cache_sharding)
        self._pad = cache(lambda place: jax.jit(self._padded, static_argnums=(1, 2), out_shardings=place))

    @cached_property
    def answers_kv(self) -> Any:
        """Where the keys and values of the answers lie.

        A TPU writes a token's slot in place if slots are the slowest axis in memory: left to itself, its compiler
        copies the whole cache into that order, and back, around every loop over tokens.
        """
        return self.slots_slowest() if self.mesh.devices.flat[0].platform == "tpu" else self.kv

    def slots_slowest(self) -> Format:
        return Format(Order((2, 1, 0, 3)), self.kv)

    def _empty(self, sizes: Sizes, prefix: int) -> tuple[PromptSlots, Board, Lanes]:
        a, n, k, lanes = sizes.shards, sizes.slots, sizes.candidates, sizes.lanes
        c, views = self.config, sizes.views
        zeros, integers = partial(jnp.zeros, dtype=bool), partial(jnp.zeros, dtype=jnp.int32)
        empty = lambda: jnp.zeros((a * n * views, c.num_kv_heads, prefix, c.head_dim), self.dtype)  # noqa: E731
        prompts = PromptSlots(
            [(empty(), empty()) for _ in range(c.num_layers)],
            integers((a, n)),
            integers((a, n)),
            jnp.zeros((a, n, views, c.hidden_size), self.dtype),
            jnp.zeros((a, n, k, 2), jnp.uint32),
            integers((a, n)),
            zeros((a, n, self.vocab)) if sizes.penalized else None,
        )
        board = Board(
            zeros((a, n, k)),
            jnp.full((a, n, k), lanes, jnp.int32),
            integers((a, n, k, sizes.tokens)),
            jnp.zeros((a, n, k, sizes.tokens), jnp.float32),
            integers((a, n, k)),
            zeros((a, n)),
        )
        place, age, start, token = (integers((a, lanes)) for _ in range(4))
        penalized = zeros((a, lanes, self.vocab)) if sizes.penalized else None
        return prompts, board, Lanes(place, age, start, token, zeros((a, lanes)), penalized)

    def _empty_cache(self, sizes: Sizes, capacity: int) -> Cache:
        c = self.config
        shape = (sizes.shards * sizes.lanes * sizes.views, c.num_kv_heads, capacity, c.head_dim)
        kv = [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(c.num_layers)]
        return Cache(kv, jnp.full(capacity, lane.NEVER, jnp.int32), jnp.int32(0))

    @staticmethod
    def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
        return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    def longer_prefix(self, prompts: PromptSlots, prefix: int) -> PromptSlots:
        """Room for longer prompts; layer by layer, so that only one of them exists twice."""
        return prompts._replace(kv=self._grown(prompts.kv, self.kv, prefix))

    def larger_cache(self, cache: Cache, capacity: int) -> Cache:
        """More slots for the answers."""
        more = capacity - cache.written.shape[0]
        written = np.pad(to_host(cache.written), (0, more), constant_values=lane.NEVER)
        written = replicate(written, self.mesh)
        return Cache(self._grown(cache.kv, self.answers_kv, capacity), written, cache.step)

    def _grown(self, kv: list[KV], place: Any, size: int) -> list[KV]:
        for index in range(len(kv)):
            k, v = kv[index]
            kv[index] = (self._pad(place)(k, 2, size), self._pad(place)(v, 2, size))
            k.delete()
            v.delete()
        return kv
