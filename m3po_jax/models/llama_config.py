"""A LLaMA decoder's configuration, read from ``config.json`` of any transformers version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import (
    MOST_LAYERS,
    MOST_TOKENS,
    WIDEST,
    Fields,
    flag,
    only,
    real,
    rope,
    token_id,
    token_ids,
    whole,
    word,
)
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.llama import LlamaConfig

LLAMA_FIELDS = Fields(
    config_class="LlamaConfig",
    read={
        "vocab_size": whole(1, MOST_TOKENS),
        "hidden_size": whole(1, WIDEST),
        "intermediate_size": whole(1, WIDEST),
        "num_hidden_layers": whole(1, MOST_LAYERS),
        "num_attention_heads": whole(1, WIDEST),
        "num_key_value_heads": whole(1, WIDEST, null=True),
        "head_dim": whole(2, WIDEST, null=True),
        "hidden_act": word(ACTIVATIONS),
        "max_position_embeddings": whole(1, 2**31),
        "rms_norm_eps": real(0, 1),
        "rope_parameters": rope,
        # The names of transformers before 5.
        "rope_scaling": rope,
        "rope_theta": real(0, 1e12, above=True),
        "tie_word_embeddings": flag,
        "attention_bias": only(False, None),
        "mlp_bias": only(False, None),
        "bos_token_id": token_id,
        "pad_token_id": token_id,
        "eos_token_id": token_ids,
    },
    harmless=frozenset(
        {
            # Of drawing weights, of the cache, and of a split of products that was exact and is gone from 5.
            *("initializer_range", "use_cache", "pretraining_tp"),
            # Training here is without dropout, as TRL's preference trainers turn it off.
            "attention_dropout",
        }
    ),
)


def llama_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """A LLaMA `text_config` (or a bare LLaMA ``config.json``), its values checked by `check_fields`.

    Absent keys take the defaults of transformers' `LlamaConfig`.

    Raises:
        UserError: sizes that contradict each other.
    """
    hidden, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    kv_heads = raw.get("num_key_value_heads") or heads
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}", where=where)
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", where=where
        )
    head_dim = raw.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise UserError(f"heads of an odd width ({head_dim}) have no rotary positions", where=where)
    # As transformers 5 merges them: the older name wins where both are given.
    positions = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = positions.get("rope_theta")
    return LlamaConfig(
        vocab_size=raw.get("vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=raw.get("intermediate_size", 11008),
        num_layers=raw.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=float(raw.get("rope_theta", 10000.0) if theta is None else theta),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=raw.get("hidden_act", "silu"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 2048),
    )
