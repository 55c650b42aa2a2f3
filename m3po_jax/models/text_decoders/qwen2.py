"""Qwen2 (Yang et al., arXiv:2407.10671): LLaMA with biases of queries, keys and values, and some layers windowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import MOST_LAYERS, Fields, flag, whole
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.text_decoders.fields import (
    FULL,
    HARMLESS,
    READ,
    SLIDING,
    TextDecoder,
    decoder_config,
    kinds_of_layers,
    layer_count,
    layer_types,
    rotary,
)

POSITIONS = 32768

WINDOWS = {
    "use_sliding_window": flag,
    "sliding_window": whole(1, 2**31, null=True),
    "max_window_layers": whole(0, MOST_LAYERS),
    "layer_types": layer_types,
}


def layer_pattern(raw: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Without `layer_types` the first `max_window_layers` layers see everything, those after them the window."""
    layers = layer_count(raw)
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        types = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    of_kinds = dict.fromkeys((FULL, SLIDING), rotary(raw, POSITIONS))
    return kinds_of_layers(types, layers, window, of_kinds, where)


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return decoder_config(
        raw,
        where,
        vocab_size=151936,
        intermediate_size=22016,
        num_kv_heads=32,
        max_positions=POSITIONS,
        layer_pattern=layer_pattern(raw, where),
        biases=("q_proj", "k_proj", "v_proj"),
    )


QWEN2 = TextDecoder(
    "qwen2",
    Fields(
        config_class="Qwen2Config",
        read={**READ, **WINDOWS},
        harmless=HARMLESS,
    ),
    _read,
)
