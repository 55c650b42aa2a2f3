"""Gemma 3's stored tensors. The canonical layout is the published one (``language_model.model.…``), LLaVA's own."""

from __future__ import annotations

from m3po_jax.models import tensor_names
from m3po_jax.models.gemma3.config import Gemma3Config
from m3po_jax.models.tensor_map import Path, Source

_PROJECTOR = "multi_modal_projector"


def tensor_map(config: Gemma3Config) -> dict[Path, Source]:
    """The canonical stored tensor of every parameter."""
    return {
        **tensor_names.decoder(config.text, ("decoder",), "language_model.model", "language_model.lm_head"),
        ("projector", "norm", "scale"): Source(f"{_PROJECTOR}.mm_soft_emb_norm.weight"),
        ("projector", "input_projection"): Source(f"{_PROJECTOR}.mm_input_projection_weight"),
        **tensor_names.vision_transformer(
            config.vision, ("vision_tower",), "vision_tower.vision_model", pooled=False
        ),
    }
