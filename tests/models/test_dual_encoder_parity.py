"""CLIP and SigLIP against transformers in float32: embeddings of both sides and logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import dual_encoder, images, saved, torch_and_transformers

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "clip_gelu": ("clip", {"text": {"hidden_act": "gelu"}, "projection_dim": 8}),
    "clip_before_4_31": ("clip", {"text": {"eos_token_id": 2}}),
    "siglip": ("siglip", {}),
    "siglip_projection": ("siglip", {"text": {"projection_size": 32}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_embeddings_and_logits_equal_transformers(name: str, tmp_path: Any, record_property: Any) -> None:
    torch, _ = torch_and_transformers()
    kind, variant = VARIANTS[name]
    model = dual_encoder(kind, seed=len(name), **variant)
    loaded = saved(model, tmp_path)
    ids = np.full((3, 12), 0)
    for row, length in enumerate((12, 5, 8)):  # EOS is 63, the highest id, as in CLIP's vocabulary
        ids[row, :length] = [1, *range(4 + row, 2 + row + length), 63]
    mask = np.arange(12) < np.array([[12], [5], [8]])
    pixels = images(4)
    inputs = {"input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pixels)}
    if kind == "clip":
        inputs["attention_mask"] = torch.tensor(mask.astype(int))
    with torch.no_grad():
        expected = model(**inputs)

    @nnx.jit
    def ours(model: nnx.Module, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        image, text = model.encode_image(pixels), model.encode_text(ids, mask)
        return image[:, 0], text, model.logits(image, text)

    found = ours(loaded.model, jnp.asarray(pixels.transpose(0, 2, 3, 1)), jnp.asarray(ids), jnp.asarray(mask))
    for key, mine in zip(("image_embeds", "text_embeds", "logits_per_image"), found, strict=True):
        theirs = getattr(expected, key).numpy()
        worst = float(np.abs(np.asarray(mine) - theirs).max())
        record_property(key, worst)
        assert np.ptp(theirs) > 1e-2, "the oracle must carry a signal"
        assert worst < 1e-4, (key, worst)
