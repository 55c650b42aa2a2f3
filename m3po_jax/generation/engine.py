"""The batched generation engine: K candidates of every prompt, with the raw log-probability of every token.

A prompt's image is encoded once and its prefix prefilled once; its candidates decode against that one copy.
All shapes are static: prompts are padded to a bucketed length and batches to a fixed number of rows, so that
one compiled program serves every batch of a kind.

Shape suffixes: B prompts, P prefix tokens, K candidates, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from m3po_jax.errors import UserError
from m3po_jax.generation import sampling as draw
from m3po_jax.generation.decoder import KV, FusedLayer, decode_step, empty_chunks, fuse, prefill
from m3po_jax.generation.memory import CacheShape, explain_exhaustion
from m3po_jax.generation.settings import SamplingConfig
from m3po_jax.models.forward import VisionLanguageModel, encode_images
from m3po_jax.sharding import constrain, replicate, shard_batch, to_host, use_mesh

FIRST_CHUNK = 64  # cache slots of the first stage of decoding; every later stage doubles the cache


@dataclass
class PromptBatch:
    """Prompts on the host, right-padded. `pixel_values` is normalised; None for text alone."""

    ids: list[str]
    token_ids: Int32[np.ndarray, "b p"]
    mask: Bool[np.ndarray, "b p"]
    pixel_values: Float32[np.ndarray, "b m h w 3"] | None = None


@dataclass
class Generated:
    """Candidates on the host. Slots after a candidate's end hold the padding id and log-probability 0.

    Attributes:
        log_probs: log π(token) in nats at temperature 1 without truncation, the end token included.
        lengths: tokens, the end token included.
        finished: true where the end token was drawn; false where `max_new_tokens` cut the answer.
        slot_steps: tokens that the device could have drawn in the time: steps × rows (padding too) × candidates.
            The sum of `lengths` over this is the occupancy.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b k t"]
    log_probs: Float32[np.ndarray, "b k t"]
    lengths: Int32[np.ndarray, "b k"]
    finished: Bool[np.ndarray, "b k"]
    slot_steps: int

    @property
    def finish_reasons(self) -> list[list[str]]:
        """``stop`` or ``length`` for every candidate."""
        return [["stop" if done else "length" for done in row] for row in self.finished]


class DeviceResult(NamedTuple):
    """What the compiled program returns: `steps` tokens drawn, `broken` prompts with NaN logits."""

    token_ids: Int[Array, "b k t"]
    log_probs: Float[Array, "b k t"]
    lengths: Int[Array, "b k"]
    finished: Bool[Array, "b k"]
    broken: Bool[Array, " b"]
    steps: Int[Array, ""]


@dataclass
class Pending:
    """A batch at work on the device; `Generator.collect` waits for it."""

    ids: list[str]
    result: DeviceResult = field(repr=False)
    prefix: int  # padded prompt tokens


class _State(NamedTuple):
    """The decode loop's carry. `step` tokens of every candidate have been drawn."""

    step: jax.Array
    token: jax.Array  # [B, K], the latest draw
    token_ids: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    finished: jax.Array
    stopped: jax.Array  # finished, broken, padding or not wanted: drawn no further
    broken: jax.Array
    seen: jax.Array | None  # [B, K, V], what the repetition penalty counts; None where it is off
    chunk: list[KV]


def bucket(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `length`, at least one."""
    return max(-(-length // multiple), 1) * multiple


def chunk_sizes(max_new_tokens: int) -> list[int]:
    """Cache slots by stage: capacity doubles, so that a short answer never reads a long answer's slots."""
    slots = max_new_tokens - 1  # the last token drawn is never fed back
    sizes: list[int] = []
    while sum(sizes) < slots:
        sizes.append(min(sum(sizes) or FIRST_CHUNK, slots - sum(sizes)))
    return sizes


def pad_rows(x: np.ndarray, rows: int, columns: int | None = None, value: Any = 0) -> np.ndarray:
    """`x` with its last row repeated up to `rows`, and axis 1 filled with `value` up to `columns`."""
    if columns is not None and x.shape[1] < columns:
        filler = np.full((x.shape[0], columns - x.shape[1], *x.shape[2:]), value, x.dtype)
        x = np.concatenate([x, filler], axis=1)
    if x.shape[0] < rows:
        x = np.concatenate([x, np.repeat(x[-1:], rows - x.shape[0], axis=0)], axis=0)
    return x


class Generator:
    """Generates with one model on one mesh; every result is a function of prompt, seed and settings alone.

    Args:
        model: a vision-language model, its weights on the devices of `mesh`. They are rearranged once; after
            an update of the weights call `load` again (nothing is compiled anew).
        batch_size: rows of the compiled program, rounded up to what the mesh divides; smaller batches are
            padded.
        prefix_bucket: prompt lengths are padded to a multiple of this.
        tokenizer_size: ids from here on are rows that only pad the vocabulary, and are never drawn; None: all
            ids are the tokenizer's.

    Raises:
        UserError: nothing but the end token can be drawn, and it must not come first.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        eos_token_id: int,
        pad_token_id: int,
        mesh: Mesh,
        sampling: SamplingConfig,
        batch_size: int = 16,
        prefix_bucket: int = 32,
        tokenizer_size: int | None = None,
    ):
        self.mesh, self.sampling, self.prefix_bucket = mesh, sampling, prefix_bucket
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.batch_size = bucket(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
        config, vocab = model.config, model.config.text.vocab_size
        padding = () if tokenizer_size is None else range(tokenizer_size, vocab)
        never = {config.image_token_id, pad_token_id, *padding, *sampling.suppress_token_ids}
        self.never, self.bias = draw.sampling_bias(
            vocab, sorted(never), eos_token_id, sampling.stop_bias, sampling.stop_token_ids
        )
        settings = sampling.by_name()
        if settings["min_new_tokens"] and self.never.sum() >= vocab - 1:
            raise UserError("every token but the end token is suppressed", where="generate.suppress_tokens")
        # One number a candidate becomes one number a row; what all candidates share stays a number.
        rows = lambda x: np.tile(np.asarray(x), self.batch_size)[:, None]  # noqa: E731
        self.settings = draw.Settings(**{name: rows(x) if isinstance(x, list) else x for name, x in settings.items()})
        self.model_config = config
        self.compilations = 0
        self.program = jax.jit(self._program, static_argnums=0)
        self.load(model)

    def load(self, model: VisionLanguageModel) -> None:
        """Takes the model's present weights (and adapters) for all later batches."""
        self.graph, self.state = nnx.split(model)

        @partial(jax.jit, static_argnums=0)
        def fused(graph: Any, state: Any) -> tuple[FusedLayer, ...]:
            return fuse(nnx.merge(graph, state))

        with use_mesh(self.mesh):
            self.layers = fused(*nnx.split(model.decoder))

    def __call__(self, batch: PromptBatch) -> Generated:
        """Candidates for every prompt of the batch.

        Raises:
            UserError: a prompt's logits are not finite (broken weights or an overflow); names the prompt.
        """
        return self.collect(self.submit(batch))

    def arguments(
        self, batch: PromptBatch, wanted: Bool[np.ndarray, "b k"] | None = None, attempt: int = 0
    ) -> tuple[Any, ...]:
        """What the compiled program is called with, after the static graph; for `program.lower` too."""
        count, length = batch.token_ids.shape
        if count > self.batch_size or not count:
            raise ValueError(f"{count} prompts in a batch of 1 to {self.batch_size}")
        rows, columns = self.batch_size, bucket(length, self.prefix_bucket)
        candidates = self.sampling.num_candidates
        keys = draw.candidate_keys(self.sampling.seed, batch.ids, candidates, attempt)
        active = np.zeros((rows, candidates), bool)
        active[:count] = True if wanted is None else wanted
        arrays = {
            "token_ids": pad_rows(batch.token_ids.astype(np.int32), rows, columns, self.pad_token_id),
            "mask": pad_rows(batch.mask.astype(bool), rows, columns, False),
            "keys": pad_rows(keys, rows),
            "active": active,
        }
        if batch.pixel_values is not None:
            arrays["pixel_values"] = pad_rows(batch.pixel_values, rows)
        constants = replicate({"never": self.never, "bias": self.bias}, self.mesh)
        return self.state, self.layers, shard_batch(arrays, self.mesh), constants

    def submit(self, batch: PromptBatch, wanted: Bool[np.ndarray, "b k"] | None = None, attempt: int = 0) -> Pending:
        """Starts a batch and returns at once, so that the host can prepare the next one.

        Args:
            wanted: candidates to draw; the others come back empty (length 0). None: all.
            attempt: which of a candidate's random streams to draw from; 0 is the first.

        Raises:
            UserError: the program does not fit into the device's memory; names the number to lower.
        """
        prefix = bucket(batch.token_ids.shape[1], self.prefix_bucket)
        with use_mesh(self.mesh), self._explained(prefix):
            result = self.program(self.graph, *self.arguments(batch, wanted, attempt))
        return Pending(list(batch.ids), result, prefix)

    def collect(self, pending: Pending) -> Generated:
        """Waits for a batch; raises as `__call__` and `submit`."""
        count = len(pending.ids)
        with self._explained(pending.prefix):
            host = {name: to_host(x) for name, x in pending.result._asdict().items()}
        slot_steps = int(host.pop("steps")) * self.batch_size * self.sampling.num_candidates
        host = {name: x[:count] for name, x in host.items()}
        broken = host.pop("broken")
        if broken.any():
            first = pending.ids[int(np.argmax(broken))]
            raise UserError(
                "the model's logits are not finite",
                where=f"prompt {first}",
                remedy="check the checkpoint, or compute in float32 (model.dtype=float32)",
            )
        return Generated(pending.ids, **host, slot_steps=slot_steps)

    def _explained(self, prefix: int) -> AbstractContextManager[None]:
        """Errors of memory inside become errors that say which number to lower."""
        text = self.model_config.text
        shape = CacheShape.on_mesh(
            self.mesh.shape,
            text.num_kv_heads,
            rows=self.batch_size,
            views=2 if self.sampling.contrast_alpha > 0 else 1,
            prefix=prefix,
            candidates=self.sampling.num_candidates,
            new_tokens=self.sampling.max_new_tokens,
        )
        return explain_exhaustion(text, shape, jnp.dtype(self.layers[0].input_norm.dtype).itemsize)

    def _program(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        layers: tuple[FusedLayer, ...],
        arrays: dict[str, jax.Array],
        constants: dict[str, jax.Array],
    ) -> DeviceResult:
        self.compilations += 1
        model = nnx.merge(graph, state)
        s, config, decoder = self.sampling, model.config.text, model.decoder
        token_ids, mask = arrays["token_ids"], arrays["mask"]
        features = encode_images(model, arrays.get("pixel_values"))
        # Contrastive decoding runs every prompt twice, in neighbouring rows: with its image and with a blank.
        views = 1
        if s.contrast_alpha > 0 and features is not None:
            views = 2
            blank = model.image_features(jnp.zeros_like(arrays["pixel_values"][0, :1]))
            features = jnp.stack([features, jnp.broadcast_to(blank, features.shape)], axis=1)
            features = features.reshape(-1, *features.shape[2:])
        rows, prompts, k, t = (
            token_ids.shape[0],
            token_ids.shape[0] * views,
            s.num_candidates,
            s.max_new_tokens,
        )
        mask = jnp.repeat(mask, views, axis=0)
        x = model.embed_prompts(jnp.repeat(token_ids, views, axis=0), features)
        hidden, prefix = prefill(config, layers, x, mask)
        lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
        keys = arrays["keys"].reshape(rows * k, 2)

        def advance(hidden: Float[Array, "p c e"], state: _State) -> _State:
            """Draws token number `step` from the states that predict it ([prompts, 1 or K, E])."""
            logits = constrain(decoder.logits(decoder.norm(hidden)), "batch", None, None)
            logits = jnp.broadcast_to(logits, (prompts, k, logits.shape[-1]))
            logits = logits.reshape(rows, views, k, -1)
            raw = logits[:, 0].reshape(rows * k, -1)
            shaped = raw
            if views == 2:
                shaped = draw.contrast(raw, logits[:, 1].reshape(raw.shape), s.contrast_alpha, s.contrast_beta)
            shaped = jnp.where(constants["never"], -jnp.inf, shaped + constants["bias"])
            held = None if state.seen is None else state.seen.reshape(rows * k, -1)
            shaped = draw.process(shaped, self.settings, step=state.step, eos_token_id=self.eos_token_id, seen=held)
            token = draw.choose(draw.step_keys(keys, state.step), shaped, self.settings)
            normaliser = jax.nn.logsumexp(raw, axis=-1)
            log_prob = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0] - normaliser
            bad = ~jnp.isfinite(normaliser).reshape(rows, k)
            token, log_prob = token.reshape(rows, k).astype(jnp.int32), log_prob.reshape(rows, k)
            live = ~state.stopped
            token = jnp.where(live, token, self.pad_token_id)
            ended = live & (token == self.eos_token_id)
            seen = state.seen
            if seen is not None:
                seen |= token[..., None] == jnp.arange(seen.shape[-1])
            put = lambda into, new: jax.lax.dynamic_update_slice_in_dim(into, new[..., None], state.step, 2)  # noqa: E731
            return state._replace(
                step=state.step + 1,
                token=token,
                token_ids=put(state.token_ids, token),
                log_probs=put(state.log_probs, jnp.where(live, log_prob, 0.0)),
                lengths=state.lengths + live,
                finished=state.finished | ended,
                stopped=state.stopped | ended | bad,
                broken=state.broken | jnp.any(bad & live, axis=1),
                seen=seen,
            )

        shape = (rows, k, t)
        full = lambda shape, value, dtype: constrain(  # noqa: E731
            jnp.full(shape, value, dtype), "batch", *(None,) * (len(shape) - 1)
        )
        now = _State(
            step=jnp.int32(0),
            token=full(shape[:2], self.pad_token_id, jnp.int32),
            token_ids=full(shape, self.pad_token_id, jnp.int32),
            log_probs=full(shape, 0.0, jnp.float32),
            lengths=full(shape[:2], 0, jnp.int32),
            finished=full(shape[:2], False, bool),
            stopped=~arrays["active"],
            broken=full(shape[:1], False, bool),
            seen=self._seen_at_first(token_ids, arrays["mask"]),
            chunk=[],
        )
        now = advance(hidden[:, None], now)
        filled: list[list[KV]] = []
        start = 0
        for slots in chunk_sizes(t):

            def more(state: _State, stop: int = start + slots) -> jax.Array:
                # Slot step − 1 takes the latest token; the stage ends when its slots are full.
                return (state.step <= stop) & ~jnp.all(state.stopped)

            def body(state: _State, start: int = start, filled: tuple[list[KV], ...] = tuple(filled)) -> _State:
                fed = decoder.embed_tokens(jnp.repeat(state.token, views, axis=0))
                positions = (lengths + state.step - 1)[:, None]
                slot = state.step - 1 - start
                hidden, chunk = decode_step(
                    config,
                    layers,
                    fed,
                    positions,
                    prefix=prefix,
                    prefix_mask=mask,
                    full=list(filled),
                    chunk=state.chunk,
                    slot=slot,
                )
                return advance(hidden, state._replace(chunk=chunk))

            chunk = empty_chunks(config, prompts, k, slots, x.dtype)
            now = jax.lax.while_loop(more, body, now._replace(chunk=chunk))
            filled.append(now.chunk)
            start += slots
        return DeviceResult(now.token_ids, now.log_probs, now.lengths, now.finished, now.broken, now.step)

    def _seen_at_first(self, token_ids: Int[Array, "b p"], mask: Bool[Array, "b p"]) -> Bool[Array, "b k v"] | None:
        """What the repetition penalty counts before the first token; None where it is off."""
        penalty = self.settings.repetition_penalty
        if isinstance(penalty, int | float) and penalty == 1.0:
            return None
        rows, vocab = token_ids.shape[0], self.never.shape[0]
        seen = jnp.zeros((rows, vocab), bool)
        if self.sampling.repetition_penalty_prompt:
            seen = seen.at[jnp.arange(rows)[:, None], token_ids].max(mask)
        seen = jnp.broadcast_to(seen[:, None], (rows, self.sampling.num_candidates, vocab))
        return constrain(seen, "batch", None, "vocab")


def right_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as one right-padded array [B, P] int32 and its mask."""
    width = max((len(row) for row in rows), default=0)
    token_ids = np.full((len(rows), width), value, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return token_ids, mask
