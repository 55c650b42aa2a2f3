"""Mistral (Jiang et al., arXiv:2310.06825): LLaMA whose tokens see a sliding window in every layer, or all before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import Fields, whole
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.text_decoders.fields import HARMLESS, READ, TextDecoder, decoder_config, rotary

_POSITIONS = 131072


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return decoder_config(
        raw,
        where,
        vocab_size=32000,
        intermediate_size=14336,
        num_kv_heads=8,
        max_positions=_POSITIONS,
        layer_pattern=(LayerKind(raw.get("sliding_window", 4096), *rotary(raw, _POSITIONS)),),
    )


MISTRAL = TextDecoder(
    "mistral",
    Fields(
        config_class="MistralConfig",
        read={**READ, "sliding_window": whole(1, 2**31, null=True)},
        harmless=HARMLESS,
    ),
    _read,
)
