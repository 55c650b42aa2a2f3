"""Qwen3-VL's configuration, read from a Hugging Face ``config.json`` of any transformers version."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import MOST_TOKENS, WIDEST, Fields, flag_or_null, only, shown, whole
from m3po_jax.models.decoder_config import DecoderConfig, LayerKind
from m3po_jax.models.qwen2_5_vl.config import (
    MARKS,
    TOP_READ,
    TOWER_READ,
    TowerConfig,
    layer_numbers,
    mrope,
    sections_in,
    tower_config,
)
from m3po_jax.models.text_decoders.fields import HARMLESS, READ, decoder_config, rope_theta


@dataclass(frozen=True)
class Qwen3TowerConfig(TowerConfig):
    """A tower with learned positions, which hands over states of several layers.

    Attributes:
        grid_side: Of the square table of learned positions, which every image stretches over itself.
        deep_layers: Layers, counted from 0, after which states go to the decoder's first layers.
        width: Of the decoder, to which these states are merged.
    """

    grid_side: int = 0
    deep_layers: tuple[int, ...] = ()
    width: int = 0


@dataclass(frozen=True)
class Qwen3VLConfig:
    """A tower, a merger and a decoder whose rotary positions have three axes."""

    text: DecoderConfig
    vision: Qwen3TowerConfig
    image_token_id: int

    @property
    def feature_width(self) -> int:
        """An image token's patches after the last layer, and what is added after the decoder's first layers."""
        return self.vision.feature_width + len(self.vision.deep_layers) * self.vision.width


_ROPE = mrope("mrope_interleaved")


def _interleaved(value: Any) -> str | None:
    """Axes take turns, whatever the file says: transformers knows no other order."""
    if isinstance(value, dict) and value.get("mrope_interleaved") not in (None, True):
        return "with mrope_interleaved true"
    return _ROPE(value)


TOWER_FIELDS = Fields(
    config_class="Qwen3VLVisionConfig",
    read={
        **TOWER_READ,
        "num_position_embeddings": whole(1, MOST_TOKENS),
        "deepstack_visual_indexes": layer_numbers,
    },
    harmless=frozenset({"initializer_range"}),
)
TEXT_FIELDS = Fields(
    config_class="Qwen3VLTextConfig",
    read={
        **READ,
        "rope_parameters": _interleaved,
        "rope_scaling": _interleaved,
        "attention_bias": flag_or_null,
        "head_dim": whole(2, WIDEST),
        "use_sliding_window": only(False, None),
    },
    harmless=HARMLESS,
)
TOP_FIELDS = Fields(config_class="Qwen3VLConfig", read=TOP_READ, harmless=MARKS)

# What transformers' classes take for a key that the file does not have.
_TEXT_DEFAULTS = {
    **{"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "rope_theta": 500_000.0,
}
_TOWER_DEFAULTS = {
    **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584},
    **{"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}
_IMAGE_TOKEN = 151655


def interleaved_axes(sections: tuple[int, ...]) -> tuple[int, ...]:
    """`DecoderConfig.rotary_axes` of Qwen3-VL: time, height and width in turn, then time alone."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for place in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[place] = axis
    return tuple(axes)


def qwen3_vl_config(raw: dict[str, Any], where: str) -> Qwen3VLConfig:
    """Qwen3-VL from ``config.json``, its values checked by `check_fields`.

    Raises:
        UserError: sizes that contradict each other.
    """
    text = {**_TEXT_DEFAULTS, **(raw.get("text_config") or {})}
    vision = {**_TOWER_DEFAULTS, **(raw.get("vision_config") or {})}
    spec = decoder_config(
        text,
        where,
        vocab_size=text["vocab_size"],
        intermediate_size=text["intermediate_size"],
        num_kv_heads=None,
        max_positions=128000,
        layer_pattern=(LayerKind(rope_theta=rope_theta(text)),),
        biases=("q_proj", "k_proj", "v_proj", "o_proj") if text.get("attention_bias") else (),
        norms_of_heads=True,
    )
    deep, side = tuple(vision["deepstack_visual_indexes"]), math.isqrt(vision["num_position_embeddings"])
    if list(deep) != sorted({layer for layer in deep if layer < vision["depth"]}) or len(deep) > spec.num_layers:
        raise UserError(
            f"vision_config.deepstack_visual_indexes is {shown(list(deep))}, and must be layers of the tower in their "
            "order, no more than the decoder has",
            where=where,
        )
    tower = tower_config(vision, spec.hidden_size, where)
    sections = sections_in(text, spec.head_dim, (24, 20, 20), where)
    # transformers 5 takes the flag from either place.
    tied = raw.get("tie_word_embeddings", False) or spec.tie_word_embeddings
    return Qwen3VLConfig(
        text=dataclasses.replace(
            spec, tie_word_embeddings=tied, rotary_axes=interleaved_axes(sections), injected_layers=len(deep)
        ),
        vision=Qwen3TowerConfig(
            **dataclasses.asdict(tower), grid_side=side, deep_layers=deep, width=spec.hidden_size
        ),
        image_token_id=raw.get("image_token_id", _IMAGE_TOKEN),
    )
