"""Reward models through the loop on a tiny model, and the scorer and backend that use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses_tools import one_step
from model_inputs import encoded
from training_tools import TinyProcessor, base_config, pair_rows, tiny_model

from m3po_jax.data.batches import pair_batches
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.schema import Image, Prompt, message
from m3po_jax.errors import UserError
from m3po_jax.models.heads import HEAD, answer_rewards, attach_head, detach_head
from m3po_jax.models.layers import LoRAParam
from m3po_jax.objectives.registry import check_objective
from m3po_jax.scoring.reward import HeadScorer, RewardBackend, squash
from m3po_jax.training.loop import TrainResult, train
from m3po_jax.workspace.metrics_log import read_metrics


def reward_config(**changes: Any) -> Any:
    config = base_config(objective="reward", batch_size=8, max_steps=40, learning_rate=0.01, save_steps=50, **changes)
    return replace(config, lora=replace(config.lora, lora_rank=8, lora_alpha=16.0))


def letters(alphabet: str, number: int) -> str:
    """One of the 256 words of four letters, far from the next one."""
    return "".join(alphabet[(number * 89 >> 2 * place) % 4] for place in range(4))


def separable(count: int) -> list[dict[str, Any]]:
    """Chosen answers of some letters, rejected ones of others, each combination once."""
    rows = pair_rows(count)
    for i, row in enumerate(rows):
        row["chosen"] = message("assistant", letters("abcd", i))
        row["rejected"] = message("assistant", letters("wxyz", i))
    return rows


def pairs(rows: list[dict[str, Any]], size: int = 8) -> Any:
    return pair_batches(rows, TinyProcessor(), batch_size=size, seed=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any, one_device: Any) -> TrainResult:
    config = reward_config()
    folder = tmp_path_factory.mktemp("reward")
    return train(attach_head(tiny_model(config)), pairs(separable(16)), config, output_dir=folder, mesh=one_device)


def test_accuracy_rises_on_separable_pairs(trained: TrainResult) -> None:
    lines = read_metrics(trained.metrics_path)
    # The head starts near 0, and so the loss near ln 2.
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.05) and abs(lines[0]["max_reward"]) < 0.3
    assert lines[-1]["accuracy"] == 1 and lines[-1]["margin"] > 1 and lines[-1]["loss"] < 0.4
    assert lines[-1]["min_reward"] < lines[-1]["mean_reward"] < lines[-1]["max_reward"]


def test_adapters_and_head_learn_and_nothing_else(trained: TrainResult) -> None:
    before = attach_head(tiny_model(reward_config()))
    state = lambda model: dict(nnx.to_flat_state(nnx.state(model)))  # noqa: E731
    old, new = state(before), state(trained.model)
    changed = {path for path in old if not np.array_equal(old[path][...], new[path][...])}
    adapters = {path for path, _ in nnx.to_flat_state(nnx.state(before, LoRAParam))}
    assert changed == adapters | {(HEAD, "kernel")}


def test_unseen_pairs_are_ranked(trained: TrainResult, one_device: Any) -> None:
    """The scorer's rewards, of prompts and combinations that training did not have."""
    batch = next(iter(pairs(separable(24)[16:])))
    scorer = HeadScorer(trained.model, one_device, batch_size=4)
    rows = [Prompt(str(i), (), "?") for i in range(8)]

    prompts = PromptBatch([row.id for row in rows], batch.prefix_ids, batch.prefix_mask, batch.images)
    rewards = scorer.rewards(prompts, batch.branch_ids, batch.branch_mask)
    assert rewards.shape == (8, 2) and (rewards[:, 0] > rewards[:, 1]).mean() > 0.75


def test_backend_squashes_and_agrees_with_the_training_pass(trained: TrainResult, one_device: Any) -> None:
    """Pools of different sizes, with and without images, in batches smaller than the number of prompts."""
    prompts = [Prompt(f"p{i}", (Image(path=str(i)),) if i % 2 else (), "what?") for i in range(5)]
    pools = [["qzak", "kazq", "abc"][: 1 + i % 3] for i in range(5)]
    scorer = HeadScorer(trained.model, one_device, batch_size=2)
    scores = RewardBackend(scorer, TinyProcessor())(prompts, pools)
    assert [len(score) for score in scores] == [1, 2, 3, 1, 2]
    graph, state = nnx.split(trained.model)

    @jax.jit
    def plain(state: Any, ids: Any, pixels: Any, answer: Any) -> Any:
        model = nnx.merge(graph, state)
        everything = jnp.ones(ids.shape, bool), encoded(model, pixels)
        return answer_rewards(model, ids, *everything, answer, jnp.ones(answer.shape, bool))[0, 0]

    processor = TinyProcessor()
    for prompt, pool, score in list(zip(prompts, pools, scores, strict=True))[1:3]:
        ids, pixels = np.array([processor.encode_prompt(prompt)]), None
        if prompt.images:
            pixels = processor.pixel_values(prompt)[None]
        for text, value in zip(pool, score, strict=True):
            reward = plain(state, ids, pixels, np.array([[processor.encode_answer(text)]]))
            assert value == pytest.approx(1 / (1 + np.exp(-float(reward))), abs=1e-5)


def test_squash_is_the_logistic_function() -> None:
    rewards = np.array([-800.0, -1.0, 0.0, 3.0, 800.0])
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(squash(rewards), 1 / (1 + np.exp(-rewards)), atol=1e-12)


def test_accumulated_gradient_is_the_same(one_device: Any) -> None:
    config = reward_config(max_grad_norm=0.0)
    model = attach_head(tiny_model(config))
    model.scalar_head.kernel[...] = jnp.linspace(-1, 1, 16)
    batch = next(iter(pairs(pair_rows(7))))
    whole = one_step(model, batch, config, one_device)
    parts = one_step(model, batch, replace(config, gradient_accumulation_steps=2), one_device)
    for name, value in whole[0].items():
        # Moments are up to 5e-4, and this model amplifies rounding, as compiled for tests.
        np.testing.assert_allclose(value, parts[0][name], atol=5e-6, err_msg=name)
    np.testing.assert_allclose(whole[2], parts[2], atol=1e-5)


def test_the_head_comes_off(trained: TrainResult) -> None:
    model = nnx.merge(*nnx.split(trained.model))
    assert hasattr(model, HEAD) and not hasattr(detach_head(model), HEAD)
    assert not hasattr(detach_head(model), HEAD)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert not any(path[0] == HEAD for path in paths)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient"),
        ({"reward_margin": float("nan")}, "reward_margin"),
        ({"train_vision": True}, "train_vision"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_objective(reward_config(**changes))


def test_resume_is_bit_equal(trained: TrainResult, tmp_path: Path, one_device: Any) -> None:
    config = reward_config()

    class Killed(BaseException):
        pass

    def die(step: int, metrics: dict[str, float]) -> None:
        if step == 17:
            raise Killed

    arguments: Any = (attach_head(tiny_model(config)), pairs(separable(16)), replace(config, save_steps=13))
    with pytest.raises(Killed):
        train(*arguments, output_dir=tmp_path, mesh=one_device, on_step=die)
    resumed = train(*arguments, output_dir=tmp_path, mesh=one_device)
    assert resumed.metrics_path.read_bytes() == trained.metrics_path.read_bytes()
    np.testing.assert_array_equal(resumed.model.scalar_head.kernel[...], trained.model.scalar_head.kernel[...])
