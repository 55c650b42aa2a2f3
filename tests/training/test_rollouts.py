"""RLOO and PPO through the training loop on a tiny policy, with rewards that a program can give."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from losses_tools import compiled_loss, one_step, plain_sums
from rl_tools import TOKENS, policy, prompts, rl_config, share_of_liked, source

from m3po_jax.config import RLConfig
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.objectives import policy_gradient as pg
from m3po_jax.objectives.registry import check_objective
from m3po_jax.training.loop import TrainResult, train
from m3po_jax.training.rollouts import RolloutSource, score_rollout
from m3po_jax.workspace.metrics_log import read_metrics


def run(folder: Path, mesh: Any, config: Any, stop_at: set[int] = frozenset(), **options: Any) -> TrainResult:
    """Trains, sending itself SIGTERM after the steps in `stop_at` and starting again each time."""

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(len(stop_at) + 1):
        model = policy(config)
        try:
            made = source(config, model, mesh, folder / "rollouts", **options)
            return train(model, made, config, output_dir=folder, mesh=mesh, on_step=on_step)
        except Interrupted:
            continue
    raise AssertionError("interrupted more often than asked for")


def curve(result: TrainResult, name: str) -> np.ndarray:
    return np.array([line[name] for line in read_metrics(result.metrics_path)])


LEARNING = {"rloo_k": 16}


def learning(**rl: Any) -> Any:
    config = rl_config(LEARNING | rl)
    lora = replace(config.lora, lora_rank=8, lora_alpha=16.0)
    steps = 14 * config.rl.num_ppo_epochs
    return replace(config, max_steps=steps, learning_rate=0.01, save_steps=100, lora=lora)


@pytest.fixture(scope="module")
def free(tmp_path_factory: Any, one_device: Any) -> TrainResult:
    return run(tmp_path_factory.mktemp("free"), one_device, learning())


def test_rloo_raises_the_reward(free: TrainResult) -> None:
    scores = curve(free, "objective/scores")
    assert scores[0] < 0.3 and scores[-3:].mean() > scores[:2].mean() + 0.15
    # The first rollout is the reference's own, and every rollout the present policy's: recorded log-probs are
    # those that the training pass computes.
    assert abs(curve(free, "objective/kl")[0]) < 1e-3
    np.testing.assert_allclose(curve(free, "val/ratio"), 1, atol=1e-4)
    assert not curve(free, "policy/clipfrac_avg").any()


def test_the_penalty_keeps_the_policy_close(free: TrainResult, tmp_path: Path, one_device: Any) -> None:
    held = run(tmp_path, one_device, learning(kl_coef=0.5))
    assert curve(held, "objective/kl")[-4:].mean() < 0.5 * curve(free, "objective/kl")[-4:].mean()
    non_score = curve(held, "objective/non_score_reward")
    np.testing.assert_allclose(non_score, -0.5 * curve(held, "objective/kl"), atol=1e-5)
    total = curve(held, "objective/scores") + non_score
    np.testing.assert_allclose(curve(held, "objective/rlhf_reward"), total, atol=1e-6)


def test_ppo_raises_the_reward_and_learns_values(tmp_path: Path, one_device: Any) -> None:
    trained = run(tmp_path, one_device, learning(algorithm="ppo", num_ppo_epochs=2, vf_coef=0.5))
    scores = curve(trained, "objective/scores")
    assert scores[-4:].mean() > scores[:4].mean() + 0.15
    # In a rollout's second pass the policy has moved.
    assert np.abs(curve(trained, "val/ratio")[1::2] - 1).max() > 1e-3
    assert (curve(trained, "policy/clipfrac_avg")[1::2] > 0).any()
    # The critic starts near 0, where its loss is half the mean square of the returns, which are shares of about 1/4.
    assert curve(trained, "loss/value_avg")[0] > 0.02
    assert np.abs(np.asarray(trained.model.scalar_head.kernel[...])).max() > 0


RESUMED = {
    "rloo": {"num_ppo_epochs": 2, "num_mini_batches": 2, "kl_coef": 0.1, "kl_target": 0.05, "kl_horizon": 100},
    "ppo": {"algorithm": "ppo", "num_ppo_epochs": 2},
}


@pytest.mark.parametrize("algorithm", RESUMED)
def test_resume_is_bit_equal(tmp_path: Path, one_device: Any, algorithm: str) -> None:
    """Stops in the middle of a rollout, at its end, and twice in the next one."""
    config = replace(rl_config(RESUMED[algorithm]), max_steps=6, save_steps=50)
    whole = run(tmp_path / "whole", one_device, config)
    resumed = run(tmp_path / "resumed", one_device, config, stop_at={1, 4, 5})
    assert resumed.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    if algorithm == "rloo":  # the controller has moved, and remembers where
        coefficients = curve(resumed, "objective/kl_coef")
        assert coefficients[0] == 0.1 and coefficients[-1] != 0.1


def test_broken_reward_names_the_prompt(tmp_path: Path, one_device: Any) -> None:
    def reward(batch: Any, token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = share_of_liked(batch, token_ids, mask)
        found[["row-4" in name for name in batch.ids]] = np.nan
        return found

    with pytest.raises(UserError, match=r"reward is not finite, rows 'row-4'"):
        run(tmp_path, one_device, rl_config(), reward=reward)


def test_equal_rewards_do_not_end_the_run(tmp_path: Path, one_device: Any) -> None:
    """A first rollout without contrast has no gradient; the next may have one."""
    config = replace(rl_config(), max_steps=1)
    run(tmp_path, one_device, config, reward=lambda batch, ids, mask: np.ones(ids.shape[:2]))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["grad_norm"] == 0.0


def test_no_two_places_share_a_random_stream(tmp_path: Path, one_device: Any) -> None:
    """Two prompts in a rollout of four: the same prompt twice, and in the next rollout again, answers differently."""
    config = rl_config()
    model = policy(config)
    made = source(config, model, one_device, tmp_path, count=2)
    first, second = (made.make(number, model, 0.0) for number in (0, 1))
    again = made.make(0, model, 0.0)
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    answers = [tuple(row.ravel()) for rollout in (first, second) for row in rollout.token_ids]
    assert len(set(answers)) == 8


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_visits_every_prompt_once(count: int, size: int, seed: int) -> None:
    made = RolloutSource(prompts(count), None, None, None, None, RLConfig(), size, seed, Path())  # type: ignore[arg-type]
    stream = np.concatenate([made.chosen_prompts(number) for number in range(2 * count)])
    assert len(stream) == 2 * count * size
    for epoch in range(2 * size):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert made.steps(2.0) == -(-2 * count // size)


def batch_of(config: Any, mesh: Any, folder: Path) -> tuple[Any, Any]:
    """A policy that has moved away from the one that made the batch."""
    model = policy(config)
    made = source(config, model, mesh, folder)
    batch = made.mini_batch(made.make(0, model, config.rl.kl_coef), 0, 0)
    for number, block in enumerate((model.decoder.layers.attention.q_proj, model.decoder.layers.mlp.up_proj)):
        block.lora_b[...] = 0.2 * np.random.default_rng(number).normal(size=block.lora_b.shape)
    return model, batch


def test_rloo_loss_is_that_of_whole_answers(tmp_path: Path, one_device: Any) -> None:
    config = rl_config({"cliprange": 0.05, "kl_coef": 0.05})
    model, batch = batch_of(config, one_device, tmp_path)
    out = compiled_loss(model, batch, config)
    log_ratio = plain_sums(model, batch) - batch.old_log_probs.sum(-1)
    expected = pg.policy_loss(log_ratio, batch.advantages[..., 0], 0.05)
    np.testing.assert_allclose(out.row_losses, expected.losses.mean(1), atol=1e-4)
    assert out.loss == pytest.approx(float(expected.losses.mean()), abs=1e-4)
    clipped = float(out.metrics["policy/clipfrac_avg"])
    assert clipped == pytest.approx(float(expected.clipped.mean())) and clipped > 0
    np.testing.assert_allclose(batch.advantages[..., 0].sum(1), 0, atol=1e-5)


def test_accumulated_gradient_is_the_same(tmp_path: Path, one_device: Any) -> None:
    """Answers of different lengths in the parts: PPO's mean over tokens must not become a mean of means."""
    config = replace(rl_config({"algorithm": "ppo"}), max_grad_norm=0.0)
    model, batch = batch_of(config, one_device, tmp_path)
    shorter = batch.branch_mask & (np.arange(batch.branch_mask.shape[-1]) < np.array([1, 5, 2, 6])[:, None, None])
    batch = batch._replace(branch_mask=shorter)
    whole = one_step(model, batch, config, one_device)
    parts = one_step(model, batch, replace(config, gradient_accumulation_steps=2), one_device)
    for name, value in whole[0].items():
        np.testing.assert_allclose(value, parts[0][name], atol=1e-5, err_msg=name)
    assert whole[1]["loss"] == pytest.approx(float(parts[1]["loss"]), abs=1e-6)


def test_cut_answers_pay_and_metrics_add_up() -> None:
    rng = np.random.default_rng(0)
    mask = np.arange(TOKENS) < np.array([[6, 3], [2, 6]])[..., None]
    log_probs, reference, values = -rng.uniform(1, 3, (3, 2, 2, TOKENS)) * mask
    arrays = {"log_probs": log_probs, "reference": reference, "values": values, "mask": mask}
    scores, finished = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[False, True], [True, False]])
    rl = RLConfig(missing_eos_penalty=0.5, kl_coef=0.1)
    advantages, returns, metrics = score_rollout(rl, 0.1, scores=scores, finished=finished, **arrays)
    kl = (log_probs - reference).sum(-1)
    rewards = scores - 0.5 * ~finished - 0.1 * kl
    np.testing.assert_allclose(advantages[..., 0], rewards - rewards[:, ::-1], atol=1e-5)
    assert not advantages[~mask].any() and not returns.any()
    assert metrics["objective/scores"] == pytest.approx(2.25)
    assert metrics["objective/kl"] == pytest.approx(kl.mean(), abs=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(rewards.mean(), abs=1e-5)
    assert metrics["objective/entropy"] == pytest.approx(-log_probs.sum(-1).mean(), abs=1e-5)
    assert metrics["val/num_eos_tokens"] == 2 and metrics["completions/mean_length"] == 4.25

    # PPO: whitened over all tokens of the rollout, with the score at the last token of each answer.
    plain = replace(rl, algorithm="ppo", lam=1.0, missing_eos_penalty=0.0, kl_coef=0.0)
    advantages, returns, _ = score_rollout(plain, 0.0, scores=scores, finished=finished, **arrays)
    np.testing.assert_allclose(returns, np.broadcast_to(scores[..., None], mask.shape) * mask, atol=1e-5)
    assert advantages[mask].mean() == pytest.approx(0, abs=1e-5)
    assert advantages[mask].std(ddof=1) == pytest.approx(1, abs=1e-5)
    whitened = score_rollout(replace(plain, whiten_rewards=True), 0.0, scores=scores, finished=finished, **arrays)[1]
    given_rewards = pg.token_rewards(jnp.asarray(scores), jnp.zeros(mask.shape), jnp.asarray(mask))
    expected = pg.gae(pg.whiten(given_rewards, mask, shift_mean=False), values, mask, lam=1.0)[1]
    np.testing.assert_allclose(whitened, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rl", "key"),
    [
        ({"algorithm": "rlo"}, "algorithm"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"rloo_k": 1}, "rloo_k"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"cliprange": 0.0}, "cliprange"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"lam": 1.5}, "lam"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_cannot_be_meant(rl: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_objective(rl_config(rl))


def test_a_critic_can_do_with_one_answer() -> None:
    check_objective(rl_config({"algorithm": "ppo", "rloo_k": 1}))
