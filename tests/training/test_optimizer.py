"""Schedules, decay mask and clipping, against torch where it has the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_tools import base_config

from m3po_jax.errors import UserError
from m3po_jax.training.optimizer import (
    OptimizerSettings,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    warmup_steps,
)

AXES = {"w": ("layers", "embed", "mlp"), "scale": ("layers", "norm"), "bias": ("mlp",)}


def optimizer_settings(**changes: object) -> OptimizerSettings:
    return OptimizerSettings.of(base_config(**changes))


def rates(total: int, **changes: object) -> np.ndarray:
    # Always 256 steps, so that jax compiles the operations for one shape.
    return np.asarray(learning_rate_schedule(optimizer_settings(**changes), total)(np.arange(256)))[:total]


def test_cosine_with_warmup() -> None:
    values = rates(12, lr_schedule="cosine", warmup_ratio=0.25, learning_rate=2.0)
    np.testing.assert_allclose(values[:3], [2 / 3, 4 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values[3:], 1 + np.cos(np.pi * np.arange(9) / 9), rtol=1e-5)


@settings(deadline=None)  # the first call compiles
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_rates_are_positive_and_peak_after_the_warmup(name: str, ratio: float, total: int) -> None:
    values = rates(total, lr_schedule=name, warmup_ratio=ratio, learning_rate=3.0)
    warmup = warmup_steps(ratio, total)
    assert (values > 0).all() and values.max() <= 3.0 * (1 + 1e-6)
    assert values[max(warmup - 1, 0)] == pytest.approx(3.0)
    assert (np.diff(values[:warmup]) > 0).all() and (np.diff(values[warmup:]) <= 0).all()


def test_norms_and_biases_do_not_decay() -> None:
    assert decay_mask(AXES) == {"w": True, "scale": False, "bias": False}


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.999, 1e-8), (0.8, 0.95, 1e-2)])
def test_equals_torch_adamw(beta1: float, beta2: float, epsilon: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 3, 4), "scale": (2, 3), "bias": (4,)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = base_config(
        lr_schedule="linear",
        warmup_ratio=0.0,
        weight_decay=0.1,
        max_grad_norm=0.5,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=epsilon,
    )
    optimizer = make_optimizer(OptimizerSettings.of(config), 5, AXES)
    ours, state = dict(start), optimizer.init(start)
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {"params": [theirs["w"]], "weight_decay": 0.1},
        {"params": [theirs["scale"], theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(beta1, beta2), eps=epsilon)
    for step in range(5):
        gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        updates, state = optimizer.update(gradients, state, ours)
        ours = {name: value + updates[name] for name, value in ours.items()}
        for group in reference.param_groups:
            group["lr"] = config.learning_rate * (1 - step / 5)
        for name, value in theirs.items():
            value.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate: must be in"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"adam_beta2": 1.0}, "adam_beta2: must be in"),
        ({"adam_epsilon": 0.0}, "adam_epsilon: must be in"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(optimizer_settings(**changes), 5, AXES)


def test_clipping_can_be_switched_off() -> None:
    gradients = {name: np.full((2,) * len(axes), 100.0, np.float32) for name, axes in AXES.items()}
    moments = []
    for limit in (0.0, 1.0):
        optimizer = make_optimizer(optimizer_settings(max_grad_norm=limit), 5, AXES)
        _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
        moments.append(np.asarray(state[1][0].mu["bias"])[0])
    assert moments[0] == pytest.approx(10.0) and moments[1] < 0.1
