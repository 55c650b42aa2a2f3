"""RLOO against TRL's trainer, PPO against recorded results of TRL's former ones, and properties of both."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.objectives import policy_gradient as pg

RECORDED = json.loads(Path(__file__).with_name("trl_ppo.json").read_text(encoding="utf-8"))
SETTINGS = RECORDED["settings"]
PROMPTS, ANSWERS, TOKENS = 3, 4, 6


def recorded(name: str) -> jax.Array:
    """[1, rows, tokens]: the rows as the answers of one prompt."""
    return jnp.asarray(RECORDED["given"].get(name, RECORDED.get(name)), jnp.float32)[None]


MASK = jnp.asarray(np.arange(8) < np.array(RECORDED["lengths"])[:, None])[None]


def rollout(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, (PROMPTS, ANSWERS))
    mask = np.arange(TOKENS) < lengths[..., None]
    names = ("old", "new", "reference")
    found = {name: (rng.normal(size=mask.shape) * 0.3 - 2) * mask for name in names}
    return found | {"mask": mask, "scores": rng.normal(size=lengths.shape)}


def trl_rloo_advantages(data: dict[str, Any], beta: float, normalize: bool) -> np.ndarray:
    """The statements of TRL's `RLOOTrainer` from the KL penalty to the advantages, as installed."""
    torch = pytest.importorskip("torch")
    from trl.trainer.rloo_trainer import RLOOTrainer, nanstd

    lines = inspect.getsource(RLOOTrainer._generate_and_score_completions).splitlines()
    first = next(i for i, line in enumerate(lines) if "Include the KL penalty in the reward" in line)
    last = next(i for i, line in enumerate(lines) if "advantages = torch.nan_to_num" in line)
    flat = {name: torch.tensor(value).reshape(PROMPTS * ANSWERS, -1) for name, value in data.items()}
    scope = {
        "self": SimpleNamespace(beta=beta, normalize_advantages=normalize),
        "torch": torch,
        "nanstd": nanstd,
        "gather": lambda x: x,
        "num_generations": ANSWERS,
        "rewards": flat["scores"][:, 0],
        "old_per_token_logps": flat["old"],
        "ref_per_token_logps": flat["reference"],
        "completion_mask": flat["mask"],
    }
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), scope)
    return scope["advantages"].numpy().reshape(PROMPTS, ANSWERS)


def trl_rloo_loss(data: dict[str, Any], advantages: np.ndarray, epsilon: float) -> tuple[float, np.ndarray, Any]:
    """`RLOOTrainer._compute_loss` as installed, on a stand-in model: (loss, gradient by token, metrics)."""
    torch = pytest.importorskip("torch")
    from trl import RLOOTrainer

    flat = {name: torch.tensor(value).reshape(PROMPTS * ANSWERS, -1) for name, value in data.items()}
    new = flat["new"].clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        epsilon_low=epsilon,
        epsilon_high=epsilon,
        aux_loss_enabled=False,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=True),
    )
    model = SimpleNamespace(training=True)
    mask = flat["mask"].long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "old_logps": flat["old"].sum(1),
        "advantages": torch.tensor(np.asarray(advantages, np.float64)).reshape(-1),
    }
    loss = RLOOTrainer._compute_loss(trainer, model, inputs)
    loss.backward()
    return loss.item(), new.grad.numpy().reshape(PROMPTS, ANSWERS, TOKENS), trainer._metrics["train"]


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_advantages_equal_trl(normalize: bool) -> None:
    data = rollout()
    beta = 0.3
    kl = pg.kl_estimate(jnp.asarray(data["old"]), jnp.asarray(data["reference"])).sum(-1)
    ours = pg.rloo_advantages(data["scores"] - beta * kl, normalize=normalize)
    np.testing.assert_allclose(ours, trl_rloo_advantages(data, beta, normalize), atol=2e-6)


@pytest.mark.parametrize("epsilon", [0.2, 0.02])
def test_rloo_loss_equals_trl(epsilon: float) -> None:
    data = rollout(1)
    advantages = np.asarray(pg.rloo_advantages(jnp.asarray(data["scores"])))

    def loss(new: jax.Array) -> jax.Array:
        log_ratio = (new * data["mask"] - data["old"]).sum(-1)
        return pg.policy_loss(log_ratio, jnp.asarray(advantages), epsilon).losses.mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["new"], jnp.float32))
    expected, expected_gradient, metrics = trl_rloo_loss(data, advantages, epsilon)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    log_ratio = (jnp.asarray(data["new"]) - data["old"]).sum(-1)
    clipped = pg.policy_loss(log_ratio, jnp.asarray(advantages), epsilon).clipped
    assert float(clipped.mean()) == pytest.approx(metrics["clip_ratio/region_mean"][0]) and 0 < clipped.mean() < 1


def test_ppo_rewards_advantages_and_returns_equal_trl() -> None:
    kl = pg.kl_estimate(recorded("log_probs"), recorded("reference"))
    scores = jnp.asarray(RECORDED["scores"])[None]
    rewards = pg.token_rewards(scores, -SETTINGS["kl_coef"] * kl, MASK)
    np.testing.assert_allclose(rewards, recorded("rewards"), atol=1e-6)
    np.testing.assert_allclose(pg.whiten(rewards, MASK, shift_mean=False), recorded("whitened_rewards"), atol=1e-5)
    advantages, returns = pg.gae(rewards, recorded("values"), MASK, gamma=SETTINGS["gamma"], lam=SETTINGS["lam"])
    np.testing.assert_allclose(pg.whiten(advantages, MASK), recorded("advantages"), atol=1e-5)
    np.testing.assert_allclose(returns, recorded("returns"), atol=1e-5)


def test_ppo_losses_equal_trl() -> None:
    advantages, returns, old = recorded("advantages"), recorded("returns"), recorded("log_probs")

    def parts(new: jax.Array, values: jax.Array) -> tuple[pg.ClippedLoss, pg.ClippedLoss]:
        return (
            pg.policy_loss(new - old, advantages, SETTINGS["cliprange"]),
            pg.value_loss(values, recorded("values"), returns, SETTINGS["cliprange_value"]),
        )

    def loss(new: jax.Array, values: jax.Array) -> jax.Array:
        policy, value = parts(new, values)
        return pg.masked_mean(policy.losses, MASK) + SETTINGS["vf_coef"] * pg.masked_mean(value.losses, MASK)

    new, values = recorded("new_log_probs"), recorded("new_values")
    policy, value = parts(new, values)
    assert pg.masked_mean(policy.losses, MASK) == pytest.approx(RECORDED["policy_loss"], rel=1e-5)
    assert pg.masked_mean(value.losses, MASK) == pytest.approx(RECORDED["value_loss"], rel=1e-5)
    for part, name in ((policy, "policy"), (value, "value")):
        assert pg.masked_mean(part.clipped, MASK) == pytest.approx(RECORDED[f"{name}_clipfrac"], rel=1e-6)
    for ours, name in zip(jax.grad(loss, argnums=(0, 1))(new, values), ("log_probs", "values"), strict=True):
        np.testing.assert_allclose(ours, recorded(f"gradient_{name}"), atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_equal_trl(estimator: str) -> None:
    expected = RECORDED[f"rewards_{estimator}"]
    kl = pg.kl_estimate(recorded("log_probs")[:, :1], recorded("reference")[:, :1], estimator)
    np.testing.assert_allclose(kl[0], expected["kl"], atol=1e-6)
    scores = jnp.asarray(RECORDED["scores"])[None, :1]
    rewards = pg.token_rewards(scores, -SETTINGS["kl_coef"] * kl, MASK[:, :1])
    np.testing.assert_allclose(rewards[0], expected["rewards"], atol=1e-6)


def test_estimators_mean_the_same_divergence() -> None:
    """On samples of π, k1 and k3 average to KL(π ‖ π_ref); near it k2 does, too."""
    rng = np.random.default_rng(0)
    policy = np.array([0.5, 0.3, 0.2])
    reference = np.array([0.45, 0.33, 0.22])
    tokens = rng.choice(3, 200_000, p=policy)
    exact = float((policy * np.log(policy / reference)).sum())
    arrays = jnp.log(policy)[tokens], jnp.log(reference)[tokens]
    for estimator in pg.KL_ESTIMATORS:
        assert float(pg.kl_estimate(*arrays, estimator).mean()) == pytest.approx(exact, abs=1e-3)


def test_adaptive_coefficient_equals_trl() -> None:
    coefficient = 0.2
    for kl, expected in RECORDED["adaptive_kl"]:
        coefficient = pg.adaptive_kl_coef(coefficient, kl, target=6.0, horizon=10_000, episodes=256)
        assert coefficient == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(-50, 50))
def test_leave_one_out_baseline(seed: int, answers: int, shift: float) -> None:
    """Advantages of a prompt sum to 0, do not see a constant, and are k/(k−1) × the distance from the mean."""
    rewards = np.random.default_rng(seed).normal(size=(3, answers)).astype(np.float32)
    advantages = pg.rloo_advantages(jnp.asarray(rewards))
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(pg.rloo_advantages(jnp.asarray(rewards + np.float32(shift))), advantages, atol=1e-4)
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(advantages, centred * answers / (answers - 1), atol=1e-5)


@given(st.integers(0, 1000))
def test_gae_is_the_return_without_a_critic(seed: int) -> None:
    """With λ = γ = 1 and values of 0, an advantage is the sum of the rewards still to come; padding adds nothing."""
    data = rollout(seed)
    mask = jnp.asarray(data["mask"])
    noise = jnp.asarray(np.random.default_rng(seed).normal(size=mask.shape), jnp.float32)
    advantages, returns = pg.gae(noise, jnp.zeros_like(noise), mask, gamma=1.0, lam=1.0)
    expected = np.cumsum((noise * mask)[..., ::-1], axis=-1)[..., ::-1] * mask
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected, atol=1e-5)
