"""What the configurations of published text decoders share: fields, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import (
    MOST_LAYERS,
    MOST_TOKENS,
    WIDEST,
    Check,
    Fields,
    flag,
    real,
    rope,
    token_id,
    token_ids,
    whole,
    word,
)
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.rotary_scaling import RotaryScaling, rotary_scaling


@dataclass(frozen=True)
class TextDecoder:
    """A published kind of decoder: `LlamaForCausalLM`'s names of tensors, and a specification from ``config.json``.

    Attributes:
        model_type: As ``config.json`` has it, also in a vision-language model's `text_config`.
        fields: Of its ``config.json``.
        read_config: ``(checked fields, where) -> specification``; raises UserError for values that contradict each
            other.
    """

    model_type: str
    fields: Fields
    read_config: Callable[[Mapping[str, Any], str], DecoderConfig]


# Fields that every one of these decoders reads.
READ: Mapping[str, Check] = {
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
    "bos_token_id": token_id,
    "pad_token_id": token_id,
    "eos_token_id": token_ids,
}
# Of drawing weights and of the cache; training here is without dropout, as TRL's preference trainers turn it off.
HARMLESS = frozenset({"initializer_range", "use_cache", "attention_dropout"})


FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(value: Any) -> str | None:
    """A kind for every layer, or null for what other fields say."""
    valid = value is None or (isinstance(value, list) and all(one in (FULL, SLIDING) for one in value))
    return None if valid else f"a list of {FULL} and {SLIDING}"


def kinds_of_layers(
    types: Sequence[str],
    layers: int,
    window: int | None,
    rotary_of: Mapping[str, tuple[float, RotaryScaling | None]],
    where: str,
) -> tuple[LayerKind, ...]:
    """The kinds that `layer_types` names.

    Args:
        window: Of the sliding ones.
        rotary_of: As of `rotary`, for each name.

    Raises:
        UserError: another number of them than of layers, or sliding ones without a window.
    """
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries, and there are {layers} layers", where=where)
    if window is None and SLIDING in types:
        raise UserError(
            f"layer_types has {SLIDING}, and there is no window: use_sliding_window is false or sliding_window null",
            where=where,
        )
    return tuple(LayerKind(window if one == SLIDING else None, *rotary_of[one]) for one in types)


def layer_count(raw: Mapping[str, Any]) -> int:
    """All of these classes have 32 layers where a file does not say how many."""
    return int(raw.get("num_hidden_layers", 32))


def rope_theta(raw: Mapping[str, Any]) -> float:
    """Base of the rotary positions; as transformers 5 merges them, the older name wins where both are given."""
    positions = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = positions.get("rope_theta")
    return float(raw.get("rope_theta", 10000.0) if theta is None else theta)


def rotary(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RotaryScaling | None]:
    """What `LayerKind` says of rotary positions, where they are the same in all layers.

    Args:
        max_positions: Of the class in transformers, where `raw` has none.
    """
    positions = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return rope_theta(raw), rotary_scaling(positions, raw.get("max_position_embeddings", max_positions))


def decoder_config(
    raw: Mapping[str, Any],
    where: str,
    *,
    vocab_size: int,
    intermediate_size: int,
    num_kv_heads: int | None,
    max_positions: int,
    layer_pattern: tuple[LayerKind, ...],
    biases: tuple[str, ...] = (),
    norms_of_heads: bool = False,
    **more: Any,
) -> DecoderConfig:
    """A specification from the fields that all decoders share.

    Args:
        vocab_size, intermediate_size, num_kv_heads, max_positions: Of the class in transformers, where `raw` has
            none; without `num_kv_heads` there are as many as query heads.
        more: What else the specification says, see `DecoderConfig`.

    Raises:
        UserError: sizes that contradict each other.
    """
    hidden, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    kv_heads = raw.get("num_key_value_heads", num_kv_heads) or heads
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}", where=where)
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", where=where
        )
    head_dim = raw.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise UserError(f"heads of an odd width ({head_dim}) have no rotary positions", where=where)
    return DecoderConfig(
        vocab_size=raw.get("vocab_size", vocab_size),
        hidden_size=hidden,
        intermediate_size=raw.get("intermediate_size", intermediate_size),
        num_layers=layer_count(raw),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=raw.get("hidden_act", "silu"),
        biases=biases,
        norms_of_heads=norms_of_heads,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", max_positions),
        layer_pattern=layer_pattern,
        **more,
    )
