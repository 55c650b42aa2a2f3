"""Rollouts as a batch source: the policy's own answers, scored, and served to the training loop in mini-batches.

A rollout takes the next prompts, lets the generation engine answer each several times with the present weights, and
turns rewards and the KL to the reference into advantages. The loop then takes `num_ppo_epochs` × `num_mini_batches`
steps on it. Everything is a function of (seed, rollout number, weights), so a continued run sees the same; where a
checkpoint falls between a rollout's steps, the rollout itself is kept beside it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from m3po_jax.config import RLConfig
from m3po_jax.data import collation, row_inputs, tables
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.inference.generator import Generated
from m3po_jax.inference.scorer import Scorer
from m3po_jax.objectives import policy_gradient as pg
from m3po_jax.objectives.rlhf import RolloutBatch, algorithm_of
from m3po_jax.scoring.reward import HeadScorer
from m3po_jax.workspace.layout import ROLLOUT_FILES, rollout_name

# Rollout files kept: that of the last checkpoint, and of the one before where the last was cut short.
_KEPT_FILES = 3
_SAVED = ("prompts", "token_ids", "lengths", "log_probs", "advantages", "values", "returns")

RewardFunction = Callable[[PromptBatch, np.ndarray, np.ndarray], np.ndarray]


class Sampler(Protocol):
    """What a rollout needs of `inference.generator.Generator`."""

    def load(self, model: Any) -> None: ...

    def __call__(self, batch: PromptBatch) -> Generated: ...


@dataclass
class Rollout:
    """One rollout on the host: R prompts with K answers of at most T tokens.

    `prompts` [R] holds places in the source; the other arrays are [R, K, T] (`lengths` [R, K]), see `RolloutBatch`.
    """

    prompts: np.ndarray
    token_ids: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    advantages: np.ndarray
    values: np.ndarray
    returns: np.ndarray
    metrics: dict[str, float]

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.token_ids.shape[-1]) < self.lengths[..., None]


def score_rollout(
    rl: RLConfig,
    kl_coef: float,
    *,
    scores: np.ndarray,
    log_probs: np.ndarray,
    reference: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    finished: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """(advantages, returns, metrics) of one rollout; returns are 0 for RLOO. Metrics have TRL's names.

    Args:
        scores, finished: Of answers, [R, K].
        log_probs, reference, values, mask: Of tokens, [R, K, T].
    """
    scores = np.where(finished, scores, scores - rl.missing_eos_penalty)
    masked = jnp.asarray(mask)
    kl = jnp.where(masked, pg.kl_estimate(jnp.asarray(log_probs), jnp.asarray(reference), rl.kl_estimator), 0.0)
    penalties = -kl_coef * kl
    advantages, returns = algorithm_of(rl).advantages(jnp.asarray(scores), penalties, jnp.asarray(values), masked)
    of_answers = lambda x: float(jnp.mean(jnp.sum(x, axis=-1)))  # noqa: E731
    non_score = of_answers(penalties)
    metrics = {
        "objective/kl": of_answers(kl),
        "objective/kl_coef": kl_coef,
        "objective/entropy": of_answers(jnp.where(masked, -jnp.asarray(log_probs), 0.0)),
        "objective/non_score_reward": non_score,
        "objective/scores": float(np.mean(scores)),
        "objective/rlhf_reward": float(np.mean(scores)) + non_score,
        "completions/mean_length": float(mask.sum(-1).mean()),
        "val/num_eos_tokens": float(finished.sum()),
    }
    return np.asarray(advantages, np.float32), np.asarray(returns, np.float32), metrics


@dataclass
class RolloutSource:
    """Rollouts of one policy on one set of prompts; to the training loop it is a `BatchSource`.

    Args:
        prompts: What the policy answers; every epoch in an order of its own.
        processor: The policy's.
        sampler: The generation engine, made with `rl.rloo_k` candidates of a prompt.
        reward: Scores of answers, given the engine's prompt batch, token ids and mask [b, k, t].
        reference: Scores the answers under the model that the KL is measured to (adapters off).
        values: PPO: runs the policy's value head; it is given the present weights before every rollout.
        batch_size: Prompts of one optimizer step.
        folder: Where a rollout is kept that a checkpoint falls into.
        identity: A hash of what the rewards depend on, the reward model's.
    """

    prompts: Sequence[Prompt]
    processor: row_inputs.PromptProcessor
    sampler: Sampler
    reward: RewardFunction
    reference: Scorer
    rl: RLConfig
    batch_size: int
    seed: int
    folder: Path
    values: HeadScorer | None = None
    identity: str = ""
    has_reference: bool = False
    take: None = None  # no row can be had by itself
    answer_tokens: None = None  # known only once they are sampled
    cut_answers: int = 0
    failures: Mapping[int, UserError] = field(default_factory=dict)  # every host reads all images

    def __post_init__(self) -> None:
        if not len(self.prompts):
            raise UserError("there is no prompt to roll out", where="reward.split", remedy="lower it, or add prompts")
        if algorithm_of(self.rl).learns_values != (self.values is not None):
            raise ValueError("a value scorer belongs to ppo, and ppo to a value scorer")

    @functools.cached_property
    def tokenised(self) -> TokenisedPrompts:
        """The prompts with their token ids, which are made once for all rollouts."""
        return TokenisedPrompts(self.prompts, self.processor.tokenise)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(prompt.id for prompt in self.prompts)

    @property
    def rollout_size(self) -> int:
        """Prompts of one rollout."""
        return self.batch_size * self.rl.num_mini_batches

    @property
    def rollout_steps(self) -> int:
        """Optimizer steps on one rollout."""
        return self.rl.num_ppo_epochs * self.rl.num_mini_batches

    @property
    def fingerprint(self) -> str:
        rows = [[prompt.id, prompt.instruction] for prompt in self.prompts]
        return tables.content_hash(rows, self.identity, self.batch_size, self.seed)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in `epochs` passes over the prompts, whole rollouts."""
        return max(1, math.ceil(epochs * len(self.prompts) / self.rollout_size - 1e-9)) * self.rollout_steps

    def row_ids(self, row_index: Iterable[int]) -> list[str]:
        return [self.prompts[i].id for i in row_index if i >= 0]

    def __iter__(self) -> RolloutIterator:
        return RolloutIterator(self)

    # One rollout.

    def chosen_prompts(self, number: int) -> np.ndarray:
        """Places of the prompts of rollout `number`: the next ones of an endless stream of shuffled epochs."""
        count, size = len(self.prompts), self.rollout_size
        first, last = number * size, (number + 1) * size
        epochs = range(first // count, (last - 1) // count + 1)
        orders = [np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in epochs]
        return np.concatenate(orders)[first - epochs[0] * count :][:size]

    def make(self, number: int, model: Any, kl_coef: float) -> Rollout:
        """Rollout `number` of the given policy.

        Raises:
            UserError: a prompt that cannot be encoded, or a reward that is not finite; names the prompt.
        """
        self.sampler.load(model)
        if self.values is not None:
            self.values.load(model)
        chosen = self.chosen_prompts(number)
        columns = self._answered(number, chosen)
        advantages, returns, metrics = score_rollout(
            self.rl,
            kl_coef,
            **{name: columns[name] for name in ("scores", "log_probs", "reference", "values", "mask", "finished")},
        )
        size, answers = self.rollout_size, self.rl.rloo_k
        metrics |= {
            "episode": float((number + 1) * size * answers),
            "epoch": (number + 1) * size / len(self.prompts),
        }
        return Rollout(
            chosen,
            columns["token_ids"],
            columns["lengths"],
            columns["log_probs"],
            advantages,
            columns["values"],
            returns,
            metrics,
        )

    def _answered(self, number: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The answers to a rollout's prompts, and what the models say of them."""
        tree = collation.collate_tree([self._row(int(place), ()) for place in chosen])
        # A candidate's random stream belongs to its id: no two places of a run share one.
        batch = tree.prompts([f"{self.prompts[place].id} (rollout {number}, {i})" for i, place in enumerate(chosen)])
        sampled = self.sampler(batch)
        mask = np.arange(sampled.token_ids.shape[-1]) < sampled.lengths[..., None]
        scores = np.asarray(self.reward(batch, sampled.token_ids, mask), np.float32)
        broken = ~np.isfinite(scores).all(axis=1)
        if broken.any():
            names = ", ".join(repr(name) for name in self.row_ids(chosen[broken]))
            raise UserError(f"the reward is not finite, rows {names}", where=f"rollout {number}")
        values = np.zeros(mask.shape, np.float32)
        if self.values is not None:
            values = self.values.values(batch, sampled.token_ids, mask)
        return {
            "token_ids": sampled.token_ids,
            "lengths": sampled.lengths,
            "log_probs": np.asarray(sampled.log_probs, np.float32),
            "scores": scores,
            "finished": sampled.finished,
            "reference": self.reference.log_probs(batch, sampled.token_ids, mask, reference=True),
            "values": values,
            "mask": mask,
        }

    def _row(self, place: int, answers: tuple[np.ndarray, ...]) -> collation.PromptRow:
        return row_inputs.prompt_row(self.processor, self.tokenised[place], answers=answers, place=place)

    def mini_batch(self, rollout: Rollout, number: int, step: int) -> RolloutBatch:
        """The batch of optimizer step `step` on rollout `number`; every pass has an order of its own."""
        epoch, place = divmod(step, self.rl.num_mini_batches)
        order = np.random.default_rng([self.seed, number, epoch]).permutation(self.rollout_size)
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]

        def answers(row: int) -> tuple[np.ndarray, ...]:
            return tuple(ids[:n] for ids, n in zip(rollout.token_ids[row], rollout.lengths[row], strict=True))

        tree = collation.collate_tree([self._row(int(rollout.prompts[row]), answers(row)) for row in rows])
        width = tree.branch_ids.shape[-1]

        def tokens(x: np.ndarray) -> np.ndarray:
            x = x[rows][..., :width]
            return np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1]))).astype(np.float32)

        names = ("prefix_ids", "prefix_mask", "images", "branch_ids", "branch_mask", "reference", "row_index")
        return RolloutBatch(
            **{name: getattr(tree, name) for name in names},
            old_log_probs=tokens(np.where(rollout.mask, rollout.log_probs, 0.0)),
            advantages=tokens(rollout.advantages),
            old_values=tokens(rollout.values),
            returns=tokens(rollout.returns),
        )


class RolloutIterator(Iterator[RolloutBatch]):
    """Batches in order; a new rollout is made from the policy of the moment when the last one is used up.

    `follow` tells where the policy is found.
    """

    def __init__(self, source: RolloutSource):
        self.source = source
        self.number, self.step = 0, 0  # of the rollout, and of the next optimizer step on it
        self.kl_coef = source.rl.kl_coef
        self.rollout: Rollout | None = None
        self._policy: Callable[[], Any] | None = None

    def follow(self, policy: Callable[[], Any]) -> None:
        """`policy()` gives the model with the present weights."""
        self._policy = policy

    @property
    def metrics(self) -> dict[str, float]:
        """Of the latest rollout."""
        return {} if self.rollout is None else self.rollout.metrics

    def __next__(self) -> RolloutBatch:
        state = self.get_state()
        if state["rollout"] != self.number:
            self.number, self.step, self.kl_coef, self.rollout = state["rollout"], 0, state["kl_coef"], None
        if self.rollout is None:
            assert self._policy is not None, "follow() comes before the first batch"
            self.rollout = self.source.make(self.number, self._policy(), self.kl_coef)
        batch = self.source.mini_batch(self.rollout, self.number, self.step)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: the next step of this rollout, or the first of the next one."""
        if self.rollout is None or self.step < self.source.rollout_steps:
            return {"rollout": self.number, "step": self.step, "kl_coef": self.kl_coef}
        rl, kl_coef = self.source.rl, self.kl_coef
        if rl.kl_target is not None:
            kl_coef = pg.adaptive_kl_coef(
                kl_coef,
                self.rollout.metrics["objective/kl"],
                target=rl.kl_target,
                horizon=rl.kl_horizon,
                episodes=self.source.rollout_size * rl.rloo_k,
            )
        return {"rollout": self.number + 1, "step": 0, "kl_coef": kl_coef}

    def keep(self) -> None:
        """Writes a rollout whose steps are not all taken: the checkpoint that is made now will need it."""
        if self.rollout is not None and self.step < self.source.rollout_steps and is_writer():
            self._write(self.rollout)

    def set_state(self, state: dict[str, Any]) -> None:
        self.number, self.step, self.kl_coef = state["rollout"], state["step"], state["kl_coef"]
        self.rollout = self._read() if self.step else None

    def _path(self) -> Path:
        return self.source.folder / rollout_name(self.number)

    def _write(self, rollout: Rollout) -> None:
        with tables.atomic_write(self._path()) as file:
            arrays: dict[str, Any] = {name: getattr(rollout, name) for name in _SAVED}
            np.savez(file, metrics=np.array(json.dumps(rollout.metrics)), **arrays)
        for old in sorted(self.source.folder.glob(ROLLOUT_FILES))[:-_KEPT_FILES]:
            old.unlink()

    def _read(self) -> Rollout:
        try:
            with np.load(self._path(), allow_pickle=False) as file:
                arrays = {name: file[name] for name in _SAVED}
                return Rollout(**arrays, metrics=json.loads(str(file["metrics"])))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the rollout that the checkpoint continues cannot be read ({type(error).__name__})",
                where=str(self._path()),
                remedy="remove the training folder to start anew",
            ) from None
