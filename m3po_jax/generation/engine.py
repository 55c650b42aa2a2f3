"""The batched generation engine: K candidates of every prompt, with the raw log-probability of every token.

A prompt's image is encoded once and its prefix prefilled once; its candidates decode against that one copy.
All shapes are static: prompts are padded to a bucketed length and batches to a fixed number of rows, so that
one compiled program serves every batch of a kind.

Shape suffixes: B prompts, P prefix tokens, K candidates, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from m3po_jax.models.forward import VisionLanguageModel, encode_images
from m3po_jax.sharding import constrain, replicate, shard_batch, to_host, use_mesh

FIRST_CHUNK = 64  # cache slots of the first stage of decoding; every later stage doubles the cache


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that candidates are drawn from. Recorded log-probabilities do not depend on it.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        stop_bias: added to the end token's logit before a draw: positive makes shorter answers.
        stop_token_ids: tokens that get the stop bias instead, where an answer's end is announced before it comes.
        contrast_alpha: strength of visual contrastive decoding against the blanked image; 0 is off.
        contrast_beta: its plausibility cut.
        suppress_token_ids: never drawn, in addition to image and padding tokens.
    """

    num_candidates: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_bias: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    contrast_alpha: float = 0.0
    contrast_beta: float = 0.1
    suppress_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rules = {
            "num_candidates": (self.num_candidates >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "contrast_alpha": (self.contrast_alpha >= 0, "0 (off) or more"),
            "contrast_beta": (0 < self.contrast_beta <= 1, "in (0, 1]"),
        }
        for name, (holds, meaning) in rules.items():
            if not holds:
                raise UserError(f"{getattr(self, name)} is not {meaning}", where=f"generate.{name}")


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
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b k t"]
    log_probs: Float32[np.ndarray, "b k t"]
    lengths: Int32[np.ndarray, "b k"]
    finished: Bool[np.ndarray, "b k"]

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


class _State(NamedTuple):
    """The decode loop's carry. `step` tokens of every candidate have been drawn."""

    step: jax.Array
    token: jax.Array  # [B, K], the latest draw
    token_ids: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    finished: jax.Array
    stopped: jax.Array  # finished, broken or padding: drawn no further
    broken: jax.Array
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
    ):
        self.mesh, self.sampling, self.prefix_bucket = mesh, sampling, prefix_bucket
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.batch_size = bucket(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
        config = model.config
        never = {config.image_token_id, pad_token_id, *sampling.suppress_token_ids}
        self.never, self.bias = draw.sampling_bias(
            config.text.vocab_size, sorted(never), eos_token_id, sampling.stop_bias, sampling.stop_token_ids
        )
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

    def arguments(self, batch: PromptBatch) -> tuple[Any, ...]:
        """What the compiled program is called with, after the static graph; for `program.lower` too."""
        count, length = batch.token_ids.shape
        if count > self.batch_size or not count:
            raise ValueError(f"{count} prompts in a batch of 1 to {self.batch_size}")
        rows, columns = self.batch_size, bucket(length, self.prefix_bucket)
        keys = draw.candidate_keys(self.sampling.seed, batch.ids, self.sampling.num_candidates)
        arrays = {
            "token_ids": pad_rows(batch.token_ids.astype(np.int32), rows, columns, self.pad_token_id),
            "mask": pad_rows(batch.mask.astype(bool), rows, columns, False),
            "keys": pad_rows(keys, rows),
            "active": np.arange(rows) < count,
        }
        if batch.pixel_values is not None:
            arrays["pixel_values"] = pad_rows(batch.pixel_values, rows)
        constants = replicate({"never": self.never, "bias": self.bias}, self.mesh)
        return self.state, self.layers, shard_batch(arrays, self.mesh), constants

    def submit(self, batch: PromptBatch) -> Pending:
        """Starts a batch and returns at once, so that the host can prepare the next one."""
        with use_mesh(self.mesh):
            result = self.program(self.graph, *self.arguments(batch))
        return Pending(list(batch.ids), result)

    def collect(self, pending: Pending) -> Generated:
        """Waits for a batch; raises as `__call__`."""
        count = len(pending.ids)
        host = {name: to_host(x) for name, x in pending.result._asdict().items() if name != "steps"}
        host = {name: x[:count] for name, x in host.items()}
        broken = host.pop("broken")
        if broken.any():
            first = pending.ids[int(np.argmax(broken))]
            raise UserError(
                "the model's logits are not finite",
                where=f"prompt {first}",
                remedy="check the checkpoint, or compute in float32 (model.dtype=float32)",
            )
        return Generated(pending.ids, **host)

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
            if s.temperature == 0.0:
                token = jnp.argmax(shaped, axis=-1)
            else:
                shaped = draw.warp(shaped, s.temperature, s.top_k, s.top_p)
                token = draw.sample(draw.step_keys(keys, state.step), shaped)
            normaliser = jax.nn.logsumexp(raw, axis=-1)
            log_prob = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0] - normaliser
            bad = ~jnp.isfinite(normaliser).reshape(rows, k)
            token, log_prob = token.reshape(rows, k).astype(jnp.int32), log_prob.reshape(rows, k)
            live = ~state.stopped
            token = jnp.where(live, token, self.pad_token_id)
            ended = live & (token == self.eos_token_id)
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
            stopped=jnp.broadcast_to(~arrays["active"][:, None], shape[:2]),
            broken=full(shape[:1], False, bool),
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


def right_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as one right-padded array [B, P] int32 and its mask."""
    width = max((len(row) for row in rows), default=0)
    token_ids = np.full((len(rows), width), value, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return token_ids, mask
