"""The host's part of generation: prompts into free slots, answers out of finished ones, the state enlarged.

The device never waits for a decision about a single token; it returns when prompts are needed, and while it works
the host prepares those. All processes of a run go through the same steps, since they see the same reports.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from m3po_jax.data.collation import PromptRow
from m3po_jax.data.model_images import stacked
from m3po_jax.data.padding import pad_ragged, prompt_bucket
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import shard_hosts
from m3po_jax.hosts.sharding import replicate, shard_batch, to_host, use_mesh
from m3po_jax.inference.lanes import capacities
from m3po_jax.inference.sampling import candidate_keys
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.inference.state import Board, Cache, Lanes, PromptSlots, Report, Sizes, StateLayout


class Engine(Protocol):
    """What a stream works with; `generator.Generator` tells what each is."""

    mesh: Mesh
    sampling: SamplingConfig
    graph: Any
    weights: Any
    constants: dict[str, jax.Array]
    layout: StateLayout
    prefill: Any
    decode: Any
    batch_size: int
    prefix_bucket: int
    pad_token_id: int
    slot_steps: int

    def sizes(self, count: int | None, prefix: int) -> Sizes: ...

    def prefill_rows(self, length: int) -> int: ...

    def explained(self, sizes: Sizes, prefix: int) -> AbstractContextManager[None]: ...


class StreamProgram(NamedTuple):
    """A compiled program of a stream, for those who measure.

    Attributes:
        calls: how often it runs.
        steps: how often its loop over tokens runs in one call; 0 for a program without.
        state: bytes of the state on all devices, arguments and results of the program.
        slots: of the answers' cache; 0 for a program without.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    calls: int
    steps: int
    state: int
    slots: int


class Stream:
    """One pass over prompts; iterate over it once."""

    def __init__(self, engine: Engine, prompts: Iterable[PromptRow | None], count: int | None = None):
        self.engine, self.source = engine, iter(prompts)
        self.count = count
        self.hosts = shard_hosts(engine.mesh)  # of each shard
        self.queue: deque[PromptRow] = deque()  # drawn from the source, not yet on the device
        self.held: dict[tuple[int, int], PromptRow] = {}  # by (shard, slot)
        self.exhausted = False
        self.failure: BaseException | None = None  # of the source, raised when everything before it is answered
        self.arrivals = 0
        self.prefix = self.rows = 0  # padded length of prompts, and how many a shard prefills at once
        self.prompts: PromptSlots | None = None
        self.board: Board | None = None
        self.lanes: Lanes | None = None
        self.cache: Cache | None = None

    def __iter__(self) -> Iterator[PromptRow]:
        self._draw(self.engine.batch_size)
        if self.queue:
            self._measure()
            self.sizes = self.engine.sizes(self.count, self.prefix)
            self.capacities = capacities(self.sizes.tokens)
            self._draw()
        while self.queue or self.held:
            with use_mesh(self.engine.mesh), self.engine.explained(self.sizes, self.prefix):
                self._fill()
                report = self._decode()
            self._draw()  # while the device decodes
            with use_mesh(self.engine.mesh), self.engine.explained(self.sizes, self.prefix):
                host = jax.tree.map(to_host, report)
                done = self._harvest(host)
            self.engine.slot_steps += int(host.steps) * self.sizes.shards * self.sizes.lanes
            yield from done
            self._check(host)
            if host.grow:
                assert self.cache is not None
                with use_mesh(self.engine.mesh), self.engine.explained(self.sizes, self.prefix):
                    larger = self.capacities[self.capacities.index(self.cache.written.shape[0]) + 1]
                    self.cache = self.engine.layout.larger_cache(self.cache, larger)
            self._draw()  # what the answers made the source give
        if self.failure is not None:
            raise self.failure
        if not self.exhausted:
            raise ValueError("the source of prompts waits for answers, and none is due")

    def programs(self) -> list[StreamProgram]:
        """What the prompts need if every answer is as long as allowed."""
        engine = self.engine
        self._draw(engine.batch_size)
        self._measure()
        self.sizes = engine.sizes(self.count, self.prefix)
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
        prompts, board, lanes = engine.layout.empty.eval_shape(self.sizes, self.prefix)
        given = [(engine.graph, engine.weights, prompts, board, self._arrays())]
        while self.queue:
            given.append((engine.graph, engine.weights, prompts, board, self._arrays()))
        state = size((prompts, board, lanes))
        programs = [StreamProgram("prefill", engine.prefill, given[0], len(given), 0, state, 0)]
        quota, filled = replicate(np.zeros(self.sizes.shards, np.int32), engine.mesh), 0
        for capacity in capacities(self.sizes.tokens):
            cache = engine.layout.empty_cache.eval_shape(self.sizes, capacity)
            before = (engine.graph, self.sizes, engine.weights, prompts, board, lanes, cache)
            steps = min(capacity, self.sizes.tokens - 1) - filled
            filled += steps
            whole = state + size(cache)
            arguments: tuple[Any, ...] = (*before, engine.constants, quota)
            programs.append(StreamProgram(f"decode_{capacity}", engine.decode, arguments, 1, steps, whole, capacity))
        return programs

    def _draw(self, most: int = 0) -> None:
        """Prompts from the source: `most`, or those that fit, and those of the next two calls of prefill."""
        while not self.exhausted and (len(self.queue) < most if most else self._lacking() > 0):
            try:
                prompt = next(self.source)
            except StopIteration:
                self.exhausted = True
            except Exception as error:  # whatever it is, it waits: prompts drawn before it are answered first
                self.exhausted, self.failure = True, error
            else:
                if prompt is None:
                    return
                self.queue.append(prompt)

    def _lacking(self) -> int:
        """How many prompts the queue needs, so that all shards find what they may take."""
        held = Counter(self.hosts[shard] for shard, _ in self.held)
        waiting = Counter(prompt.hosts for prompt in self.queue)
        # More than fit, or the device would be told that none is left and run until all answers have ended.
        most = self.sizes.slots + 2 * self.rows
        lacking = [max(n * most - held[of] - waiting[of], 0) for of, n in Counter(self.hosts).items()]
        return sum(lacking) - waiting[None]

    def _measure(self) -> None:
        """Room for the longest prompt of the queue; an eighth more at least, so that growth costs few programs."""
        multiple = self.engine.prefix_bucket
        length = prompt_bucket(max(map(len_of, self.queue)), multiple)
        if length > self.prefix:
            self.prefix = max(length, prompt_bucket(self.prefix * 9 // 8, multiple))
            self.rows = self.engine.prefill_rows(self.prefix)

    def _fill(self) -> None:
        """Prompts into free slots, a few at a time."""
        while self._takes():
            before = self.prefix
            self._measure()
            if self.prompts is None:
                self.prompts, self.board, self.lanes = self.engine.layout.empty(self.sizes, self.prefix)
            elif self.prefix > before:
                self.prompts = self.engine.layout.longer_prefix(self.prompts, self.prefix)
            self.prompts, self.board = self.engine.prefill(
                self.engine.graph, self.engine.weights, self.prompts, self.board, self._arrays()
            )

    def _takes(self) -> bool:
        """Whether a prompt of the queue fits into a shard that may have it."""
        held = Counter(shard for shard, _ in self.held)
        roomy = (shard for shard in range(self.sizes.shards) if held[shard] < self.sizes.slots)
        return any(self._next(shard) is not None for shard in roomy)

    def _next(self, shard: int) -> int | None:
        """Place in the queue of the first prompt that the shard may take; on one host the first of all."""
        allowed = (None, self.hosts[shard])
        return next((place for place, prompt in enumerate(self.queue) if prompt.hosts in allowed), None)

    def _chosen(self) -> dict[int, tuple[int, PromptRow]]:
        """Rows of the program, and the slot and prompt that each gets; these leave the queue."""
        sizes = self.sizes
        free = [[n for n in range(sizes.slots) if (shard, n) not in self.held] for shard in range(sizes.shards)]
        chosen: dict[int, tuple[int, PromptRow]] = {}
        for row in range(self.rows):
            # The emptiest shard first, so that all have work when prompts run out.
            for shard in sorted(range(sizes.shards), key=lambda shard: -len(free[shard])):
                place = self._next(shard) if free[shard] else None
                if place is not None and _alike(self.queue[place], chosen.values()):
                    slot, prompt = free[shard].pop(0), self.queue[place]
                    del self.queue[place]
                    self.held[shard, slot] = prompt
                    chosen[shard * self.rows + row] = (slot, prompt)
        return chosen

    def _arrays(self) -> dict[str, jax.Array]:
        """The next prompts of the queue, padded, with the slots that they get."""
        sizes, engine, rows = self.sizes, self.engine, self.rows
        chosen = self._chosen()
        first = next(iter(chosen.values()))[1]
        filled = [chosen.get(row, (sizes.slots, first)) for row in range(sizes.shards * rows)]
        prompts = [prompt for _, prompt in filled]
        width = prompt_bucket(max(map(len_of, prompts)), engine.prefix_bucket)
        token_ids, mask = pad_ragged([p.token_ids for p in prompts], (len(filled), width), engine.pad_token_id)
        wanted = np.zeros((len(filled), sizes.candidates), bool)
        arrival = np.zeros(len(filled), np.int32)
        for row, prompt in enumerate(prompts):
            wanted[row, slice(None) if prompt.wanted is None else list(prompt.wanted)] = True
        for row in chosen:
            arrival[row] = self.arrivals
            self.arrivals += 1
        keys = {r.id: candidate_keys(engine.sampling.seed, [r.id], sizes.candidates, r.attempt) for r in prompts}
        arrays: dict[str, Any] = {
            "token_ids": token_ids,
            "length": mask.sum(axis=1, dtype=np.int32),
            "slot": np.array([slot for slot, _ in filled], np.int32).reshape(sizes.shards, rows),
            "keys": np.concatenate([keys[prompt.id] for prompt in prompts]),
            "wanted": wanted,
            "arrival": arrival,
        }
        if first.images:
            arrays["images"] = stacked([prompt.images for prompt in prompts])
        return shard_batch(arrays, engine.mesh)

    def _decode(self) -> Report:
        engine = self.engine
        if self.cache is None:
            self.cache = engine.layout.empty_cache(self.sizes, self.capacities[0])
        shards, waiting = Counter(self.hosts), Counter(prompt.hosts for prompt in self.queue)
        of = [waiting[hosts] / shards[hosts] + waiting[None] / len(self.hosts) for hosts in self.hosts]
        quota = np.array([min(self.rows, math.ceil(count)) for count in of], np.int32)
        self.board, self.lanes, self.cache, report = engine.decode(
            engine.graph,
            self.sizes,
            engine.weights,
            self.prompts,
            self.board,
            self.lanes,
            self.cache,
            engine.constants,
            replicate(quota, engine.mesh),
        )
        return report

    def _harvest(self, report: Report) -> list[PromptRow]:
        """Takes the answers of finished prompts off the device; broken ones are left."""
        over = [place for place in self.held if report.free[place] and not report.broken[place]]
        if not over:
            return []
        assert self.board is not None
        token_ids, log_probs, lengths = map(to_host, (self.board.token_ids, self.board.log_probs, self.board.lengths))

        def of(table: np.ndarray, place: tuple[int, int]) -> tuple[np.ndarray, ...]:
            return tuple(row[:length].copy() for row, length in zip(table[place], lengths[place], strict=True))

        return [
            dataclasses.replace(self.held.pop(place), answers=of(token_ids, place), log_probs=of(log_probs, place))
            for place in over
        ]

    def _check(self, report: Report) -> None:
        broken = [prompt for place, prompt in self.held.items() if report.broken[place]]
        if broken:
            raise UserError(
                "the model's logits are not finite",
                where=f"prompt {broken[0].id}",
                remedy="check the checkpoint, or compute in float32 (model.dtype=float32)",
            )


def len_of(prompt: PromptRow) -> int:
    return len(prompt.token_ids)


def _alike(prompt: PromptRow, others: Iterable[tuple[int, PromptRow]]) -> bool:
    """Whether a prompt can share a program with the others: all have images of one kind, or none has."""
    kind = lambda r: {name: x.shape[1:] for name, x in r.images.items()}  # noqa: E731
    return all(kind(other) == kind(prompt) for _, other in others)
