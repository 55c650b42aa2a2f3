"""The objectives by name, and the one of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.config import TrainConfig
from m3po_jax.objectives.contrastive import Contrastive
from m3po_jax.objectives.objective import Objective
from m3po_jax.objectives.preference import Preference
from m3po_jax.objectives.reward import Reward
from m3po_jax.objectives.rlhf import Rlhf
from m3po_jax.objectives.sft import Sft
from m3po_jax.reading import check_values

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Preference, Sft, Reward, Rlhf, Contrastive)
}


def objective_of(config: TrainConfig) -> Objective:
    """The objective that `train` names, with its settings; see `check_objective`."""
    return OBJECTIVES[config.objective].of(config)


def check_objective(config: TrainConfig) -> Objective:
    """The objective of a recipe, once the settings that concern it are known to make sense.

    Raises:
        UserError: see the messages.
    """
    check_values(config, "train")
    objective = objective_of(config)
    objective.check(config)
    return objective


def starting_loss(train: Mapping[str, Any]) -> tuple[float, str] | None:
    """`Objective.starting_loss` of a finished run's settings under `train`; None where they name no objective."""
    objective = OBJECTIVES.get(str(train.get("objective", Preference.name)))
    return None if objective is None else objective.starting_loss(train)
