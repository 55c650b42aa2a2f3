"""Pooling by patches: late interaction computed from transformers' CLIP, patch by patch."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import dual_encoder, images, torch_and_transformers

from m3po_jax.errors import UserError
from m3po_jax.models.dual_encoder import dual_encoder_config
from m3po_jax.models.registry import load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> tuple[Any, Any, float]:
    """A transformers CLIP, and ours from the same weights and a trained bias."""
    from safetensors.numpy import load_file, save_file

    folder, bias = tmp_path_factory.mktemp("clip"), -1.75
    theirs = dual_encoder("clip", seed=5)
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"m3po_pooling": "patches"}))
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"logit_bias": np.array([bias], np.float32)}, file, metadata={"format": "pt"})
    return theirs, load_model(folder, dtype="float32", param_dtype="float32").model, bias


def test_patches_equal_a_sum_over_transformers_patches(models: Any) -> None:
    torch, _ = torch_and_transformers()
    theirs, ours, bias = models
    pixels = images(3)
    ids = np.array([[1, 4, 9, 63] + [0] * 8, [1, 5, 63] + [0] * 9])
    mask = np.arange(12) < np.array([[4], [3]])
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}
        text = theirs(**inputs, pixel_values=torch.tensor(pixels)).text_embeds.numpy()
        hidden = theirs.vision_model(torch.tensor(pixels)).last_hidden_state[:, 1:]
        patches = theirs.visual_projection(theirs.vision_model.post_layernorm(hidden)).numpy()
    patches = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    cosine = np.einsum("bne,ce->bcn", patches, text).astype(np.float64)
    expected = np.log(np.exp(cosine * np.exp(theirs.logit_scale.item())).sum(-1)) + bias
    image = ours.encode_image(jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    assert image.shape == (3, 4, 20)
    np.testing.assert_allclose(np.asarray(image), patches, atol=1e-5)
    found = np.asarray(ours.logits(image, ours.encode_text(jnp.asarray(ids), jnp.asarray(mask))))
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_logits_are_between_the_best_patch_and_n_times_it(models: Any) -> None:
    _, ours, bias = models
    rng = np.random.default_rng(0)
    unit = lambda *shape: (x := rng.normal(size=(*shape, 20))) / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    image, text = unit(5, 7), unit(6)
    scale = float(np.exp(ours.logit_scale[...])[0])
    best = scale * np.einsum("bne,ce->bcn", image, text).max(-1) + bias
    logits = np.asarray(ours.logits(jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32)))
    assert (logits > best - 1e-4).all() and (logits < best + np.log(7) + 1e-4).all()
    shuffled = np.asarray(ours.logits(jnp.asarray(image[:, ::-1], jnp.float32), jnp.asarray(text, jnp.float32)))
    np.testing.assert_allclose(logits, shuffled, atol=1e-5)


def test_untrained_patches_start_improbable(tmp_path: Any) -> None:
    """At the start every pair has about σ(−4), whatever the number of patches."""
    config = dual_encoder("clip").config.to_dict() | {"m3po_pooling": "patches"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path, dtype="float32", param_dtype="float32", init="random")
    assert loaded.config.pooling == "patches"
    assert dual_encoder_config(config | {"m3po_pooling": "pooled"}, "x").pooling == "pooled"
    assert float(loaded.model.logit_bias[...][0]) == pytest.approx(-4 - np.log(4))


def test_an_unknown_pooling_is_refused() -> None:
    config = dual_encoder("clip").config.to_dict() | {"m3po_pooling": "patch"}
    with pytest.raises(UserError, match=r"config\.json.*'patch' is unknown.*patches"):
        dual_encoder_config(config, "config.json")
