"""Gemma 2 (arXiv:2408.00118): sliding and full layers in turn, norms of results, soft caps of scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.config_fields import WIDEST, Check, Fields, flag_or_null, only, real, whole, word
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.layers import ACTIVATIONS
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

# Of the classes in transformers, for what a file does not state.
GEMMA_DEFAULTS: Mapping[str, Any] = {
    **{"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "head_dim": 256},
    **{"tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_READ: Mapping[str, Check] = {
    **{name: check for name, check in READ.items() if name != "hidden_act"},
    "hidden_activation": word(ACTIVATIONS),
    "head_dim": whole(2, WIDEST),
    "query_pre_attn_scalar": real(0, 1e6, above=True),
    "sliding_window": whole(1, 2**31, null=True),
    "layer_types": layer_types,
    "attention_bias": flag_or_null,
    "final_logit_softcapping": real(0, 1e6, above=True, null=True),
    "use_bidirectional_attention": only(False, None),
}
# An older name of the activation, which transformers does not read, and how its cache is kept.
GEMMA_HARMLESS = HARMLESS | {"hidden_act", "cache_implementation"}
_POSITIONS = 8192


def gemma_config(
    raw: Mapping[str, Any],
    where: str,
    *,
    vocab_size: int,
    max_positions: int,
    layer_pattern: tuple[LayerKind, ...],
    **more: Any,
) -> DecoderConfig:
    """What Gemma's versions share: gains of 1 + w, embeddings √`hidden_size` as long, a scale of queries of its own.

    Args:
        raw: With `GEMMA_DEFAULTS`.
    """
    return decoder_config(
        {**raw, "hidden_act": raw["hidden_activation"]},
        where,
        vocab_size=vocab_size,
        intermediate_size=9216,
        num_kv_heads=4,
        max_positions=max_positions,
        layer_pattern=layer_pattern,
        biases=("q_proj", "k_proj", "v_proj", "o_proj") if raw.get("attention_bias") else (),
        norms_of_results=True,
        norm_offset=1.0,
        query_scale=raw["query_pre_attn_scalar"] ** -0.5,
        embedding_scale=raw["hidden_size"] ** 0.5,
        **more,
    )


def _read(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    raw = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **GEMMA_DEFAULTS, **raw}
    layers = layer_count(raw)
    types = raw.get("layer_types") or [FULL if layer % 2 else SLIDING for layer in range(layers)]
    of_kinds = dict.fromkeys((FULL, SLIDING), rotary(raw, _POSITIONS))
    return gemma_config(
        raw,
        where,
        vocab_size=256000,
        max_positions=_POSITIONS,
        layer_pattern=kinds_of_layers(types, layers, raw["sliding_window"], of_kinds, where),
        attention_soft_cap=raw["attn_logit_softcapping"],
        logits_soft_cap=raw["final_logit_softcapping"],
    )


GEMMA2 = TextDecoder(
    "gemma2",
    Fields(
        config_class="Gemma2Config",
        read={**GEMMA_READ, "attn_logit_softcapping": real(0, 1e6, above=True, null=True)},
        harmless=GEMMA_HARMLESS,
    ),
    _read,
)
