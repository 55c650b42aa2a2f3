"""The systems that can be compared, as overrides of one recipe (docs/method.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3po_jax.config import Recipe, TrainConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.objectives.objective import Reads
from m3po_jax.objectives.registry import OBJECTIVES, objective_of
from m3po_jax.recipes import override

BASE, VCD = "base", "vcd"
CONTRAST_ALPHA = 1.0  # of the arm vcd, where the recipe names none


@dataclass(frozen=True)
class ArmDefinition:
    """What an arm changes of the recipe, and what it is."""

    what: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


def _m3po(variant: str, what: str) -> ArmDefinition:
    return ArmDefinition(what, {"select.rule": "m3p", "select.confidence_dispreferred": variant})


# `vcd` is a decoding of the base and trains nothing; so is `base`, which is part of every comparison.
SYSTEMS: dict[str, ArmDefinition] = {
    VCD: ArmDefinition("the base decoded contrastively against a blanked image; no training"),
    "sft": ArmDefinition(
        "more SFT on the data's reference answers (`train.data`), for the same compute",
        {"train.objective": "sft", "train.sft_answers": "reference"},
    ),
    "sft_chosen": ArmDefinition(
        "SFT on M3PO's chosen answers",
        {"train.objective": "sft", "train.sft_answers": "chosen", "select.rule": "m3p"},
    ),
    "dpo": ArmDefinition("vanilla DPO: two random answers ordered by MAS", {"select.rule": "vanilla"}),
    "mas_dpo": ArmDefinition("M3PO without confidence, λ₊ = λ₋ = 0", {"select.rule": "mas_only"}),
    "low_confidence": ArmDefinition("M3PO with the least confident bad answer", {"select.rule": "low_confidence"}),
    "csr": ArmDefinition(
        "one score z(m) + 0.25 z(c) for both ends, as CSR-like systems have it",
        {"select.rule": "shared", "select.lambda_preferred": 0.25},
    ),
    "random": ArmDefinition("any pair that satisfies the constraints", {"select.rule": "random"}),
    "product": ArmDefinition("the largest m·c and the largest (1 − m)·c", {"select.rule": "product"}),
    "lexicographic": ArmDefinition(
        "best MAS above, most confident answer below a threshold", {"select.rule": "lexicographic"}
    ),
    "inversion": ArmDefinition("the valid pair that the model ranks most wrongly", {"select.rule": "inversion"}),
    "rm_dpo": ArmDefinition(
        "DPO on the best and the worst answer in the eyes of a reward model trained on other prompts",
        {
            "score.backend": "reward",
            "score.model": "",
            "score.confidence": ["mean"],
            "select.rule": "extremes",
            "select.confidence": "mean",
            "select.confidence_dispreferred": "",
        },
    ),
    "rlhf": ArmDefinition(
        "reinforcement learning (RLOO) on the same reward model, with a KL penalty", {"train.objective": "rlhf"}
    ),
    "m3po": ArmDefinition("the method", {"select.rule": "m3p"}),
    "m3po_prior": _m3po("prior", "M3PO; the rejected answer's confidence is that without the image"),
    "m3po_visual": _m3po("visual", "M3PO; the rejected answer's confidence is what the image adds"),
    "m3po_sum": _m3po("sum", "M3PO; the rejected answer's confidence is its whole log-probability"),
    "m3po_tail": _m3po("tail", "M3PO; the rejected answer's confidence is that of its least likely fifth"),
    "m3po_cluster": _m3po("cluster", "M3PO; the rejected answer's confidence is how many candidates agree with it"),
}


def overrides_of(recipe: Recipe, arm: str) -> dict[str, Any]:
    """Dotted overrides of an arm: those of the system that ships under its name, then the recipe's own.

    An SFT arm of a preference recipe gets twice the rows a step: as many sequences as DPO sees in its pairs.

    Raises:
        UserError: an unknown name.
    """
    if arm not in SYSTEMS and arm not in recipe.arms:
        names = [BASE, *SYSTEMS, *recipe.arms]
        raise UserError(
            f"unknown system {arm!r}{nearest(arm, names)}",
            where="arms",
            remedy="docs/compare.md lists those that ship; define others under `arms`",
        )
    overrides = dict(SYSTEMS[arm].overrides) if arm in SYSTEMS else {}
    overrides |= recipe.arms.get(arm, {})
    if "train.objective" in overrides:
        arms, main = OBJECTIVES.get(str(overrides["train.objective"])), objective_of(recipe.train)
        if arms is not None and arms.answers is not None and main.answers is not None and arms.answers < main.answers:
            overrides.setdefault("train.batch_size", recipe.train.batch_size * main.answers // arms.answers)
    return overrides


def arm_recipe(recipe: Recipe, arm: str | None) -> Recipe:
    """The recipe of a comparison arm; None is the recipe's own system."""
    return recipe if arm is None else override(recipe, overrides_of(recipe, arm), f"arms.{arm}")


def makes_pairs(train: TrainConfig) -> bool:
    """Whether a run selects an arm's pairs from scored candidates."""
    return needs_pairs(train) and not train.pairs


def trains_in_rounds(train: TrainConfig) -> bool:
    """Whether `m3po train` works in round folders, as an arm does: on pairs or rollouts, not on rows of `data`."""
    return not objective_of(train).reads_rows or bool(train.pairs)


def needs_pairs(train: TrainConfig) -> bool:
    """Whether an arm's training reads pairs."""
    return objective_of(train).reads is Reads.PAIRS
