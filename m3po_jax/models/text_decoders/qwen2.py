"""Qwen2 (Yang et al., arXiv:2407.10671): LLaMA with biases of queries, keys and values, and some layers windowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import MOST_LAYERS, Fields, flag, whole
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.text_decoders.fields import (
    HARMLESS,
    READ,
    TextDecoder,
    decoder_config,
    layer_count,
    rope_theta,
)

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _layer_types(value: Any) -> str | None:
    """A kind for every layer, or null for what `max_window_layers` says."""
    valid = value is None or (isinstance(value, list) and all(one in (_FULL, _SLIDING) for one in value))
    return None if valid else f"a list of {_FULL} and {_SLIDING}"


WINDOWS = {
    "use_sliding_window": flag,
    "sliding_window": whole(1, 2**31, null=True),
    "max_window_layers": whole(0, MOST_LAYERS),
    "layer_types": _layer_types,
}


def layer_pattern(raw: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Without `layer_types` the first `max_window_layers` layers see everything, those after them the window."""
    layers, theta = layer_count(raw), rope_theta(raw)
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        types = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(layers)]
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries, and there are {layers} layers", where=where)
    if window is None and _SLIDING in types:
        raise UserError(
            f"layer_types has {_SLIDING}, and there is no window: use_sliding_window is false or sliding_window null",
            where=where,
        )
    return tuple(LayerKind(window=window if one == _SLIDING else None, rope_theta=theta) for one in types)


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return decoder_config(
        raw,
        where,
        vocab_size=151936,
        intermediate_size=22016,
        num_kv_heads=32,
        max_positions=32768,
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
