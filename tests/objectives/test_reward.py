"""The reward model's loss against TRL's RewardTrainer on the same numbers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.objectives import reward_loss

torch = pytest.importorskip("torch")


def trl_reward_loss(chosen, rejected, coefficient, margin):
    """`RewardTrainer.compute_loss` of the installed TRL on given rewards: (loss, gradients, metrics)."""
    from trl import RewardTrainer

    rewards = torch.tensor(np.concatenate([chosen, rejected])[:, None], requires_grad=True)

    class Model(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=rewards)

    model = Model()
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(rewards), 1, dtype=torch.long)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin)
        forward = Model.forward
        Model.forward = lambda self, margin=None, **_: forward(self)
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    return loss.item(), np.split(rewards.grad.numpy()[:, 0], 2), trainer._metrics["train"]


@pytest.mark.parametrize("coefficient", [None, 0.01, 0.5])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_gradient_equal_trl(coefficient, with_margin):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 7)).astype(np.float32) * 3
    margin = rng.uniform(0, 2, 7).astype(np.float32) if with_margin else None

    def loss(chosen, rejected):
        return reward_loss(
            chosen,
            rejected,
            center_rewards_coefficient=coefficient or 0.0,
            margin=0.0 if margin is None else jnp.asarray(margin),
        ).mean()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(chosen), jnp.asarray(rejected))
    expected, expected_gradients, _ = trl_reward_loss(chosen, rejected, coefficient, margin)
    assert value == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=2), st.floats(-20, 20))
def test_without_centring_only_differences_count(rewards, shift):
    chosen, rejected = (jnp.array([reward]) for reward in rewards)
    plain = reward_loss(chosen, rejected)
    np.testing.assert_allclose(plain, reward_loss(chosen + shift, rejected + shift), rtol=1e-3, atol=1e-4)
    assert reward_loss(chosen, rejected, center_rewards_coefficient=0.1) >= plain
