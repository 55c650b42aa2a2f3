"""CLIP's and SigLIP's stored tensors; every transformers version writes the same names."""

from __future__ import annotations

import re

from m3po_jax.models import tensor_names
from m3po_jax.models.dual_encoder import DualEncoderConfig
from m3po_jax.models.tensor_map import Path, Source

_SKIPPED = re.compile(r"\.embeddings\.position_ids$")  # a buffer that older versions saved


def canonical_name(name: str) -> str | None:
    """The stored name itself; None: a buffer of older versions, which nothing needs."""
    return None if _SKIPPED.search(name) else name


def tensor_map(config: DualEncoderConfig) -> dict[Path, Source]:
    """The stored tensor of every parameter."""
    text = ("text_tower",)
    tensors: dict[Path, Source] = {
        **tensor_names.vision_transformer(config.vision, ("vision_tower",), "vision_model", pooled=True),
        (*text, "token_embedding", "table"): Source("text_model.embeddings.token_embedding.weight"),
        (*text, "position_embedding", "table"): Source("text_model.embeddings.position_embedding.weight"),
        **tensor_names.encoder((*text, "encoder"), "text_model.encoder"),
        **tensor_names.layer_norm((*text, "final_layer_norm"), "text_model.final_layer_norm"),
    }
    if config.kind == "siglip":
        tensors |= tensor_names.linear((*text, "head"), "text_model.head", bias=True)
        return tensors | {("logit_scale",): Source("logit_scale"), ("logit_bias",): Source("logit_bias")}
    for name in ("visual_projection", "text_projection"):
        tensors |= tensor_names.linear((name,), name, bias=False)
    # CLIP stores its scale as a scalar and knows no bias; a model that compares patches was trained with one.
    bias = Source("logit_bias") if config.pooling == "patches" else Source(None)
    return tensors | {("logit_scale",): Source("logit_scale", shape=()), ("logit_bias",): bias}
