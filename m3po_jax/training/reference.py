"""Reference log-probs outside the step: a sample that checks recorded ones, and a cache of computed ones on disk."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jax.sharding import Mesh

from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.tables import atomic_write, content_hash, shards
from m3po_jax.hosts.agreement import is_writer, shared_hashes, writers
from m3po_jax.hosts.sharding import shard_batch, to_host, use_mesh
from m3po_jax.objectives.model_passes import reference_sums
from m3po_jax.training.guards import check_recorded

_logger = logging.getLogger(__name__)

_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("sums", pa.list_(pa.float64()))])
_SHARD_ROWS = 1024


def sums_program(model: nnx.Module, mesh: Mesh) -> Callable[[Any], np.ndarray]:
    """Batch -> Σ log π of its answers [b, k] under `model` as given, on the host."""
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, batch: reference_sums(nnx.merge(graph, state), batch))

    def sums(batch: Any) -> np.ndarray:
        with use_mesh(mesh):
            return to_host(jitted(state, shard_batch(batch, mesh))).astype(np.float64)

    return sums


def _chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    """Equal chunks, the last filled up with its last row: fewer shapes to compile."""
    parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [part + [part[-1]] * (size - len(part)) for part in parts]


def check_sample(model: nnx.Module, batches: BatchSource, mesh: Mesh, rows: int, limit: float) -> None:
    """Computes the reference of `rows` rows, evenly spread, and compares it with what is recorded for them.

    Args:
        model: The reference model.
        limit: Nats per token that the two may differ.

    Raises:
        UserError: they differ by more.
    """
    assert batches.take is not None
    total = len(batches.ids)
    chosen = np.unique(np.linspace(0, total - 1, min(rows, total)).astype(int)).tolist()
    program = sums_program(model, mesh)
    for part in _chunks(chosen, min(len(chosen), 8)):
        batch = batches.take(part)
        if np.isfinite(batch.reference).any():
            lengths = np.sum(batch.branch_mask, axis=-1)
            check_recorded(batch.reference, program(batch), lengths, [batches.ids[i] for i in part], limit)


class ReferenceCache:
    """Log-prob sums by the hash of (model, prompt, images, answers), in parquet shards that any number of
    processes may add to: a shard is named by its content and appears whole."""

    def __init__(self, folder: str | Path, identity: str):
        """`identity`: a hash of the reference model's weights, template and dtype."""
        self.folder = Path(folder) / identity

    def load(self) -> dict[str, list[float]]:
        """Everything that is stored; a damaged shard is set aside with a warning, and its rows are made again."""
        stored: dict[str, list[float]] = {}
        for path in shards(self.folder):
            try:
                table = pq.read_table(path, schema=_SCHEMA)
            except (OSError, pa.ArrowException) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                _logger.warning("%s: damaged (%s), its rows are computed again", path, reason)
                path.unlink(missing_ok=True)
                continue
            stored.update(zip(table["key"].to_pylist(), table["sums"].to_pylist(), strict=True))
        return stored

    def add(self, rows: dict[str, list[float]]) -> None:
        keys = sorted(rows)
        table = pa.Table.from_arrays(
            [pa.array(keys, pa.string()), pa.array([rows[key] for key in keys], pa.list_(pa.float64()))],
            schema=_SCHEMA,
        )
        with atomic_write(self.folder / f"{content_hash(keys)[:24]}.parquet") as file:
            pq.write_table(table, file)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in shards(self.folder))


def with_cached_reference(
    batches: BatchSource, model: nnx.Module, mesh: Mesh, cache: ReferenceCache, *, rows_at_once: int
) -> tuple[BatchSource, int]:
    """The source with the reference's sums in its batches, and how many rows had to be computed.

    Args:
        model: The reference model, whose identity `cache` has.
        rows_at_once: Rows of one forward pass; what is finished is stored every thousand rows or so.
    """
    assert batches.take is not None and batches.row_key is not None
    keys = shared_hashes(len(batches.ids), batches.row_key)
    stored = cache.load()
    branches = np.shape(batches.take([0]).reference)[1]
    usable = lambda sums: sums is not None and len(sums) == branches and all(map(math.isfinite, sums))  # noqa: E731
    sums = np.array([stored[key] if usable(stored.get(key)) else [np.nan] * branches for key in keys], np.float64)
    sums = writers(sums)  # file systems may show a file late
    missing = [index for index in range(len(keys)) if np.isnan(sums[index]).any()]
    program, fresh = sums_program(model, mesh), {}
    for part in _chunks(missing, max(rows_at_once, 1)):
        for index, row in zip(part, program(batches.take(part)), strict=True):
            sums[index] = row
            fresh[keys[index]] = row.tolist()
        if len(fresh) >= _SHARD_ROWS:
            _store(cache, fresh)
            fresh = {}
    if fresh:
        _store(cache, fresh)
    table, take = sums.astype(np.float32), batches.take

    def fill(batch: Any) -> Any:
        return batch._replace(reference=table[batch.row_index])

    filled = dataclasses.replace(
        batches,
        dataset=batches.dataset.map(fill),
        take=lambda rows: fill(take(rows)),
        has_reference=True,
        fingerprint=content_hash(batches.fingerprint, cache.folder.name),
    )
    return filled, len(missing)


def _store(cache: ReferenceCache, rows: dict[str, list[float]]) -> None:
    if is_writer():
        cache.add(rows)
