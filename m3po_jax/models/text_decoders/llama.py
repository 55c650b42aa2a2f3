"""LLaMA (Touvron et al., arXiv:2302.13971): every token sees all before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import Fields, flag_or_null
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.text_decoders.fields import HARMLESS, READ, TextDecoder, decoder_config, rotary

_POSITIONS = 2048


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj") if raw.get("attention_bias") else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if raw.get("mlp_bias") else ()
    return decoder_config(
        raw,
        where,
        vocab_size=32000,
        intermediate_size=11008,
        num_kv_heads=None,
        max_positions=_POSITIONS,
        layer_pattern=(LayerKind(None, *rotary(raw, _POSITIONS)),),
        biases=(*attention, *mlp),
    )


LLAMA = TextDecoder(
    "llama",
    Fields(
        config_class="LlamaConfig",
        read={**READ, "attention_bias": flag_or_null, "mlp_bias": flag_or_null},
        # A split of products that was exact and is gone from transformers 5.
        harmless=HARMLESS | {"pretraining_tp"},
    ),
    _read,
)
