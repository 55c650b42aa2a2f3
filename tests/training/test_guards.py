"""Guards: closed forms of first losses, image tokens, idle leaves, collapse, states that are not finite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from model_inputs import shown
from training_tools import CONFIG, IMAGE_ID, TinyProcessor, base_config, pair_rows, tiny_model, tiny_pairs

from m3po_jax.data.batches import pair_batches
from m3po_jax.errors import UserError
from m3po_jax.models.heads import attach_head
from m3po_jax.models.llava.images import LLAVA_IMAGES
from m3po_jax.objectives import LOSSES, preference_loss
from m3po_jax.objectives.preference import Preference
from m3po_jax.objectives.registry import OBJECTIVES, objective_of
from m3po_jax.training.checkpoint import restore_trainable
from m3po_jax.training.guards import COLLAPSE_WINDOW, CollapseWatch, check_image_tokens, check_recorded
from m3po_jax.training.loop import train
from m3po_jax.training.step import split_model
from m3po_jax.workspace.metrics_log import read_metrics

# Value of each loss where policy and reference agree, by hand, at β 0.5, label smoothing 0.1, τ 0.05.
LN2 = float(np.log(2))
CLOSED_FORMS = {
    **dict.fromkeys(("sigmoid", "sigmoid_trl", "robust", "sigmoid_norm", "aot", "aot_unpaired", "discopop"), LN2),
    "hinge": 1.0,
    "ipo": 1.0,  # (1 / 2β)²
    "ipo_sum": 1.0,
    "exo_pair": -LN2 - 0.5 * (np.log(0.9) + np.log(0.1)),  # KL of (½, ½) from (1 − ε, ε)
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2.0,  # 2 (1 / 2β)²
    "apo_zero": 1.0,
    "apo_down": 1.0,
}
CLOSED_FORMS["discopop"] = 0.5 * LN2 + 0.5


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_first_value_of_every_loss(name: str) -> None:
    config = base_config(loss_type=name, beta=0.5, label_smoothing=0.1)
    found = objective_of(config).first_values(0.02)
    if name in ("simpo", "cpo", "orpo", "sft"):
        assert found == {}  # they read the policy alone
        return
    value, tolerance = found["loss/preference"]
    assert value == pytest.approx(CLOSED_FORMS[name], abs=1e-6)
    # The tolerance is what the loss makes of sums that are off by as much: no more, no less.
    off = preference_loss(
        jnp.array([0.02]),
        jnp.array([-0.02]),
        jnp.zeros(1),
        jnp.zeros(1),
        loss_type=name,
        beta=0.5,
        label_smoothing=0.1,
        chosen_lengths=jnp.ones(1),
        rejected_lengths=jnp.ones(1),
    )[0][0]
    assert abs(float(off) - value) <= tolerance < 0.2


def test_first_values_of_mixtures_and_anchor() -> None:
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2}
    config = base_config(loss_type="mixture", loss_weights=mixture, anchor_weight=2.0, anchor_delta=-0.3)
    found = objective_of(config).first_values(0.02)
    assert found["loss/preference"][0] == pytest.approx(0.8 * LN2 + 0.4 * LN2, abs=1e-6)
    assert found["loss/anchor"][0] == pytest.approx(np.log1p(np.exp(-0.3)), abs=1e-6)
    with_sft = replace(config, loss_weights={**mixture, "sft": 1.0}, anchor_weight=0.0)
    assert objective_of(with_sft).first_values(0.02) == {}


def test_a_wrong_first_loss_of_another_type_is_refused(tmp_path: Path, one_device: Mesh) -> None:
    """The loop compares what it sees; hinge is 1, not ln 2."""
    config = base_config(loss_type="hinge", reference="recorded", reference_check_rows=0, max_steps=1, beta=1.0)
    record = {"reference_chosen_logprobs": [-9.0, -9.0], "reference_rejected_logprobs": [-1.0, -1.0]}
    rows = [row | {"chosen_token_ids": [5, 2], "rejected_token_ids": [6, 2]} | record for row in pair_rows(7)]
    pairs = pair_batches(rows, TinyProcessor(), batch_size=4, seed=3)
    with pytest.raises(UserError, match=r"the first loss/preference is .*, not 1:"):
        train(tiny_model(config), pairs, config, output_dir=tmp_path, mesh=one_device)


def test_image_tokens_are_counted() -> None:
    config = base_config()
    batch = next(iter(tiny_pairs(config)))
    ids = [f"row-{i}" for i in range(7)]
    of_model = LLAVA_IMAGES, CONFIG
    check_image_tokens(batch, ids, *of_model)
    short = batch._replace(prefix_ids=batch.prefix_ids.copy())
    short.prefix_ids[2, 1] = 5
    with pytest.raises(UserError, match=f"row 'row-{batch.row_index[2]}': 3 image tokens"):
        check_image_tokens(short, ids, *of_model)
    with pytest.raises(UserError, match="4 image tokens in the prompt, and its images have 8 features"):
        check_image_tokens(batch._replace(images=shown(np.zeros((4, 2, 8, 8, 3), np.float32), 4)), ids, *of_model)
    with pytest.raises(UserError, match="4 image tokens in the prompt, and its images have 0 features"):
        check_image_tokens(batch._replace(images=None), ids, *of_model)
    larger = replace(CONFIG, vision=replace(CONFIG.vision, patch_size=2))
    with pytest.raises(UserError, match="4 image tokens in the prompt, and its images have 16 features"):
        check_image_tokens(batch, ids, LLAVA_IMAGES, larger)  # a processor of another model
    # Cached features take the images' place, and padding may hold any id.
    cached = batch._replace(images=shown(np.zeros((4, 1, 4, 16), np.float32), 4))
    check_image_tokens(cached, ids, *of_model)
    padded = batch._replace(prefix_ids=np.where(batch.prefix_mask, batch.prefix_ids, IMAGE_ID))
    check_image_tokens(padded, ids, *of_model)


def test_recorded_sums_are_compared_per_token() -> None:
    recorded, lengths = np.array([[-8.0, np.nan], [-4.0, -2.0]]), np.array([[4, 2], [2, 2]])
    computed = recorded + np.array([[0.004, 0.0], [0.0, -0.001]])
    computed[0, 1] = -3.0  # nothing recorded: nothing to compare
    check_recorded(recorded, computed, lengths, ["a", "b"], limit=0.0011)
    with pytest.raises(UserError, match=r"row 'a'.*chosen answer is -8.000.*0.0010 nats per token"):
        check_recorded(recorded, computed, lengths, ["a", "b"], limit=0.0009)


def test_a_bad_state_is_never_taken_on(tmp_path: Path, one_device: Mesh) -> None:
    """After the row that breaks it, the checkpoint is that of the step before, and continuing gives the same end."""
    config = base_config(save_steps=100)

    class Poisoned(TinyProcessor):
        def pixel_values(self, prompt: Any) -> np.ndarray:
            pixels = super().pixel_values(prompt)
            return pixels * np.nan if prompt.id == "row-6" else pixels

    pairs = pair_batches(pair_rows(7), Poisoned(), batch_size=4, seed=3)
    first = next(i for i in range(9) if 6 in pairs.dataset[i].row_index)
    messages = []
    for _ in range(2):
        with pytest.raises(UserError, match=f"not finite at step {first + 1}, rows 'row-6'") as caught:
            train(tiny_model(config), pairs, config, output_dir=tmp_path, mesh=one_device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and f"checkpoint of step {first} is from before" in messages[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == [str(first)]
    # What the message says of another learning rate: refused in this folder, and well in another.
    slower = replace(config, learning_rate=config.learning_rate / 2, max_steps=first + 1)
    assert "lower train.learning_rate" in messages[0] and "another name" in messages[0]
    with pytest.raises(UserError, match="other data or settings"):
        train(tiny_model(slower), tiny_pairs(slower), slower, output_dir=tmp_path, mesh=one_device)
    train(tiny_model(slower), tiny_pairs(slower), slower, output_dir=tmp_path / "anew", mesh=one_device)
    # With the row mended, the same folder goes on (its fingerprint knows rows by their ids and answers).
    mended = train(tiny_model(config), tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)
    assert np.isfinite(mended.metrics["loss"]) and mended.steps == 6


def test_a_gradient_that_is_not_finite_stops_too(
    tmp_path: Path, one_device: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays finite: √0, whose derivative is not. Nothing of it reaches the weights."""
    config = base_config(learning_rate=0.0123)  # a program of its own: steps of equal settings are shared

    class Broken(Preference):
        def loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            out = super().loss(model, *args, **kwargs)
            weight = jnp.sum(jnp.abs(model.decoder.layers.mlp.up_proj.lora_b[...]))  # 0 at the start
            return out._replace(loss=out.loss + jnp.sqrt(weight))

    monkeypatch.setitem(OBJECTIVES, "preference", Broken)
    with pytest.raises(UserError, match="the gradient is not finite at step 1, rows") as caught:
        train(tiny_model(config), tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)
    assert "checkpoint of step 0 is from before" in str(caught.value)
    model = tiny_model(config)
    start = split_model(model, config)[1]
    saved = restore_trainable(tmp_path / "checkpoints", start)
    for name, value in split_model(model, config)[1].items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_leaves_without_gradient_are_named(tmp_path: Path, one_device: Mesh) -> None:
    """The tower's last layers do not reach the features that are read: training them is training in name only."""
    config = base_config(objective="sft", max_steps=1, train_vision=True)
    config = replace(config, lora=replace(config.lora, lora_rank=0))
    from m3po_jax.data.batches import sft_batches
    from m3po_jax.data.schema import Image, Prompt

    prompts = [Prompt(f"row-{i}", (Image(path=str(i)),), "what?", reference="abc") for i in range(4)]
    source = sft_batches(prompts, TinyProcessor(), batch_size=4, seed=0)
    train(tiny_model(config), source, config, output_dir=tmp_path, mesh=one_device)
    [line] = read_metrics(tmp_path / "warnings.jsonl")
    assert line["kind"] == "idle" and line["step"] == 1
    assert "vision_tower.post_layernorm.scale" in line["message"]
    assert "patch_embedding" not in line["message"] and "decoder" not in line["message"]


def test_a_reward_model_leaves_the_vocabulary_alone() -> None:
    """Its reward is read from the hidden state, which the head over the vocabulary has no part in."""
    config = base_config(objective="reward")
    config = replace(config, lora=replace(config.lora, lora_rank=0))
    model = attach_head(tiny_model(config))
    learned = set(split_model(model, config)[1])
    assert "decoder.lm_head.kernel" not in learned and {"scalar_head.kernel", "decoder.norm.scale"} <= learned
    assert "decoder.lm_head.kernel" in set(split_model(model, replace(config, objective="sft"))[1])


def falling(count: int, drop: float, growth: float) -> list[dict[str, float]]:
    return [{"step": i, "delta_logps/chosen": -drop, "rewards/margins": growth * i} for i in range(count)]


@pytest.mark.parametrize(("drop", "growth", "warns"), [(0.6, 0.1, True), (0.4, 0.1, False), (0.6, -0.1, False)])
def test_collapse_is_told(drop: float, growth: float, warns: bool) -> None:
    watch = CollapseWatch(0.5, [], warned=False)
    found = [watch.see(line) for line in falling(12, drop, growth)]
    assert [i for i, text in enumerate(found) if text] == ([COLLAPSE_WINDOW - 1] if warns else [])
    if warns:
        assert "0.60 nats per token" in str(found[COLLAPSE_WINDOW - 1]) and "chosen_nll_weight" in str(found[4])
        # A run that continues after step 3 warns at the same line, and not again after it.
        lines = falling(12, drop, growth)
        resumed = CollapseWatch(0.5, lines[:3], warned=False)
        assert [bool(resumed.see(line)) for line in lines[3:6]] == [False, True, False]
        assert not any(CollapseWatch(0.5, lines[:6], warned=True).see(line) for line in lines[6:])
    assert not any(CollapseWatch(0.0, [], warned=False).see(line) for line in falling(12, 9.0, 1.0))


def test_the_loop_writes_the_collapse_down(tmp_path: Path, one_device: Mesh, caplog: Any) -> None:
    """apo_down pushes chosen answers down; the line is for the report, the log for whoever watches."""
    config = base_config(loss_type="apo_down", learning_rate=0.02, max_grad_norm=0.0, max_steps=12, save_steps=50)
    config = replace(config, collapse_warning=0.2)
    train(tiny_model(config), tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["collapse"]
    assert "likelihood displacement" in lines[0]["message"] and "likelihood displacement" in caplog.text
