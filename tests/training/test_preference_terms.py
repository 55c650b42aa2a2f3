"""Preference options that need the model: mixtures, LD-DPO, mDPO's terms, what the text alone teaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from losses_tools import compiled_loss, loss_of, one_step, plain_sums, recorded
from training_tools import base_config, tiny_model, tiny_pairs

from m3po_jax.data.collation import TreeBatch
from m3po_jax.errors import UserError
from m3po_jax.objectives.model_passes import adapters_off, text_only_accuracies
from m3po_jax.objectives.registry import check_objective, objective_of
from m3po_jax.training.harm import make_harm_metrics
from m3po_jax.training.loop import train
from m3po_jax.training.step import split_model
from m3po_jax.workspace.metrics_log import read_metrics

MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


def active_and_base(config: Any) -> tuple[Any, Any]:
    """A model whose adapters say something, and the same model without them."""
    partition, trainable, frozen = split_model(tiny_model(config), config)
    active = {name: value + 0.1 for name, value in trainable.items()}
    return partition.merge(active, frozen), partition.merge(trainable, frozen)


def corrupted(batch: TreeBatch, corruption: str) -> TreeBatch:
    pixels = batch.images["pixels"]
    return with_pixels(batch, np.zeros_like(pixels) if corruption == "blank" else np.roll(pixels, 1, 0))


def with_pixels(batch: TreeBatch, pixels: np.ndarray) -> TreeBatch:
    return batch._replace(images=batch.images | {"pixels": pixels})


def log_sigmoid(x: Any) -> np.ndarray:
    return -np.logaddexp(0.0, -np.asarray(x, np.float64))


@pytest.mark.parametrize("corruption", ["blank", "swap"])
def test_mdpos_terms_on_a_model(corruption: str) -> None:
    """Against plain passes with the corrupted image; recorded sums serve the real one."""
    config = base_config(
        reference="recorded",
        conditional_weight=0.7,
        conditional_image=corruption,
        anchor_weight=0.3,
        anchor_delta=0.2,
    )
    batch = recorded(next(iter(tiny_pairs(config))))
    model, base = active_and_base(config)
    out = compiled_loss(model, batch, config)
    bad = corrupted(batch, corruption)
    policy, reference = np.asarray(plain_sums(model, batch)), batch.reference
    chosen = policy[:, 0] - reference[:, 0]
    logits = chosen - (plain_sums(model, bad) - plain_sums(base, bad))[:, 0]
    assert np.abs(logits - chosen).max() > 0.1
    main = -log_sigmoid(config.beta * (policy - reference) @ np.array([1.0, -1.0]))
    conditional, anchor = -log_sigmoid(config.beta * logits), -log_sigmoid(config.beta * chosen - 0.2)
    np.testing.assert_allclose(out.row_losses, main + 0.7 * conditional + 0.3 * anchor, rtol=1e-4)
    np.testing.assert_allclose(out.loss, np.mean(out.row_losses), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["loss/preference"], main.mean(), rtol=1e-4)
    np.testing.assert_allclose(out.metrics["loss/conditional"], conditional.mean(), rtol=1e-4)
    np.testing.assert_allclose(out.metrics["rewards/conditional_margins"], config.beta * logits.mean(), rtol=1e-3)
    np.testing.assert_allclose(out.metrics["rewards/conditional_accuracies"], (logits > 0).mean())
    np.testing.assert_allclose(out.metrics["loss/anchor"], anchor.mean(), rtol=1e-4)


def test_own_reference_has_no_gradient() -> None:
    """The policy without its adapters gives the loss and the gradient that a separate reference model gives."""
    config = base_config(conditional_weight=1.0, ld_alpha=0.5, batch_size=2)
    batch = recorded(next(iter(tiny_pairs(config))))
    partition, trainable, frozen = split_model(tiny_model(config), config)
    active = {name: value + 0.1 for name, value in trainable.items()}

    def loss(trainable: Any, separate: bool) -> jax.Array:
        settings = replace(config, reference="recorded")
        reference = adapters_off(partition.merge(active, frozen)) if separate else None
        return loss_of(partition.merge(trainable, frozen), batch, settings, reference_model=reference).loss

    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, False)))(active)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, True)))(active)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for name in gradient:
        np.testing.assert_allclose(gradient[name], wanted_gradient[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("on_reference", [True, False])
def test_length_desensitised_on_a_model(on_reference: bool) -> None:
    """α·(whole answers) + (1 − α)·(answers cut at the shorter one's length), from plain passes."""
    config = base_config(reference="recorded", ld_alpha=0.3, ld_alpha_reference=on_reference, chosen_nll_weight=0.5)
    batch = recorded(next(iter(tiny_pairs(config))))
    lengths = batch.branch_mask.sum(-1)
    assert (lengths[:, 0] != lengths[:, 1]).any()
    places = np.arange(batch.branch_mask.shape[-1])
    cut = batch._replace(branch_mask=batch.branch_mask & (places < lengths.min(1)[:, None, None]))
    model, base = active_and_base(config)

    def desensitised(model: Any) -> np.ndarray:
        return np.asarray(0.3 * plain_sums(model, batch) + 0.7 * plain_sums(model, cut))

    ratios = desensitised(model) - (desensitised(base) if on_reference else batch.reference)
    out = compiled_loss(model, batch, config)
    np.testing.assert_allclose(out.row_losses, -log_sigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])), rtol=1e-4)
    np.testing.assert_allclose(out.metrics["rewards/chosen"], 0.1 * ratios[:, 0].mean(), rtol=1e-3)
    # Displacement and NLL are of the answers as they are.
    plain = np.asarray(plain_sums(model, batch))
    np.testing.assert_allclose(out.metrics["logps/chosen"], plain[:, 0].mean(), rtol=1e-4)
    delta = ((plain - batch.reference) / lengths)[:, 0].mean()
    np.testing.assert_allclose(out.metrics["delta_logps/chosen"], delta, rtol=1e-3)
    nll = -plain[:, 0].sum() / lengths[:, 0].sum()
    np.testing.assert_allclose(out.loss, np.mean(out.row_losses) + 0.5 * nll, rtol=1e-4)


def test_mixture_and_divergence_reach_the_loss() -> None:
    config = base_config(reference="recorded", f_divergence_type="js_divergence")
    batch = recorded(next(iter(tiny_pairs(config))))
    model, _ = active_and_base(config)
    ratios = np.asarray(plain_sums(model, batch) - batch.reference, np.float64)
    scores = np.log(2) + log_sigmoid(ratios)
    expected = -log_sigmoid(config.beta * (scores[:, 0] - scores[:, 1]))
    mixed = replace(config, loss_type="mixture", loss_weights={"sigmoid": 0.8, "sft": 1.0})
    out = compiled_loss(model, batch, mixed)
    np.testing.assert_allclose(out.loss, 0.8 * expected.mean() + out.metrics["nll/chosen"], rtol=1e-4)


def test_scalars_reach_the_loss() -> None:
    config = base_config(reference="recorded", loss_type="simpo", simpo_gamma=1.5)
    batch = recorded(next(iter(tiny_pairs(config))))
    model, _ = active_and_base(config)
    means = np.asarray(plain_sums(model, batch)) / batch.branch_mask.sum(-1)
    out = compiled_loss(model, batch, config)
    np.testing.assert_allclose(out.row_losses, -log_sigmoid(0.1 * (means[:, 0] - means[:, 1]) - 1.5), rtol=1e-4)
    ratios = np.asarray(plain_sums(model, batch) - batch.reference, np.float64)
    logits = 0.1 * (ratios[:, 0] - ratios[:, 1])
    gate = 1 / (1 + np.exp(-logits / 2.0))
    out = compiled_loss(model, batch, replace(config, loss_type="discopop", discopop_tau=2.0))
    np.testing.assert_allclose(out.row_losses, -log_sigmoid(logits) * (1 - gate) + np.exp(-logits) * gate, rtol=1e-4)


def test_terms_accumulate_to_the_large_batch(one_device: Mesh) -> None:
    config = base_config(reference="recorded", conditional_weight=0.7, anchor_weight=0.3, ld_alpha=0.5)
    batch = recorded(next(iter(tiny_pairs(config))))
    model = tiny_model(config)
    whole = one_step(model, batch, config, one_device)
    split = one_step(model, batch, replace(config, gradient_accumulation_steps=2), one_device)
    for found, wanted in ((split[0], whole[0]), (split[1], whole[1])):
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(split[2], whole[2], rtol=1e-4)


def test_text_only_accuracies_are_those_of_other_images() -> None:
    config = base_config()
    batch = next(iter(tiny_pairs(config)))
    model, base = active_and_base(config)
    found = text_only_accuracies(model, batch, reference_model=adapters_off(model))
    for corruption in ("blank", "swap"):
        bad = corrupted(batch, corruption)
        ratios = plain_sums(model, bad) - plain_sums(base, bad)
        assert np.abs(ratios[:, 0] - ratios[:, 1]).min() > 1e-3  # no tie decides
        np.testing.assert_allclose(found[f"rewards/accuracies_{corruption}"], np.mean(ratios[:, 0] > ratios[:, 1]))
    one_row = jax.tree.map(lambda x: x[:1], batch)
    assert set(text_only_accuracies(model, one_row, reference_model=base)) == {"rewards/accuracies_blank"}
    assert text_only_accuracies(model, batch._replace(images=None), reference_model=base) == {}


def test_text_only_accuracies_under_accumulation(one_device: Mesh) -> None:
    """The mean over micro-batches; each swaps images among its own rows, every second one of the batch."""
    config = base_config(gradient_accumulation_steps=2)
    batch = next(iter(tiny_pairs(config)))
    partition, trainable, frozen = split_model(tiny_model(config), config)
    active = {name: value + 0.1 for name, value in trainable.items()}
    measure = make_harm_metrics(partition, 2, objective_of(config).shared_fields, one_device)
    found = measure(active, frozen, None, batch)
    model, base = partition.merge(active, frozen), partition.merge(trainable, frozen)
    for corruption, pixels in (("blank", batch.images["pixels"] * 0), ("swap", batch.images["pixels"][[2, 3, 0, 1]])):
        bad = with_pixels(batch, pixels)
        ratios = plain_sums(model, bad) - plain_sums(base, bad)
        np.testing.assert_allclose(found[f"rewards/accuracies_{corruption}"], np.mean(ratios[:, 0] > ratios[:, 1]))


def test_everything_at_once_in_the_loop(tmp_path: Path, one_device: Mesh) -> None:
    """No guard mistakes the options for a foreign reference, and measuring changes nothing that is learned."""
    config = base_config(
        loss_type="mixture",
        loss_weights=MPO,
        ld_alpha=0.5,
        ld_alpha_reference=False,
        conditional_weight=1.0,
        conditional_image="swap",
        anchor_weight=1.0,
        harm_metrics_steps=2,
        max_steps=3,
        log_steps=5,
    )
    lines = {}
    for steps in (0, 2):
        settings, folder = replace(config, harm_metrics_steps=steps), tmp_path / str(steps)
        result = train(tiny_model(config), tiny_pairs(config), settings, output_dir=folder, mesh=one_device)
        lines[steps] = {line["step"]: line for line in read_metrics(result.metrics_path)}
    assert set(lines[0]) == {3} and set(lines[2]) == {2, 3}
    assert lines[0][3] == lines[2][3]
    assert {"rewards/accuracies_blank", "rewards/accuracies_swap"} <= set(lines[2][2])
    assert not any("accuracies_blank" in name for name in lines[2][3])


def test_first_loss_is_ln_2_only_where_the_sums_are_alike(tmp_path: Path, one_device: Mesh) -> None:
    """LD-DPO on the policy alone does not start at ln 2, and is not refused for it."""
    options = {"ld_alpha": 0.5, "max_steps": 1}
    for on_reference in (True, False):
        config = base_config(ld_alpha_reference=on_reference, **options)
        assert ("loss/preference" in objective_of(config).first_values(0.02)) is on_reference
        folder = tmp_path / str(on_reference)
        result = train(tiny_model(config), tiny_pairs(config), config, output_dir=folder, mesh=one_device)
        near = bool(abs(result.metrics["loss/preference"] - np.log(2)) < 1e-5)
        assert near is on_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "mixture"}, "positive weight"),
        ({"loss_weights": MPO}, "train.loss_type=mixture"),
        (
            {"loss_type": "mixture", "loss_weights": {"sigmoid": 1.0, "aot": 1.0}, "gradient_accumulation_steps": 2},
            "'aot' couples the rows",
        ),
        ({"ld_alpha": 1.5}, r"ld_alpha: must be in \[0, 1\], not 1\.5"),
        ({"ld_alpha": float("nan")}, r"ld_alpha: must be a finite number in \[0, 1\], not nan"),
        ({"ld_alpha": 0.5, "loss_type": "simpo"}, "no meaning for loss 'simpo'"),
        ({"f_divergence_type": "js_divergense"}, "did you mean 'js_divergence'"),
        ({"f_alpha_divergence_coef": float("inf")}, "f_alpha_divergence_coef: must be a finite number"),
        ({"conditional_weight": -1.0}, "conditional_weight: must be in"),
        ({"anchor_weight": float("nan")}, "anchor_weight: must be a finite number"),
        ({"anchor_delta": float("nan")}, "anchor_delta: must be a finite number"),
        ({"harm_metrics_steps": -1}, "harm_metrics_steps: must be in"),
        ({"conditional_image": "noise"}, "blank, swap"),
        ({"conditional_weight": 1.0, "conditional_image": "swap", "batch_size": 1}, "batch of one"),
        (
            {"conditional_weight": 1.0, "conditional_image": "swap", "gradient_accumulation_steps": 2},
            "'swap' couples the rows",
        ),
    ],
)
def test_senseless_terms_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(base_config(**changes))


@pytest.mark.parametrize("option", [{"ld_alpha": 0.5}, {"conditional_weight": 1.0}, {"harm_metrics_steps": 5}])
def test_reference_is_asked_for_where_more_than_adapters_learns(option: dict[str, Any]) -> None:
    config = base_config(reference="recorded", **option)
    check_objective(config)
    for lora in (replace(config.lora, lora_rank=0), replace(config.lora, train_projector=True)):
        with pytest.raises(UserError, match="set it to computed"):
            check_objective(replace(config, lora=lora))
        check_objective(replace(config, lora=lora, reference="computed"))
    # The record serves LD-DPO on the policy alone.
    if "ld_alpha" in option:
        check_objective(replace(config, ld_alpha_reference=False, lora=replace(config.lora, lora_rank=0)))
