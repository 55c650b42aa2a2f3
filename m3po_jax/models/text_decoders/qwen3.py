"""Qwen3 (Yang et al., arXiv:2505.09388): Qwen2 with norms of queries and keys in place of their biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import WIDEST, Fields, flag_or_null, whole
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.text_decoders.fields import HARMLESS, READ, TextDecoder, decoder_config
from m3po_jax.models.text_decoders.qwen2 import POSITIONS, WINDOWS, layer_pattern


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return decoder_config(
        {"head_dim": 128, **raw},  # of the class, whatever the other sizes
        where,
        vocab_size=151936,
        intermediate_size=22016,
        num_kv_heads=32,
        max_positions=POSITIONS,
        layer_pattern=layer_pattern(raw, where),
        biases=("q_proj", "k_proj", "v_proj", "o_proj") if raw.get("attention_bias") else (),
        norms_of_heads=True,
    )


QWEN3 = TextDecoder(
    "qwen3",
    Fields(
        config_class="Qwen3Config",
        read={**READ, **WINDOWS, "attention_bias": flag_or_null, "head_dim": whole(2, WIDEST)},
        harmless=HARMLESS,
    ),
    _read,
)
