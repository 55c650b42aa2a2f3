"""The generation engine: K candidates of every prompt, with the raw log-probability of every token.

A prompt's image is encoded once and its prefix prefilled once; its candidates decode against that one copy. Two
programs do the work, those of `programs.py`. `prefill` puts a few prompts into free slots; `decode` is one loop over
tokens in which every free lane takes the next waiting candidate, without a trip to the host. It returns when all is
done, when the host should bring more prompts, or when the answers' cache is full. `stream.py` is the host's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int32

from m3po_jax.data.collation import PromptBatch, PromptRow, rows_of
from m3po_jax.data.padding import bucket, pad_ragged
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import replicate, use_mesh
from m3po_jax.inference import sampling as draw
from m3po_jax.inference.fused import FusedLayer
from m3po_jax.inference.memory import CacheShape, explain_exhaustion
from m3po_jax.inference.programs import Weights, fuse_layers, programs_for
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.inference.state import Sizes
from m3po_jax.inference.stream import Stream, StreamProgram
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.forward import VisionLanguageModel

PREFILL_TOKENS = 512  # prompts are prefilled one at a time from this length on; it fills a matrix unit


@dataclasses.dataclass
class Generated:
    """The answers to a batch; slots after an answer's end hold the padding id and log-probability 0.

    Attributes:
        log_probs: log π(token) in nats at temperature 1 without truncation, the end token included.
        lengths: tokens, the end token included.
        finished: true where the end token was drawn; false where `max_new_tokens` cut the answer.
        slot_steps: tokens that the device could have drawn in the time: steps × lanes. The sum of `lengths`
            over this is the occupancy.
    """

    ids: list[str]
    token_ids: Int32[np.ndarray, "b k t"]
    log_probs: Float32[np.ndarray, "b k t"]
    lengths: Int32[np.ndarray, "b k"]
    finished: Bool[np.ndarray, "b k"]
    slot_steps: int


class Generator:
    """Generates with one model on one mesh; every result is a function of prompt, seed and settings alone.

    Args:
        model: a vision-language model, its weights on the devices of `mesh`. Its decoder's layers are rearranged
            into a copy; after an update of the weights call `load` again (nothing is compiled anew).
        batch_size: prompts whose candidates are decoded at once, rounded up to what the mesh divides. When there
            are more prompts, further ones are held ready, so that no lane waits for another's long answer.
        prefix_bucket: prompt lengths are padded to a multiple of this.
        eos_token_id: the end token, or several: any of them ends an answer.
        tokenizer_size: ids from here on are rows that only pad the vocabulary, and are never drawn; None: all
            ids are the tokenizer's.

    Attributes:
        slot_steps: tokens that the device could have drawn since the generator was made: steps × lanes.

    Raises:
        UserError: nothing but the end token can be drawn, and it must not come first.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        mesh: Mesh,
        sampling: SamplingConfig,
        batch_size: int = 16,
        prefix_bucket: int = 32,
        tokenizer_size: int | None = None,
    ):
        self.mesh, self.sampling, self.prefix_bucket = mesh, sampling, prefix_bucket
        self.eos_token_ids = draw.as_ids(eos_token_id)
        self.pad_token_id = pad_token_id
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = bucket(batch_size, self.shards)
        config, vocab = model.config, model.config.text.vocab_size
        padding = () if tokenizer_size is None else range(tokenizer_size, vocab)
        never = {config.image_token_id, pad_token_id, *padding, *sampling.suppress_token_ids}
        self.never, self.bias = draw.sampling_bias(
            vocab, sorted(never), self.eos_token_ids, sampling.stop_bias, sampling.stop_token_ids
        )
        self.settings = sampling.by_name()
        if self.settings["min_new_tokens"] and self.never.sum() >= vocab - len(set(self.eos_token_ids)):
            raise UserError("every token but the end token is suppressed", where="generate.suppress_tokens")
        penalty = self.settings["repetition_penalty"]
        self.counts_seen = isinstance(penalty, list) or penalty != 1.0
        self.model_config = config
        self.slot_steps = 0
        per_candidate = {name: np.asarray(x) for name, x in self.settings.items() if isinstance(x, list)}
        self.constants = replicate({"never": self.never, "bias": self.bias, **per_candidate}, mesh)
        programs = programs_for(
            mesh,
            config.text,
            model.decoder.dtype,
            sampling,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=pad_token_id,
        )
        self.layout, self.prefill, self.decode = programs.layout, programs.prefill, programs.decode
        self._programs, self._compiled_before = programs, programs.compilations
        self.load(model)

    @property
    def compilations(self) -> int:
        """Shapes that were compiled since the generator was made."""
        return self._programs.compilations - self._compiled_before

    def load(self, model: VisionLanguageModel) -> None:
        """Takes the model's present weights (and adapters) for all later prompts.

        Beside `model` there is a copy of its decoder's layers, and nothing else: once the caller drops the model,
        no weight exists twice.
        """
        self.weights: Any = None  # frees the layers of the weights before
        shell: Any = nnx.merge(*nnx.split(model))
        shell.decoder.layers = None
        self.graph, state = nnx.split(shell)

        with use_mesh(self.mesh):
            self.weights = Weights(state, self.fused(model.decoder))

    def fused(self, decoder: Decoder) -> tuple[FusedLayer, ...]:
        return fuse_layers(*nnx.split(decoder))

    def __call__(
        self, batch: PromptBatch, wanted: Bool[np.ndarray, "b k"] | None = None, attempt: int = 0
    ) -> Generated:
        """Candidates for every prompt of the batch, in its order.

        Args:
            wanted: candidates to draw; the others come back empty (length 0). None: all.
            attempt: which of a candidate's random streams to draw from; 0 is the first.

        Raises:
            UserError: a prompt's logits are not finite (broken weights or an overflow); names the prompt. Or the
                programs do not fit into the device's memory; names the number to lower.
        """
        rows, before = rows_of(batch), self.slot_steps
        if wanted is not None:
            chosen = [tuple(np.flatnonzero(of_row).tolist()) for of_row in wanted]
            rows = [dataclasses.replace(row, wanted=of_row) for row, of_row in zip(rows, chosen, strict=True)]
        rows = [dataclasses.replace(row, attempt=attempt) for row in rows]
        answered = sorted(self.stream(rows, len(rows)), key=lambda row: row.place)
        shape = (len(rows), self.sampling.num_candidates, self.sampling.max_new_tokens)
        token_ids, mask = pad_ragged([row.answers for row in answered], shape, self.pad_token_id)
        log_probs = np.zeros(shape, np.float32)
        log_probs[mask] = np.concatenate([of_one for row in answered for of_one in row.log_probs])
        finished = np.array([[self.ended(answer) for answer in row.answers] for row in answered])
        lengths = mask.sum(axis=-1, dtype=np.int32)
        return Generated(list(batch.ids), token_ids, log_probs, lengths, finished, self.slot_steps - before)

    def ended(self, answer: Int32[np.ndarray, " t"]) -> bool:
        """Whether the end token was drawn; else `max_new_tokens` cut the answer."""
        return len(answer) > 0 and int(answer[-1]) in self.eos_token_ids

    def stream(self, prompts: Iterable[PromptRow | None], count: int | None = None) -> Iterator[PromptRow]:
        """The prompts with their answers as they get ready, in no fixed order; they are drawn when there is room.

        Args:
            prompts: None in it says that there is nothing now: it is asked again after the next answer.
            count: how many prompts will come, where that is known: a few need less memory.

        Raises:
            UserError: as `__call__`; what is complete is yielded before. An error that `prompts` raises comes after
                the answers to all prompts before it.
        """
        return iter(Stream(self, prompts, count))

    def programs(self, batch: PromptBatch) -> list[StreamProgram]:
        """The programs that the batch needs if no answer ends before `max_new_tokens`; nothing is computed."""
        with use_mesh(self.mesh):
            return Stream(self, rows_of(batch), len(batch.ids)).programs()

    def sizes(self, count: int | None, prefix: int) -> Sizes:
        """The state that serves `count` prompts (None: many) of `prefix` tokens."""
        s, batch = self.sampling, self.batch_size // self.shards
        views = 2 if s.contrast_alpha > 0 else 1
        slots = batch
        if count is None or count > self.batch_size:
            # A prompt's slot is taken until its longest answer ends, a lane only until its own does. Simulated with
            # answers of 20 to 200 tokens, twice as many prompts as K lanes can decode keep 88 % to 99 % busy.
            slots += self.prefill_rows(prefix) + (batch if s.num_candidates > 1 else 0)
        return Sizes(
            self.shards, slots, batch * s.num_candidates, s.num_candidates, views, s.max_new_tokens, self.counts_seen
        )

    def prefill_rows(self, length: int) -> int:
        """Prompts of `length` tokens that a shard prefills at once."""
        return max(min(self.batch_size // self.shards, PREFILL_TOKENS // max(length, self.prefix_bucket)), 1)

    def explained(self, sizes: Sizes, prefix: int) -> Any:
        """Errors of memory inside become errors that say which number to lower."""
        text = self.model_config.text
        shape = CacheShape.on_mesh(
            self.mesh.shape,
            text.num_kv_heads,
            rows=self.batch_size,
            held=sizes.slots * sizes.shards,
            views=sizes.views,
            prefix=prefix,
            candidates=sizes.candidates,
            new_tokens=sizes.tokens,
        )
        return explain_exhaustion(text, shape, jnp.dtype(self.layout.dtype).itemsize)
