"""Teacher-forced scoring: what a model thinks of given answers, with the prompt encoded once for all of them.

Shape suffixes: B prompts, P prefix tokens, K branches (answers) of a prompt, T tokens of a branch, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int

from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.image_buckets import ImageBuckets
from m3po_jax.data.model_images import layout_of
from m3po_jax.data.padding import answer_bucket, bucket, pad_rows
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import own_rows
from m3po_jax.hosts.sharding import replicate, shard_batch, to_host, use_mesh
from m3po_jax.models import lora
from m3po_jax.models.forward import (
    EncodedImages,
    VisionLanguageModel,
    blank_images,
    branch_hidden,
    branch_log_probs,
    encode_images,
)


def branch_inputs(
    model: VisionLanguageModel, arrays: dict[str, Any], blank_tokens: int
) -> tuple[jax.Array, jax.Array, EncodedImages | None, jax.Array, jax.Array]:
    """What the functions of `models.forward` take after the model; see `Scorer._filled`."""
    ids, images = arrays["prefix_ids"], arrays.get("images")
    if blank_tokens:
        encoded: EncodedImages | None = blank_images(model, images or {}, ids.shape[0], blank_tokens)
    else:
        encoded = encode_images(model, images)
    return ids, arrays["prefix_mask"], encoded, arrays["branch_ids"], arrays["branch_mask"]


# Programs of this module, not of a scorer: all scorers of one architecture share them, whatever their weights, so
# that another round, arm or seed compiles nothing. `blank_tokens`: the most image tokens of a row, where blank images
# stand in the place of its own; else 0.


@partial(jax.jit, static_argnums=(0, 3))
def log_probs_program(
    graph: nnx.GraphDef, state: nnx.State, arrays: dict[str, Any], blank_tokens: int
) -> Float[jax.Array, "b k t"]:
    model = nnx.merge(graph, state)
    return branch_log_probs(model, *branch_inputs(model, arrays, blank_tokens))


@partial(jax.jit, static_argnums=(0, 3))
def choices_program(
    graph: nnx.GraphDef, state: nnx.State, arrays: dict[str, Any], blank_tokens: int
) -> Float[jax.Array, "b k c"]:
    model = nnx.merge(graph, state)
    inputs = branch_inputs(model, arrays, blank_tokens)
    hidden = branch_hidden(model, *inputs)
    after = jnp.sum(inputs[-1], axis=2, dtype=jnp.int32)[:, :, None, None]
    last = jnp.take_along_axis(hidden, after, axis=2)[:, :, 0]
    logits = model.decoder.logits(last)
    probabilities = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return jnp.take(probabilities, arrays["choices"], axis=-1)


class Scorer:
    """Scores answers under one model on one mesh.

    Shapes are padded to buckets, so that few programs are compiled: rows to `batch_size` (longer inputs are
    cut into several batches), prompts to multiples of `prefix_bucket`, answers to `answer_bucket`, more than four
    of them to a multiple of four.

    Attributes:
        own_rows: which rows of a full batch lie on this process's devices; the images of others are not used.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        mesh: Mesh,
        *,
        batch_size: int = 16,
        prefix_bucket: int = 32,
    ):
        self.mesh, self.prefix_bucket = mesh, prefix_bucket
        self.batch_size = bucket(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
        self.own_rows = own_rows(self.batch_size, mesh)
        self.load(model)

    def load(self, model: VisionLanguageModel) -> None:
        """Takes the model's present weights for all later calls."""
        self.graph, self.state = nnx.split(model)
        reference: Any = nnx.merge(self.graph, self.state)
        lora.set_scale(reference, 0.0)
        self.reference_graph = nnx.split(reference)[0]
        self.model_config = model.config

    def log_probs(
        self,
        batch: PromptBatch,
        branch_ids: Int[np.ndarray, "b k t"],
        branch_mask: Bool[np.ndarray, "b k t"],
        *,
        blank_images: bool = False,
        reference: bool = False,
    ) -> Float32[np.ndarray, "b k t"]:
        """log π(token | image, prompt, earlier tokens of the answer) in nats, temperature 1; 0 where masked.

        Args:
            branch_ids: answers, right-padded, the end token included if it is to count.
            blank_images: every image is replaced by the mean colour, which leaves the language prior. The pixels of
                the batch's own images are not read, and need not be there.
            reference: the model without its adapters.

        Raises:
            UserError: a score is not finite; names the prompt.
        """
        _, k, t = branch_ids.shape
        arrays = self._branches(branch_ids, branch_mask)
        return self._run(log_probs_program, batch, arrays, {}, blank_images, reference)[:, :k, :t]

    def choice_probabilities(
        self,
        batch: PromptBatch,
        token_ids: Sequence[int],
        branch_ids: Int[np.ndarray, "b k t"] | None = None,
        branch_mask: Bool[np.ndarray, "b k t"] | None = None,
        *,
        blank_images: bool = False,
        reference: bool = False,
    ) -> Float32[np.ndarray, "b k c"]:
        """Probability of each of `token_ids` as the next token after the prompt and, if given, each branch.

        The probabilities are those of the full vocabulary (they need not sum to 1): add the spellings of one
        answer. Branches serve several questions about one image, each right-padded; without them k is 1.
        """
        rows = len(batch.ids)
        if branch_ids is None or branch_mask is None:
            branch_ids, branch_mask = np.zeros((rows, 1, 0), np.int32), np.zeros((rows, 1, 0), bool)
        _, k, t = branch_ids.shape
        # One more slot than the longest branch: the state that predicts the token after it.
        width = answer_bucket(t + 1) if t else 1
        arrays = {
            "branch_ids": self._pad_branches(branch_ids.astype(np.int32), width),
            "branch_mask": self._pad_branches(branch_mask.astype(bool), width),
        }
        choices = {"choices": np.asarray(token_ids, np.int32)}
        return self._run(choices_program, batch, arrays, choices, blank_images, reference)[:, :k]

    def _branches(self, branch_ids: np.ndarray, branch_mask: np.ndarray) -> dict[str, np.ndarray]:
        width = answer_bucket(branch_ids.shape[2])
        return {
            "branch_ids": self._pad_branches(branch_ids.astype(np.int32), width),
            "branch_mask": self._pad_branches(branch_mask.astype(bool), width),
        }

    @staticmethod
    def _pad_branches(x: np.ndarray, width: int) -> np.ndarray:
        _, k, t = x.shape
        count = k if k <= 4 else bucket(k, 4)
        return np.pad(x, ((0, 0), (0, count - k), (0, width - t)))

    def _run(
        self,
        program: Any,
        batch: PromptBatch,
        branches: dict[str, np.ndarray],
        constants: dict[str, np.ndarray],
        blank_images: bool = False,
        reference: bool = False,
    ) -> np.ndarray:
        graph = self.reference_graph if reference else self.graph
        blank_tokens = self._image_tokens(batch) if blank_images else 0
        done = []
        for start in range(0, len(batch.ids), self.batch_size):
            part = slice(start, min(start + self.batch_size, len(batch.ids)))
            count = part.stop - part.start
            with use_mesh(self.mesh):
                inputs = self._filled(batch, branches, constants, part, pixels=not blank_images)
                result = to_host(program(graph, self.state, inputs, blank_tokens))[:count]
            broken = ~np.isfinite(result).reshape(count, -1).all(axis=1)
            if broken.any():
                raise UserError(
                    "the model's scores are not finite",
                    where=f"prompt {batch.ids[start + int(np.argmax(broken))]}",
                    remedy="check the checkpoint, or compute in float32 (model.dtype=float32)",
                )
            done.append(result)
        return np.concatenate(done)

    def _filled(
        self,
        batch: PromptBatch,
        branches: dict[str, np.ndarray],
        constants: dict[str, np.ndarray],
        part: slice,
        *,
        pixels: bool = True,
    ) -> dict[str, Any]:
        """The padded rows of `part` on the devices; of their images the layout alone without `pixels`."""
        rows, columns = self.batch_size, bucket(batch.token_ids.shape[1], self.prefix_bucket)
        images = batch.images if pixels else layout_of(batch.images)
        given: dict[str, Any] = {**branches, **({"images": images} if images else {})}
        arrays = {
            "prefix_ids": pad_rows(batch.token_ids[part].astype(np.int32), rows, columns),
            "prefix_mask": pad_rows(batch.mask[part].astype(bool), rows, columns, False),
            **jax.tree.map(lambda x: pad_rows(x[part], rows), given),
        }
        return {**shard_batch(arrays, self.mesh), **replicate(constants, self.mesh)}

    def log_probs_program(self, batch: PromptBatch, answers: int, tokens: int) -> tuple[Any, tuple[Any, ...]]:
        """What `log_probs` runs on the first rows of `batch`, for those who compile or measure it.

        Returns:
            The jitted function and its arguments; nothing is computed.
        """
        ids = np.zeros((len(batch.ids), answers, tokens), np.int32)
        branches = self._branches(ids, np.ones(ids.shape, bool))
        with use_mesh(self.mesh):
            inputs = self._filled(batch, branches, {}, slice(0, self.batch_size))
        return log_probs_program, (self.graph, self.state, inputs, 0)

    def choices_program(self, batch: PromptBatch, questions: int, tokens: int) -> tuple[Any, tuple[Any, ...]]:
        """What `choice_probabilities` runs on the first rows of `batch`, for those who compile or measure it.

        Returns:
            The jitted function and its arguments; nothing is computed.
        """
        shape = (len(batch.ids), questions, answer_bucket(tokens + 1))
        branches = {"branch_ids": np.zeros(shape, np.int32), "branch_mask": np.ones(shape, bool)}
        with use_mesh(self.mesh):
            choices = {"choices": np.zeros(2, np.int32)}
            inputs = self._filled(batch, branches, choices, slice(0, self.batch_size))
        return choices_program, (self.graph, self.state, inputs, 0)

    def _image_tokens(self, batch: PromptBatch) -> int:
        """The most image tokens that a prompt has, or a little more: every number is a program of its own."""
        tokens = (batch.token_ids == self.model_config.image_token_id) & batch.mask.astype(bool)
        return ImageBuckets().holding(int(tokens.sum(axis=1).max(initial=0)))
