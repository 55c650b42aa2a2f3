"""The objectives on a model: against transformers and torch, plain two-sequence passes and large batches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from losses_tools import compiled_loss, loss_of, one_step, plain_sums, recorded
from training_tools import CONFIG, IMAGE_ID, TinyProcessor, base_config, pair_rows, tiny_model, tiny_pairs

from m3po_jax.config import TrainConfig
from m3po_jax.data.batches import pair_batches, sft_batches
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.contrastive import ContrastiveBatch
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.errors import UserError
from m3po_jax.models import dual_encoder
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.vit import ViTConfig
from m3po_jax.objectives.contrastive import sigmoid_contrastive_loss
from m3po_jax.objectives.model_passes import adapters_off, reference_sums
from m3po_jax.objectives.registry import check_objective
from m3po_jax.training.step import split_model


def test_shared_prefix_equals_two_sequences() -> None:
    """Value and every gradient of the DPO loss, adapters active."""
    config = base_config(reference="recorded", batch_size=2)
    batch = recorded(next(iter(tiny_pairs(config))))
    model = tiny_model(config)
    partition, trainable, frozen = split_model(model, config)
    trainable = {name: value + 0.1 for name, value in trainable.items()}

    def ours(trainable: Any) -> jax.Array:
        return loss_of(partition.merge(trainable, frozen), batch, config).loss

    def plain(trainable: Any) -> jax.Array:
        sums = plain_sums(partition.merge(trainable, frozen), batch)
        delta = (sums - batch.reference) @ jnp.array([1.0, -1.0])
        return -jnp.mean(jax.nn.log_sigmoid(config.beta * delta))

    value, gradient = jax.jit(jax.value_and_grad(ours))(trainable)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(plain))(trainable)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for name in wanted_gradient:
        # This model amplifies rounding: compiled with and without optimisation, the second gradient moves by 1e-4.
        scale = float(np.abs(wanted_gradient[name]).max())
        np.testing.assert_allclose(gradient[name], wanted_gradient[name], rtol=0, atol=2e-4 * scale, err_msg=name)
        assert np.abs(wanted_gradient[name]).max() > 1e-3


def test_no_logits_over_the_prompt() -> None:
    """Beside the weights, arrays with an axis of the vocabulary belong to answers alone."""
    config = base_config(reference="computed", batch_size=2)
    batch = next(iter(tiny_pairs(config)))
    partition, trainable, frozen = split_model(tiny_model(config), config)

    def loss(trainable: Any) -> jax.Array:
        model = partition.merge(trainable, frozen)
        return loss_of(model, batch, config, reference_model=adapters_off(model)).loss

    program = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    rows, branches, answer = batch.branch_ids.shape
    vocabulary = CONFIG.text.vocab_size
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]+\d*\[([\d,]+)\]", program)}
    logits = {s for s in shapes if s[-1] == vocabulary and len(s) > 2}
    assert (rows, branches * answer, vocabulary) in logits
    assert max(np.prod(s) for s in logits) == rows * branches * answer * vocabulary


def trl_mean_logits(policy: Any, batch: Any) -> dict[str, list[float]]:
    """What `DPOTrainer` averages as ``logits/chosen`` and ``logits/rejected``: its head's numbers, one a token."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(policy, outputs=("log_probs", "mean_logits"))
    found: dict[str, list[float]] = {"logits/chosen": [], "logits/rejected": []}
    for row, branch in np.ndindex(batch.branch_ids.shape[:2]):
        prefix = batch.prefix_ids[row][batch.prefix_mask[row]]
        answer = batch.branch_ids[row, branch][batch.branch_mask[row, branch]]
        ids = torch.tensor(np.concatenate([prefix, answer]))[None].long()
        labels = ids.clone()
        labels[:, : len(prefix)] = -100
        pixels = torch.tensor(batch.images["pixels"][row]).permute(0, 3, 1, 2)
        inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
        out = policy(**inputs, labels=labels, fused_lm_head=True)
        found["logits/rejected" if branch else "logits/chosen"] += out.mean_logits[out.label_mask].tolist()
    return found


def test_whole_step_equals_torch(tmp_path: Path) -> None:
    """DPO on a transformers checkpoint: loss, rewards and gradients equal torch's on the same pairs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    from trl.trainer.utils import entropy_from_logits

    from m3po_jax.models.registry import load_model

    torch.set_num_threads(1)
    entropies: list[float] = []
    hits: list[bool] = []
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    settings = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID)

    def random_model(seed: int) -> Any:
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    policy, reference = random_model(0), random_model(1)
    policy.save_pretrained(tmp_path)
    config = replace(
        base_config(reference="recorded", batch_size=3, beta=0.3),
        lora=replace(base_config().lora, lora_rank=0),
    )
    batch = next(iter(tiny_pairs(config)))

    def sums(model: Any) -> Any:
        rows = []
        entropies.clear()
        hits.clear()
        for row in range(3):
            prefix = batch.prefix_ids[row][batch.prefix_mask[row]]
            pixels = torch.tensor(batch.images["pixels"][row]).permute(0, 3, 1, 2)
            for branch in range(2):
                answer = batch.branch_ids[row, branch][batch.branch_mask[row, branch]]
                ids = torch.tensor(np.concatenate([prefix, answer]))[None].long()
                logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
                log_probs = logits[0, len(prefix) - 1 : -1].log_softmax(-1)
                entropies.extend(entropy_from_logits(logits[0, len(prefix) - 1 : -1].detach()).tolist())
                hits.extend((log_probs.argmax(-1).numpy() == answer).tolist() if branch == 0 else [])
                rows.append(log_probs.gather(1, torch.tensor(answer).long()[:, None]).sum())
        return torch.stack(rows).reshape(3, 2)

    reference_sums = sums(reference).detach()
    ratios = sums(policy) - reference_sums
    loss = -torch.nn.functional.logsigmoid(config.beta * (ratios[:, 0] - ratios[:, 1])).mean()
    loss.backward()

    model = load_model(tmp_path, dtype="float32", param_dtype="float32").model
    partition, trainable, frozen = split_model(model, config)
    given = batch._replace(reference=reference_sums.numpy())

    def ours(trainable: Any) -> Any:
        out = loss_of(partition.merge(trainable, frozen), given, config)
        return out.loss, (out.metrics, out.token_sums)

    (value, (metrics, token_sums)), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(trainable)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    rewards = config.beta * ratios.detach().numpy()
    np.testing.assert_allclose(metrics["rewards/chosen"], rewards[:, 0].mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], (rewards[:, 0] > rewards[:, 1]).mean(), rtol=1e-6)
    for name, values in {"entropy": entropies, "mean_token_accuracy": hits}.items():
        total, count = token_sums[name]
        assert count == len(values)
        np.testing.assert_allclose(total / count, np.mean(values), rtol=1e-5, err_msg=name)
    for name, values in trl_mean_logits(policy, batch).items():
        total, count = token_sums[name]
        assert count == len(values)
        np.testing.assert_allclose(total / count, np.mean(values), rtol=1e-4, atol=1e-6, err_msg=name)
    theirs = dict(policy.named_parameters())
    head = next(value for name, value in theirs.items() if name.endswith("lm_head.weight"))
    projector = next(value for name, value in theirs.items() if name.endswith("linear_1.weight"))
    for name, parameter in {"decoder.lm_head.kernel": head, "projector.linear_1.kernel": projector}.items():
        np.testing.assert_allclose(gradient[name], parameter.grad.numpy().T, rtol=1e-3, atol=1e-5)
        assert np.abs(gradient[name]).max() > 1e-3


def test_reference_is_the_model_without_adapters() -> None:
    """Computed where recorded sums are missing or not wanted, and free of gradient."""
    config = base_config(reference="recorded")
    batch = recorded(next(iter(tiny_pairs(config))))
    batch.reference[1] = np.nan
    model = tiny_model(config)
    partition, trainable, frozen = split_model(model, config)
    active = {name: value + 0.1 for name, value in trainable.items()}
    expected = plain_sums(partition.merge(trainable, frozen), batch)

    graph, weights = nnx.split(partition.merge(active, frozen))
    computed = jax.jit(lambda w, b: reference_sums(adapters_off(nnx.merge(graph, w)), b))(weights, batch)
    np.testing.assert_allclose(computed, expected, rtol=1e-4)

    def loss(reference: str, given: TreeBatch, with_model: bool = True) -> float:
        settings = replace(config, reference=reference)
        reference_model = adapters_off(partition.merge(active, frozen)) if with_model else None
        out = compiled_loss(partition.merge(active, frozen), given, settings, reference_model=reference_model)
        return float(out.loss)

    mixed = batch._replace(reference=np.where(np.isnan(batch.reference), expected, batch.reference))
    assert loss("recorded", batch) == pytest.approx(loss("recorded", mixed, with_model=False), rel=1e-4)
    full = batch._replace(reference=np.asarray(expected))
    assert loss("computed", batch) == pytest.approx(loss("recorded", full, with_model=False), rel=1e-4)


def test_chosen_nll_is_added() -> None:
    config = base_config(reference="recorded")
    batch = recorded(next(iter(tiny_pairs(config))))
    model = tiny_model(config)
    plain = compiled_loss(model, batch, config)
    anchored = compiled_loss(model, batch, replace(config, chosen_nll_weight=0.5))
    expected = -plain_sums(model, batch)[:, 0].sum() / batch.branch_mask[:, 0].sum()
    np.testing.assert_allclose(plain.metrics["nll/chosen"], expected, rtol=1e-4)
    np.testing.assert_allclose(anchored.loss - plain.loss, 0.5 * expected, rtol=1e-4)


def sft_source(config: TrainConfig) -> Any:
    prompts = [Prompt(f"p{i}", (Image(path=str(i)),), "say", reference="answer!"[: 1 + i % 7]) for i in range(9)]
    return sft_batches(prompts, TinyProcessor(), batch_size=config.batch_size, seed=1)


def dual_model() -> Any:
    encoder = EncoderConfig(16, 32, num_layers=1, num_heads=2, activation="gelu")
    return dual_encoder.build(
        dual_encoder.DualEncoderConfig(
            "siglip",
            ViTConfig("siglip", encoder, image_size=8, patch_size=4),
            dual_encoder.TextConfig(encoder, vocab_size=32, max_positions=4, eos_token_id=1),
            projection_size=16,
        ),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )


def contrastive_batch(images: int = 4, texts: int = 5) -> ContrastiveBatch:
    rng = np.random.default_rng(0)
    return ContrastiveBatch(
        pixel_values=rng.normal(size=(images, 8, 8, 3)).astype(np.float32),
        labels=np.where(rng.random((images, texts)) < 0.4, 1, -1).astype(np.int32),
        text_ids=rng.integers(2, 32, (texts, 4)).astype(np.int32),
        text_mask=np.ones((texts, 4), bool),
        row_index=np.arange(images, dtype=np.int32),
    )


@pytest.mark.parametrize("objective", ["preference", "sft", "contrastive"])
def test_accumulation_equals_the_large_batch(objective: str, one_device: Mesh) -> None:
    """Answers of different lengths, so that a mean of micro-batch token means would differ."""
    config = base_config(objective=objective, reference="recorded", chosen_nll_weight=0.3)
    if objective == "contrastive":
        model, batch = dual_model(), contrastive_batch()
    else:
        model = tiny_model(config)
        grouped = {"length_window": 2, "max_shapes": 2}
        source = tiny_pairs(config, **grouped) if objective == "preference" else sft_source(config)
        batch = recorded(next(iter(source)))
    whole = one_step(model, batch, config, one_device)
    split = one_step(model, batch, replace(config, gradient_accumulation_steps=2), one_device)
    for name, value in whole[0].items():
        np.testing.assert_allclose(split[0][name], value, rtol=1e-4, atol=5e-6, err_msg=name)
    for name, value in whole[1].items():
        np.testing.assert_allclose(split[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(split[2], whole[2], rtol=1e-4)


def test_sft_is_the_token_mean() -> None:
    config = base_config(objective="sft")
    model, batch = tiny_model(config), next(iter(sft_source(config)))
    expected = -plain_sums(model, batch).sum() / batch.branch_mask.sum()
    np.testing.assert_allclose(compiled_loss(model, batch, config).loss, expected, rtol=1e-5)


def test_contrastive_is_siglips_loss() -> None:
    model, batch = dual_model(), contrastive_batch()
    out = loss_of(model, batch, base_config(objective="contrastive"))
    images = model.encode_image(batch.pixel_values)[:, 0]
    texts = model.encode_text(batch.text_ids, batch.text_mask)
    scale, bias = jnp.exp(model.logit_scale[...]), model.logit_bias[...]
    expected = sigmoid_contrastive_loss(scale * images @ texts.T + bias, batch.labels).mean()
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
    # SigLIP starts at bias −10: every pair is called false.
    assert out.metrics["recall"] == 0.0
    np.testing.assert_allclose(out.metrics["accuracy"], (batch.labels < 0).mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "preferense"}, "did you mean 'preference'"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"gradient_accumulation_steps": 3}, "does not divide"),
        ({"loss_type": "aot", "gradient_accumulation_steps": 2}, "couples the rows"),
        ({"reference": "guessed"}, "computed, recorded"),
        ({"train_vision": True}, "sft only"),
    ],
)
def test_senseless_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(base_config(**changes))


def test_vision_tower_learns_only_when_asked() -> None:
    for train_vision in (False, True):
        config = base_config(objective="sft", train_vision=train_vision)
        names = split_model(tiny_model(config), config)[1]
        assert any(name.startswith("vision_tower") for name in names) is train_vision
        assert not any(name.startswith("projector") for name in names)


def test_trainable_leaves_are_float32_copies() -> None:
    from m3po_jax.models.llava.model import build

    config = replace(base_config(), lora=replace(base_config().lora, lora_rank=0))
    model = build(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    _, trainable, frozen = split_model(model, config)
    assert {value.dtype for value in trainable.values()} == {jnp.dtype("float32")}
    assert {v[...].dtype for _, v in nnx.to_flat_state(frozen)} == {jnp.dtype("bfloat16")}


def test_text_only_pairs() -> None:
    config = base_config(reference="recorded", batch_size=2)
    pairs = pair_batches(pair_rows(2, images=0), TinyProcessor(), batch_size=2, seed=0)
    batch = recorded(next(iter(pairs)))
    assert batch.images is None
    assert np.isfinite(compiled_loss(tiny_model(config), batch, config).loss)
