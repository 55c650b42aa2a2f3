"""Gemma 3's decoder (arXiv:2503.19786): Gemma 2 with norms of queries and keys in place of soft caps, five sliding
layers to a full one, and rotary positions of each kind's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import MOST_LAYERS, Check, Fields, only, real, rope, rope_of_kinds, whole
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.rotary_scaling import RotaryScaling, rotary_scaling
from m3po_jax.models.text_decoders.fields import FULL, SLIDING, TextDecoder, kinds_of_layers, layer_count
from m3po_jax.models.text_decoders.gemma2 import GEMMA_DEFAULTS, GEMMA_HARMLESS, GEMMA_READ, gemma_config

_POSITIONS = 131072
_POSITIVE = real(0, 1e12, above=True)
GEMMA3_READ: Mapping[str, Check] = {
    **GEMMA_READ,
    # transformers knows the field and computes without it.
    "attn_logit_softcapping": only(None),
    "rope_parameters": rope_of_kinds,
    # Before transformers 5: of the full layers, and the base of the sliding ones.
    "rope_scaling": rope,
    "rope_theta": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "sliding_window_pattern": whole(1, MOST_LAYERS),
}


def _rotary_of(raw: Mapping[str, Any]) -> dict[str, tuple[float, RotaryScaling | None]]:
    """Of each kind of layer; in `rope_scaling` the older files state what the full layers' differ in."""
    stated = raw.get("rope_parameters") or {}
    full = {"rope_theta": raw.get("rope_theta", 1e6), **(stated.get(FULL) or {}), **(raw.get("rope_scaling") or {})}
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 1e4), **(stated.get(SLIDING) or {})}
    positions = raw.get("max_position_embeddings", _POSITIONS)
    return {
        kind: (float(parameters["rope_theta"]), rotary_scaling(parameters, positions))
        for kind, parameters in ((FULL, full), (SLIDING, sliding))
    }


def gemma3_decoder(raw: Mapping[str, Any], where: str, **more: Any) -> DecoderConfig:
    """The specification from checked fields, and `more` of it.

    Raises:
        UserError: values that contradict each other.
    """
    raw = {"sliding_window_pattern": 6, **GEMMA_DEFAULTS, **raw}
    layers, pattern = layer_count(raw), raw["sliding_window_pattern"]
    types = raw.get("layer_types") or [SLIDING if layer % pattern else FULL for layer in range(1, layers + 1)]
    return gemma_config(
        raw,
        where,
        vocab_size=262208,
        max_positions=_POSITIONS,
        layer_pattern=kinds_of_layers(types, layers, raw["sliding_window"], _rotary_of(raw), where),
        norms_of_heads=True,
        logits_soft_cap=raw.get("final_logit_softcapping"),
        **more,
    )


GEMMA3 = TextDecoder(
    "gemma3_text",
    Fields(
        config_class="Gemma3TextConfig",
        read=GEMMA3_READ,
        harmless=GEMMA_HARMLESS | {"_sliding_window_pattern"},
    ),
    gemma3_decoder,
)
