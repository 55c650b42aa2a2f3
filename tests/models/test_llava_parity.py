"""LLaVA against transformers in float32: tower features, logits, per-token log-probs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import IMAGE, PATCHES, images, llava, saved, torch_and_transformers
from model_inputs import encoded

from m3po_jax.models.forward import branch_log_probs, reference_forward

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"text": {"num_key_value_heads": 2}},
    "mqa": {"text": {"num_key_value_heads": 1}},
    "tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "wide_heads": {"text": {"head_dim": 16}},
    "narrow_heads": {"text": {"head_dim": 4, "num_key_value_heads": 2}},
    "rope_theta": {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
    "eps": {"text": {"rms_norm_eps": 1e-2}, "vision": {"layer_norm_eps": 1e-2, "hidden_act": "gelu"}},
    "last_layer": {"vision_feature_layer": -1},
    "first_layer": {"vision_feature_layer": 1},
    "layer_list": {"vision_feature_layer": [-2, 1, 0]},
    "full": {"vision_feature_select_strategy": "full"},
    "no_projector_bias": {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    "more_patches": {"vision": {"image_size": 30, "patch_size": 10}},
    "one_layer": {
        "text": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    },
}

ANSWERS = np.array([[[5, 9, 2], [8, 8, 0]], [[3, 2, 0], [4, 5, 6]], [[7, 2, 0], [1, 2, 3]]])
ANSWER_MASK = np.arange(3) < np.array([[3, 2], [2, 3], [2, 3]])[..., None]


def rows(per_image: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Two images in one row, text only, one image; padded on `side`. Returns token ids and mask."""
    span = [IMAGE] * per_image
    lines = [[1, *span, 13, *span, 7, 8], [1, 5, 6, 7], [1, 9, *span, 11, 12, 2]]
    width = max(map(len, lines))
    ids, mask = np.zeros((3, width), int), np.zeros((3, width), int)
    for i, line in enumerate(lines):
        place = slice(width - len(line), width) if side == "left" else slice(0, len(line))
        ids[i, place], mask[i, place] = line, 1
    return ids, mask


def oracle(model: Any, ids: np.ndarray, mask: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
    torch, _ = torch_and_transformers()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            pixel_values=None if pixels is None else torch.tensor(pixels),
        ).logits.numpy()


def pixel_rows(pixels: np.ndarray) -> jnp.ndarray:
    """[3 rows, 2 images, h, w, 3]: the layout of `rows`, rows with fewer images padded with zeros."""
    ours = np.zeros((3, 2, *pixels.shape[2:], 3), np.float32)
    channels_last = pixels.transpose(0, 2, 3, 1)
    ours[0, 0], ours[0, 1], ours[2, 0] = channels_last
    return jnp.asarray(ours)


@pytest.mark.parametrize("name", VARIANTS)
def test_features_logits_and_log_probs_equal_transformers(name: str, tmp_path: Any, record_property: Any) -> None:
    torch, _ = torch_and_transformers()
    variant = VARIANTS[name]
    model = llava(seed=len(name), **variant)
    loaded = saved(model, tmp_path)
    per_image = loaded.config.tokens_per_image
    pixels = images(3, variant.get("vision", {}).get("image_size", 28))

    @nnx.jit
    def ours(model: nnx.Module, ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> tuple[jax.Array, ...]:
        features = encoded(model, pixels)
        logits = reference_forward(model, ids, mask, features)
        branches = (jnp.asarray(ANSWERS), jnp.asarray(ANSWER_MASK))
        return features.features, logits, branch_log_probs(model, ids, mask, features, *branches)

    with torch.no_grad():
        layer = variant.get("vision_feature_layer", -2)
        states = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
        tower = torch.cat([states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1).numpy()
    if not loaded.config.keep_class_token:
        tower = tower[:, 1:]

    worst = {}
    for side in ("left", "right"):
        ids, mask = rows(per_image, side)
        valid = mask.astype(bool)
        features, logits, log_probs = map(
            np.asarray, ours(loaded.model, jnp.asarray(ids), jnp.asarray(valid), pixel_rows(pixels))
        )
        found = np.stack([features[0, :per_image], features[0, per_image:], features[2, :per_image]])
        worst["features"] = np.abs(found - tower).max()
        expected = oracle(model, ids, mask, pixels)
        assert np.abs(expected).max() > 0.1, "the oracle's logits must carry a signal"
        worst[f"logits_{side}"] = np.abs(logits - expected)[valid].max()
        worst[f"log_probs_{side}"] = np.abs(log_probs - teacher_forced(model, ids, mask, pixels)).max()
    for key, value in worst.items():
        record_property(key, float(value))
    assert max(worst.values()) < 1e-4, worst


def teacher_forced(model: Any, ids: np.ndarray, mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Each (prompt, answer) alone, unpadded, through transformers; zeros after an answer's end."""
    torch, _ = torch_and_transformers()
    expected = np.zeros(ANSWERS.shape, np.float32)
    of_row = [pixels[:2], None, pixels[2:]]
    for row, branch in np.ndindex(*ANSWERS.shape[:2]):
        prompt = ids[row][mask[row] == 1]
        answer = ANSWERS[row, branch][ANSWER_MASK[row, branch]]
        line = np.concatenate([prompt, answer])[None]
        logits = oracle(model, line, np.ones_like(line), of_row[row])[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        expected[row, branch, : len(answer)] = log_probs[np.arange(len(answer)), answer]
    return expected


def test_text_only_batches_need_no_images(tmp_path: Any) -> None:
    model = llava()
    loaded = saved(model, tmp_path)
    ids = np.array([[1, 5, 6, 7], [1, 8, 9, 2]])
    logits = nnx.jit(reference_forward)(loaded.model, jnp.asarray(ids), jnp.ones(ids.shape), None)
    np.testing.assert_allclose(logits, oracle(model, ids, np.ones_like(ids), None), atol=1e-4)


def test_image_order_matters(tmp_path: Any) -> None:
    """Guards the comparison itself: swapping a row's images must show in the logits."""
    loaded = saved(llava(), tmp_path)
    ids, mask = map(jnp.asarray, rows(PATCHES, "right"))
    pixels = pixel_rows(images(3))
    forward = nnx.jit(lambda model, x: reference_forward(model, ids, mask, encoded(model, x)))
    difference = forward(loaded.model, pixels) - forward(loaded.model, pixels[:, ::-1])
    assert float(jnp.abs(difference).max()) > 1e-2
