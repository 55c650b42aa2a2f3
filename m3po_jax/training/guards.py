"""Checks that end a training run before it wastes hours, and the warning of a collapse.

All of them read what a step has returned anyway; only the sample of recorded log-probs is computed for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.errors import UserError
from m3po_jax.models.image_family import ImageFamily
from m3po_jax.models.registry import family_of_model
from m3po_jax.objectives.objective import Objective
from m3po_jax.reading import check_values

# Logged lines that the collapse warning looks back on.
COLLAPSE_WINDOW = 5


def sum_tolerance(model: Any) -> float:
    """Nats by which an answer's log-prob sum may differ between two programs; coarse below float32."""
    return 0.02 if _is_exact(model) else 1.0


def token_tolerance(model: Any) -> float:
    """Nats per token by which a recorded answer may differ from the same model's own pass over it."""
    return 1e-3 if _is_exact(model) else 5e-2


def _is_exact(model: Any) -> bool:
    """Whether a language model computes in float32; a dual encoder has no log-probs to compare."""
    return family_of_model(model).has_decoder and model.decoder.dtype == jnp.float32


def check_settings(config: TrainConfig) -> None:
    """Raises UserError for settings of the loop that make no sense."""
    check_values(config, "train")
    if config.weights == "ema" and not config.ema_decay:
        raise UserError("no moving average is kept", where="train.weights", remedy="set train.ema_decay, e.g. 0.99")
    if config.weights == "best" and not config.keep_best:
        raise UserError("no best checkpoint is kept", where="train.weights", remedy="set train.keep_best=1")
    if config.keep_best and config.log_steps > config.save_steps:
        raise UserError(
            "best checkpoints are chosen by logged metrics, and not every checkpoint has one",
            where="train.keep_best",
            remedy="set train.log_steps to at most train.save_steps",
        )


def check_image_tokens(batch: Any, ids: Sequence[str], images: ImageFamily, config: Any) -> None:
    """Every feature of a row's images has its image token in the prompt, and every image token a feature.

    Args:
        batch: A batch on the host with `prefix_ids` [b, p] and `images`.
        images, config: Of the model.

    Raises:
        UserError: names the row; a wrong count would silently shift images into each other's places.
    """
    placed = np.sum((batch.prefix_ids == config.image_token_id) & batch.prefix_mask, axis=1)
    given = np.zeros_like(placed) if batch.images is None else images.count_features(config, batch.images)
    if (placed != given).any():
        row = int(np.argmax(placed != given))
        raise UserError(
            f"{placed[row]} image tokens in the prompt, and its images have {given[row]} features",
            where=f"row {ids[int(batch.row_index[row])]!r}",
            remedy="the processor does not belong to this model: take both from one directory",
        )


class Guards:
    """What must hold at each step of one run; see `check`.

    Args:
        agrees: The policy is its reference at step 0, so that the closed forms hold.
    """

    def __init__(self, objective: Objective, batches: BatchSource, where: str, *, agrees: bool, tolerance: float):
        self.batches, self.where = batches, where
        self.expected = objective.first_values(tolerance) if agrees else {}

    def finite(self, step: int, metrics: Mapping[str, float], row_losses: np.ndarray, rows: np.ndarray) -> str | None:
        """None, or the error text for a loss or gradient that is not finite at `step` (0: the first)."""
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return None
        guilty = rows[~np.isfinite(row_losses)] if not np.isfinite(row_losses).all() else rows
        what = "loss" if not math.isfinite(metrics["loss"]) else "gradient"
        names = ", ".join(repr(name) for name in self.batches.row_ids(np.unique(guilty)))
        return f"the {what} is not finite at step {step + 1}, rows {names}"

    def first_step(self, metrics: Mapping[str, float], idle: Sequence[str]) -> None:
        """Checks of the first step of a run.

        Args:
            idle: Leaves without any gradient, see `idle_leaves`.

        Raises:
            UserError: nothing has a gradient, or a loss is not what its closed form says.
        """
        for name, (value, tolerance) in self.expected.items():
            if not abs(metrics[name] - value) <= tolerance:
                shown = "ln 2 = 0.693147" if math.isclose(value, math.log(2), abs_tol=1e-6) else f"{value:.6g}"
                raise UserError(
                    f"the first {name} is {metrics[name]:.6f}, not {shown}: the reference log-probs do not "
                    "belong to this model",
                    where=self.where,
                    remedy="set train.reference=computed, or make the candidates with this model",
                )
        if metrics["grad_norm"] == 0.0:
            names = f" ({', '.join(idle[:4])}{', …' if len(idle) > 4 else ''})" if idle else ""
            raise UserError(
                f"the gradient of the first step is zero: nothing would be learned{names}",
                where=self.where,
                remedy="look at the pairs, at train.lora and at train.freeze",
            )


def idle_leaves(optimizer: optax.OptState, adapters: Mapping[str, bool]) -> list[str]:
    """Leaves that had no gradient in the first step, by their first moments: they learn nothing.

    A LoRA factor A has none while B is zero, so A does not count.

    Args:
        adapters: Leaf name -> whether it is a LoRA factor.
    """
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    names: list[str] = []
    for state in jax.tree.leaves(optimizer, is_leaf=is_adam):
        if is_adam(state):
            largest = jax.device_get(jax.tree.map(lambda x: jnp.max(jnp.abs(x)), state.mu))
            names += [
                name
                for name, value in largest.items()
                if value == 0 and not (adapters.get(name) and name.endswith("lora_a"))
            ]
    return sorted(names)


class CollapseWatch:
    """Warns once when the chosen answers' likelihood falls away while the margins still grow."""

    def __init__(self, threshold: float, lines: Sequence[Mapping[str, Any]], *, warned: bool):
        """`lines`: those of `metrics.jsonl` so far, so that a continued run warns at the same step."""
        self.threshold, self.warned = threshold, warned
        self.lines = list(lines)[-COLLAPSE_WINDOW:]

    def see(self, line: Mapping[str, Any]) -> str | None:
        """The warning that this logged line calls for, if any."""
        self.lines = [*self.lines, line][-COLLAPSE_WINDOW:]
        if self.warned or not self.threshold or len(self.lines) < COLLAPSE_WINDOW:
            return None
        values = [(row.get("delta_logps/chosen"), row.get("rewards/margins")) for row in self.lines]
        if any(None in pair for pair in values):
            return None
        chosen, margins = np.array(values, np.float64).T
        half = COLLAPSE_WINDOW // 2
        if not (chosen.mean() < -self.threshold and margins[-half:].mean() > margins[:half].mean()):
            return None
        self.warned = True
        return (
            f"the chosen answers have lost {-chosen.mean():.2f} nats per token against the reference while the "
            "margins still grow: the policy gets its margin by making both answers unlikely (likelihood "
            "displacement), and forgets what it knew; raise train.chosen_nll_weight, lower train.learning_rate, or "
            "keep near-duplicates out of the pairs (select.max_similarity)"
        )


def check_recorded(
    recorded: np.ndarray, computed: np.ndarray, lengths: np.ndarray, ids: Sequence[str], limit: float
) -> None:
    """The spot check: recorded reference sums [rows, k] are those of the model that is trained from.

    Raises:
        UserError: names the row that is furthest off.
    """
    gap = np.abs(recorded - computed) / np.maximum(lengths, 1)
    gap = np.where(np.isfinite(recorded), gap, 0.0)
    if gap.max(initial=0.0) <= limit:
        return
    row, branch = map(int, np.unravel_index(int(np.argmax(gap)), gap.shape))
    answer = ("chosen", "rejected")[branch] if gap.shape[1] == 2 else f"number {branch}"
    raise UserError(
        f"the recorded log-prob of its {answer} answer is {recorded[row, branch]:.3f}, the reference model gives "
        f"{computed[row, branch]:.3f} ({gap[row, branch]:.4f} nats per token apart, {limit:g} allowed)",
        where=f"row {ids[row]!r}",
        remedy="the candidates come from another model: make them again, or set train.reference=computed",
    )
