"""Idefics3's and SmolVLM's stored tensors, by the names that every version of transformers writes."""

from __future__ import annotations

from m3po_jax.models import tensor_names
from m3po_jax.models.idefics3.config import Idefics3Config
from m3po_jax.models.tensor_map import Path, Source

PROJECTOR = "model.connector.modality_projection"


def canonical_name(name: str) -> str | None:
    """The stored name itself; None: a buffer of older versions, which nothing needs."""
    return None if name.endswith((".rotary_emb.inv_freq", ".position_ids")) else name


def tensor_map(config: Idefics3Config) -> dict[Path, Source]:
    """The stored tensor of every parameter."""
    return {
        **tensor_names.decoder(config.text, ("decoder",), "model.text_model", "lm_head"),
        **tensor_names.linear(("projector", "proj"), f"{PROJECTOR}.proj", bias=False),
        **tensor_names.vision_transformer(config.vision, ("vision_tower",), "model.vision_model", pooled=False),
    }
