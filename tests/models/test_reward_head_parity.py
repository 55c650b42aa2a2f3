"""A reward model's whole training step against transformers and torch: rewards, loss and every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import IMAGE, images, llava, saved, torch_and_transformers
from model_inputs import shown

from m3po_jax.config import LoRAConfig, TrainConfig
from m3po_jax.data.collation import TreeBatch
from m3po_jax.models.export.model import pending_tensors
from m3po_jax.models.heads import attach_head
from m3po_jax.objectives.objective import LossContext
from m3po_jax.objectives.registry import objective_of
from m3po_jax.training.step import split_model

PROMPTS = [[1, *[IMAGE] * 4, 13, *[IMAGE] * 4, 7, 8], [1, 5, 6, 7], [1, 9, *[IMAGE] * 4, 11, 12, 2]]
ANSWERS = [[[5, 9, 2], [8, 8]], [[3, 2], [4, 5, 6]], [[7, 2], [1, 2, 3]]]
COEFFICIENT, MARGIN = 0.1, 0.5


def batch(pixels: np.ndarray) -> TreeBatch:
    width = max(map(len, PROMPTS))
    ids = np.array([row + [0] * (width - len(row)) for row in PROMPTS])
    answers = np.array([[answer + [0] * (3 - len(answer)) for answer in pair] for pair in ANSWERS])
    lengths = np.array([[len(answer) for answer in pair] for pair in ANSWERS])
    ours = np.zeros((3, 2, *pixels.shape[2:], 3), np.float32)
    ours[0, 0], ours[0, 1], ours[2, 0] = pixels.transpose(0, 2, 3, 1)
    return TreeBatch(
        jnp.asarray(ids),
        jnp.arange(width) < np.array([len(row) for row in PROMPTS])[:, None],
        jax.tree.map(jnp.asarray, shown(ours, 4)),
        jnp.asarray(answers),
        jnp.arange(3) < lengths[..., None],
        jnp.full((3, 2), jnp.nan),
        jnp.arange(3),
    )


def torch_step(model: Any, head: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, float, Any, dict[str, Any]]:
    """(rewards, loss, gradient of the head, gradients by name): one unpadded pass for each answer."""
    torch, _ = torch_and_transformers()
    weight = torch.tensor(head, requires_grad=True)
    of_row = [pixels[:2], None, pixels[2:]]
    rewards = []
    for prompt, pair, own in zip(PROMPTS, ANSWERS, of_row, strict=True):
        for answer in pair:
            hidden = model.model(
                input_ids=torch.tensor([prompt + answer]),
                pixel_values=None if own is None else torch.tensor(own),
            ).last_hidden_state
            rewards.append(hidden[0, -1] @ weight)
    rewards = torch.stack(rewards).reshape(3, 2)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    # TRL's RewardTrainer.compute_loss, see tests/objectives/test_reward.py
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - MARGIN).mean()
    loss = loss + COEFFICIENT * torch.mean((chosen + rejected) ** 2)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return rewards.detach().numpy(), loss.item(), weight.grad.numpy(), gradients


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_rewards_loss_and_gradients_equal_torch(remat: str, tmp_path: Any) -> None:
    oracle = llava(seed=4, text={"num_hidden_layers": 2})
    loaded, pixels = saved(oracle, tmp_path), images(3)
    head = np.random.default_rng(0).normal(size=32).astype(np.float32)
    model = attach_head(loaded.model)
    model.scalar_head.kernel[...] = jnp.asarray(head)
    config = TrainConfig(
        objective="reward",
        lora=LoRAConfig(lora_rank=0),
        center_rewards_coefficient=COEFFICIENT,
        reward_margin=MARGIN,
    )
    partition, trainable, frozen = split_model(model, config)

    def loss(trainable: Any) -> Any:
        out = objective_of(config).loss(partition.merge(trainable, frozen), batch(pixels), LossContext(remat=remat))
        return out.loss, out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    rewards, expected, head_gradient, by_name = torch_step(oracle, head, pixels)
    assert float(out.loss) == pytest.approx(expected, abs=1e-5)
    assert float(out.metrics["accuracy"]) == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert float(out.metrics["max_reward"]) == pytest.approx(rewards.max(), abs=1e-4)
    np.testing.assert_allclose(gradients["scalar_head.kernel"], head_gradient, atol=1e-5)

    # The gradients in the model's own places, written out as export would: names and layouts are torch's then.
    holder = partition.merge(gradients, frozen)
    delattr(holder, "scalar_head")
    compared = 0
    for tensor in pending_tensors(holder, loaded.family, loaded.config, {}, None):
        name = "model." + tensor.name.replace("language_model.model.", "language_model.")
        if name not in by_name or "vision_tower" in name:
            continue
        theirs = by_name[name].numpy()
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(tensor.value(), theirs, rtol=0, atol=1e-5 * scale, err_msg=name)
        compared += theirs.any()
    assert compared >= 2 * 9 + 4, "layers, embeddings, norm and projector"
