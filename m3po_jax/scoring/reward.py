"""A trained reward model as a scorer of answers, and as an alignment backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int

from m3po_jax.data.collation import PromptBatch, collate_tree
from m3po_jax.data.row_inputs import prompt_row
from m3po_jax.data.schema import Prompt
from m3po_jax.inference.scorer import Scorer, branch_inputs
from m3po_jax.models.forward import branch_hidden
from m3po_jax.models.heads import answer_rewards
from m3po_jax.models.processor import Processor
from m3po_jax.scoring.alignment import Backend, Scores
from m3po_jax.scoring.shown_images import shared_images


@partial(jax.jit, static_argnums=(0, 3))
def rewards_program(
    graph: nnx.GraphDef, state: nnx.State, arrays: dict[str, Any], blank_tokens: int
) -> Float[jax.Array, "b k"]:
    model = nnx.merge(graph, state)
    return answer_rewards(model, *branch_inputs(model, arrays, blank_tokens))


@partial(jax.jit, static_argnums=(0, 3))
def values_program(
    graph: nnx.GraphDef, state: nnx.State, arrays: dict[str, Any], blank_tokens: int
) -> Float[jax.Array, "b k t"]:
    model = nnx.merge(graph, state)
    values = model.scalar_head(branch_hidden(model, *branch_inputs(model, arrays, blank_tokens)))
    return jnp.where(arrays["branch_mask"], values, 0.0)


_NO_ANSWER = np.zeros(0, np.int32)  # fills up pools


class HeadScorer(Scorer):
    """A `Scorer` of a model with a scalar head: what the head says of answers or of every state in them."""

    def rewards(
        self, batch: PromptBatch, branch_ids: Int[np.ndarray, "b k t"], branch_mask: Bool[np.ndarray, "b k t"]
    ) -> Float32[np.ndarray, "b k"]:
        """The reward of each answer, read after its last token; end tokens belong to answers that have ended.

        Raises:
            UserError: a reward is not finite; names the prompt.
        """
        arrays = self._branches(branch_ids, branch_mask)
        rewards = self._run(rewards_program, batch, arrays, {})
        return rewards[:, : branch_ids.shape[1]]

    def values(
        self, batch: PromptBatch, branch_ids: Int[np.ndarray, "b k t"], branch_mask: Bool[np.ndarray, "b k t"]
    ) -> Float32[np.ndarray, "b k t"]:
        """The value of the state before each token; 0 where masked."""
        arrays = self._branches(branch_ids, branch_mask)
        values = self._run(values_program, batch, arrays, {})
        return values[:, : branch_ids.shape[1], : branch_ids.shape[2]]


class RewardBackend(Backend):
    """A reward model as MAS: σ(reward), so that 0.5 is the reward that centring holds in the middle.

    Args:
        scorer: Runs the reward model.
        processor: The reward model's own.
    """

    name = "reward"

    def __init__(self, scorer: HeadScorer, processor: Processor):
        self.scorer, self.processor = scorer, processor

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        answers = [[self.processor.encode_answer(text) for text in pool] for pool in pools]
        return [squash(rewards) for rewards in self.of_tokens(prompts, answers)]

    def of_tokens(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int] | np.ndarray]]
    ) -> list[np.ndarray]:
        """Rewards (not squashed) of answers given as token ids, one array a prompt."""
        most = max(map(len, answers), default=0)
        scored: list[np.ndarray] = []
        size = self.scorer.batch_size
        for start in range(0, len(prompts), size):
            block = list(zip(prompts[start : start + size], answers[start : start + size], strict=True))
            shown = shared_images(self.processor, [prompt for prompt, _ in block], self.scorer.own_rows)
            rows = [
                prompt_row(
                    self.processor,
                    prompt,
                    shown=shown[index],
                    answers=(*(np.asarray(ids, np.int32) for ids in pool), *[_NO_ANSWER] * (most - len(pool))),
                    place=index,
                )
                for index, (prompt, pool) in enumerate(block)
            ]
            tree = collate_tree(rows)
            batch = tree.prompts([row.id for row in rows])
            rewards = self.scorer.rewards(batch, tree.branch_ids, tree.branch_mask)
            scored += [rewards[i, : len(pool)].astype(np.float64) for i, (_, pool) in enumerate(block)]
        return scored


def squash(rewards: np.ndarray) -> np.ndarray:
    """Rewards to [0, 1] by the logistic function, which keeps their order."""
    return 0.5 * (1.0 + np.tanh(0.5 * rewards))
