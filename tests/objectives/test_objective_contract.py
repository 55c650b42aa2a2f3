"""An objective is a small frozen value of its own keys, and a loss with a parameter is a function and an entry."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.config import LoRAConfig, RLConfig, TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.fields import fields_of
from m3po_jax.objectives import LOSSES, preference_loss
from m3po_jax.objectives.loss_types import Excluded, PairLogProbs, PreferenceLoss
from m3po_jax.objectives.objective import Learner, Objective, Reads
from m3po_jax.objectives.pair_loss import PARAMETERS
from m3po_jax.objectives.registry import OBJECTIVES, check_objective, objective_of, starting_loss

LN2 = float(np.log(2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_reads_its_own_keys_alone(name: str) -> None:
    config = TrainConfig(objective=name)
    objective = check_objective(config)
    assert objective.name == name
    # What others read changes neither it nor, hence, the compiled step.
    others = replace(config, learning_rate=1.0, save_steps=7, epochs=3.0, lora=LoRAConfig(lora_rank=2))
    assert objective_of(others) == objective and hash(objective_of(others)) == hash(objective)
    assert objective_of(replace(config, lora=LoRAConfig(lora_rank=0))) != objective  # the base learns too


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preference", {"beta": 0.2}),
        ("preference", {"loss_type": "hinge"}),
        ("preference", {"ld_alpha": 0.5}),
        ("preference", {"reference": "computed"}),
        ("sft", {"sft_answers": "reference"}),
        ("reward", {"reward_margin": 1.0}),
        ("rlhf", {"rl": RLConfig(cliprange=0.1)}),
        ("rlhf", {"rl": RLConfig(algorithm="ppo")}),
    ],
)
def test_its_own_keys_change_it(name: str, changes: dict[str, object]) -> None:
    config = TrainConfig(objective=name)
    assert objective_of(replace(config, **changes)) != objective_of(config)  # type: ignore[arg-type]
    others = [other for other in OBJECTIVES if other != name]
    same = [objective_of(replace(config, objective=other)) for other in others]
    changed = [objective_of(replace(config, objective=other, **changes)) for other in others]  # type: ignore[arg-type]
    assert same == changed


def test_what_systems_read_and_make() -> None:
    def facts(objective: Objective) -> tuple[Reads, Learner]:
        return objective.reads, objective.learner

    chosen, references = (objective_of(TrainConfig(objective="sft", sft_answers=a)) for a in ("chosen", "reference"))
    assert facts(chosen) == (Reads.PAIRS, Learner.POLICY)
    assert facts(references) == (Reads.REFERENCES, Learner.POLICY)
    by_name = {name: facts(objective_of(TrainConfig(objective=name))) for name in OBJECTIVES if name != "sft"}
    assert by_name == {
        "preference": (Reads.PAIRS, Learner.POLICY),
        "rlhf": (Reads.PROMPTS, Learner.POLICY),
        "reward": (Reads.REWARD_PAIRS, Learner.REWARD_MODEL),
        "contrastive": (Reads.CLAIMS, Learner.DUAL_ENCODER),
    }


def test_an_adapted_tower_learns() -> None:
    adapted = LoRAConfig(target_modules=["q_proj", "vision_tower.q_proj"])
    assert not objective_of(TrainConfig()).tower_learns
    assert objective_of(TrainConfig(lora=adapted)).tower_learns
    assert not objective_of(TrainConfig(lora=replace(adapted, lora_rank=0))).tower_learns
    assert objective_of(TrainConfig(objective="sft", train_vision=True)).tower_learns
    assert objective_of(TrainConfig(objective="contrastive")).tower_learns


def test_parameters_of_losses_are_keys_with_a_range() -> None:
    assert set(PARAMETERS) == {"beta", "label_smoothing", "discopop_tau", "simpo_gamma"}
    for name in PARAMETERS:
        kind = fields_of(TrainConfig)[name]
        assert kind.base is float and kind.rules and not kind.optional


def test_a_loss_with_a_parameter_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(x: PairLogProbs, *, beta: float, simpo_gamma: float) -> jnp.ndarray:
        return (beta * x.delta - simpo_gamma) ** 2

    entry = PreferenceLoss(shifted, divergences=True, excluded=Excluded("simpo_gamma", 0.0, "other than 0"))
    monkeypatch.setitem(LOSSES, "shifted", entry)
    assert entry.parameters == ("beta", "simpo_gamma")
    sums = [jnp.array([value]) for value in (-1.0, -4.0, -2.0, -3.0)]
    losses, chosen, _ = preference_loss(*sums, loss_type="shifted", beta=0.5, simpo_gamma=2.0)
    np.testing.assert_allclose(losses, (0.5 * 2.0 - 2.0) ** 2)
    np.testing.assert_allclose(chosen, 0.5)
    # In a recipe: mixed with another loss, with a first value, checked, and in the step's own settings.
    weights = {"sigmoid": 1.0, "shifted": 2.0}
    config = TrainConfig(loss_type="mixture", loss_weights=weights, simpo_gamma=3.0)
    objective = check_objective(config)
    assert objective.first_values(0.01)["loss/preference"][0] == pytest.approx(LN2 + 2 * 9.0)
    assert objective_of(replace(config, simpo_gamma=4.0)) != objective
    with pytest.raises(UserError, match="loss_type 'shifted' needs simpo_gamma other than 0"):
        check_objective(replace(config, simpo_gamma=0.0))


def test_a_parameter_that_no_loss_has_is_refused() -> None:
    x = jnp.zeros(1)
    with pytest.raises(TypeError, match="no loss has a parameter 'gamma'"):
        preference_loss(x, x, x, x, gamma=1.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, LN2),
        ({"chosen_nll_weight": 0.5}, None),
        ({"loss_type": "hinge"}, None),
        ({"objective": "sft"}, None),
        ({"objective": "of an older version"}, None),
    ],
)
def test_where_the_chart_of_the_loss_begins(changes: dict[str, object], expected: float | None) -> None:
    train = dataclasses.asdict(TrainConfig()) | changes
    start = starting_loss(train)
    assert (start and start[0]) == expected


def test_settings_that_cannot_be_read_have_no_start() -> None:
    assert starting_loss({}) is None
    assert starting_loss({"loss_type": "sigmoid"}) == (LN2, "ln 2: start of DPO")
