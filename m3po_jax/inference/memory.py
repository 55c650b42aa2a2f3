"""What a batch of candidates needs in device memory, and which number to lower when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax

from m3po_jax.errors import UserError
from m3po_jax.inference.lanes import capacities
from m3po_jax.models.decoder_config import DecoderConfig

GIB = 2**30


@dataclass(frozen=True)
class CacheShape:
    """The sizes that the key/value cache is made of.

    Attributes:
        rows: prompts whose candidates are decoded at once, over all devices.
        held: prompts whose prefix is kept, those that wait included.
        views: passes per prompt (2 with contrastive decoding).
        prefix: padded prompt tokens, image tokens included.
        row_parts: devices that rows are split over; no fewer rows than this are ever computed.
        head_parts: devices that key/value heads are split over.
    """

    rows: int
    held: int
    views: int
    prefix: int
    candidates: int
    new_tokens: int
    row_parts: int = 1
    head_parts: int = 1

    @classmethod
    def on_mesh(cls, mesh_shape: Mapping[str, int], kv_heads: int, **sizes: int) -> CacheShape:
        """The shape on a mesh, by the rules of `sharding.RULES`: heads that do not divide stay whole."""
        tensor = mesh_shape["tensor"] if kv_heads % mesh_shape["tensor"] == 0 else 1
        return cls(row_parts=mesh_shape["data"] * mesh_shape["fsdp"], head_parts=tensor, **sizes)


def cache_bytes(config: DecoderConfig, shape: CacheShape, itemsize: int) -> int:
    """Bytes of keys and values on each device: prompts held × prefix + rows × candidates × slots of the largest
    cache of answers.
    """
    slots = shape.held * shape.prefix + shape.rows * shape.candidates * capacities(shape.new_tokens)[-1]
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return shape.views * slots * per_slot // (shape.row_parts * shape.head_parts)


def advice(config: DecoderConfig, shape: CacheShape, itemsize: int) -> str:
    """The number to lower first, and what that saves.

    Fewer prompts in flight change no answer, so that comes first; at one prompt a device only fewer candidates
    or shorter answers are left, and what is left to try is the larger of the two parts of the cache.
    """

    def size(smaller: CacheShape) -> str:
        return f"{cache_bytes(config, smaller, itemsize) / GIB:.2f} GiB"

    if shape.rows > shape.row_parts:
        rows = max(shape.rows // 2 // shape.row_parts, 1) * shape.row_parts
        smaller = replace(shape, rows=rows, held=max(shape.held * rows // shape.rows, rows))
        return (
            f"lower generate.batch_size from {shape.rows} to {rows} ({size(smaller)}; the answers stay "
            "the same; for evaluation it is evaluate.batch_size)"
        )
    if shape.candidates * capacities(shape.new_tokens)[-1] * shape.rows <= shape.held * shape.prefix:
        return "split the model over more devices (mesh.fsdp, mesh.tensor): a single prompt's prefix does not fit"
    tokens, few = max(shape.new_tokens // 2, 1), max(shape.candidates // 2, 1)
    parts = [
        f"generate.max_new_tokens from {shape.new_tokens} to {tokens} ({size(replace(shape, new_tokens=tokens))})"
    ]
    if few < shape.candidates:
        parts.insert(
            0, f"generate.num_candidates from {shape.candidates} to {few} ({size(replace(shape, candidates=few))})"
        )
    return "lower " + " or ".join(parts)


@contextmanager
def explain_exhaustion(config: DecoderConfig, shape: CacheShape, itemsize: int) -> Iterator[None]:
    """Turns the compiler's or allocator's RESOURCE_EXHAUSTED into a `UserError` that names the number to lower.

    Raises:
        UserError: the program does not fit. Other errors of the runtime pass.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{shape.held} prompts of {shape.prefix} tokens with {shape.rows} × {shape.candidates} candidates of "
            f"{shape.new_tokens} tokens do not fit into device memory: keys and values alone take "
            f"{cache_bytes(config, shape, itemsize) / GIB:.2f} GiB a device",
            where="generate",
            remedy=advice(config, shape, itemsize),
        ) from error
