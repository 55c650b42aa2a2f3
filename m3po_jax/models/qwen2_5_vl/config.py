"""Qwen2.5-VL's configuration, read from a Hugging Face ``config.json`` of any transformers version."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import (
    LARGEST_IMAGE,
    MOST_LAYERS,
    MOST_TOKENS,
    WIDEST,
    Check,
    Fields,
    flag,
    only,
    real,
    rope,
    section,
    shown,
    token_id,
    token_ids,
    whole,
    word,
)
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.qwen2_5_vl.grids import sections_axes
from m3po_jax.models.text_decoders.fields import HARMLESS, READ, decoder_config
from m3po_jax.models.text_decoders.qwen2 import WINDOWS, layer_pattern


@dataclass(frozen=True)
class TowerConfig:
    """A tower that reads patches of images of any size.

    Attributes:
        frames: Of a patch (`temporal_patch_size`); an image repeats its one frame.
        merge: Patches along the side of the square that becomes one image token.
        window: Side of a window in such squares, in the layers that are not among `full_layers`; 0: none has windows.
        rope_theta: Base of the rotary positions of rows and columns.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    frames: int
    merge: int
    activation: str
    window: int = 0
    full_layers: tuple[int, ...] = ()
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def unit(self) -> int:
        """Patches of an image token."""
        return self.merge**2

    @property
    def feature_width(self) -> int:
        """Of an image token: its patches side by side."""
        return self.unit * self.hidden_size

    @property
    def pixels_of_patch(self) -> int:
        """Numbers of a patch of one frame."""
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class Qwen25VLConfig:
    """A tower, a merger and a decoder whose rotary positions have three axes."""

    text: DecoderConfig
    vision: TowerConfig
    image_token_id: int


def layer_numbers(value: Any) -> str | None:
    """Layers of the tower, from 0."""
    whole_number = whole(0, MOST_LAYERS)
    valid = isinstance(value, list) and not any(whole_number(one) for one in value)
    return None if valid else "a list of layers' numbers"


def mrope(*switches: str) -> Check:
    """Rotary positions with three axes, in sections of the frequencies; `switches` are further keys that are read."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return rope(value)
        sections = value.get("mrope_section")
        valid = isinstance(sections, list) and len(sections) == 3 and not any(map(whole(0, WIDEST), sections))
        if sections is not None and not valid:
            return "with an mrope_section of three whole numbers"
        rest = {key: x for key, x in value.items() if key not in ("mrope_section", *switches)}
        return rope({key: "default" if x == "mrope" and key in ("type", "rope_type") else x for key, x in rest.items()})

    return check


def _axial(value: Any) -> str | None:
    """Rotary positions of rows and columns, which transformers 5 states for the tower."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("rope_type", "axial") not in ("axial", "default"):
        return "null, or an object of rope_type 'axial'"
    return rope({**value, "rope_type": "default"})


# Of every tower of this line of models.
TOWER_READ: Mapping[str, Check] = {
    "depth": whole(1, MOST_LAYERS),
    "hidden_size": whole(1, WIDEST),
    "intermediate_size": whole(1, WIDEST),
    "num_heads": whole(1, WIDEST),
    "patch_size": whole(1, LARGEST_IMAGE),
    "spatial_merge_size": whole(1, 64),
    "temporal_patch_size": whole(1, 64),
    "out_hidden_size": whole(1, WIDEST),
    "hidden_act": word(ACTIVATIONS),
    "in_channels": only(3),
    "rope_parameters": _axial,
}
TOWER_FIELDS = Fields(
    config_class="Qwen2_5_VLVisionConfig",
    read={
        **TOWER_READ,
        "window_size": whole(1, LARGEST_IMAGE),
        "fullatt_block_indexes": layer_numbers,
        "in_chans": only(3),  # the published files' own names
        "spatial_patch_size": whole(1, LARGEST_IMAGE),
    },
    harmless=frozenset({"tokens_per_second", "initializer_range"}),  # of videos, and of drawing weights
)
_TEXT_READ = {**READ, **WINDOWS, "rope_parameters": mrope(), "rope_scaling": mrope()}
TEXT_FIELDS = Fields(config_class="Qwen2_5_VLTextConfig", read=_TEXT_READ, harmless=HARMLESS)
# Ids that the chat template writes by name, and of videos.
MARKS = frozenset({"video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"})
TOP_READ: Mapping[str, Check] = {
    "text_config": section,
    "vision_config": section,
    "image_token_id": whole(0, MOST_TOKENS),
    "tie_word_embeddings": flag,
    "pad_token_id": token_id,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
}
TOP_FIELDS = Fields(
    config_class="Qwen2_5_VLConfig",
    read=TOP_READ,
    harmless=MARKS | {"vocab_size", "hidden_size", "use_cache", "initializer_range"},
)

# What transformers' classes take for a key that the file does not have.
_TEXT_DEFAULTS = {
    **{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80},
    "rope_theta": 1_000_000.0,
}
_TOWER_DEFAULTS = {
    **{"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "hidden_act": "silu"},
    **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
}
_IMAGE_TOKEN = 151655
_OF_THE_WHOLE = {"architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "tie_word_embeddings"}


def sections_of(top: Fields, text: Fields, vision: Fields) -> Callable[[Mapping[str, Any]], Mapping[str, Fields]]:
    """`Family.sections` of a family with these three."""
    return lambda raw: {"": top, "text_config": text, "vision_config": vision}


def normalized(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The decoder's fields in a section of their own; the published files have them at the top."""
    if raw.get("text_config") is not None:
        return raw
    text = {key: raw[key] for key in raw if key in TEXT_FIELDS and key not in _OF_THE_WHOLE}
    rest = {key: value for key, value in raw.items() if key not in text}
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    return {**rest, **ids, "text_config": {"model_type": "qwen2_5_vl_text", **text}}


def tower_config(raw: Mapping[str, Any], width: int, where: str, **changes: Any) -> TowerConfig:
    """The tower of a `vision_config` that lacks no key.

    Args:
        width: Of the decoder.

    Raises:
        UserError: sizes that contradict each other.
    """
    hidden, heads = raw["hidden_size"], raw["num_heads"]
    if hidden % heads or hidden // heads % 4:
        raise UserError(
            f"vision_config: hidden_size {hidden} does not make {heads} heads of a multiple of 4", where=where
        )
    if raw["out_hidden_size"] != width:
        raise UserError(
            f"vision_config.out_hidden_size is {raw['out_hidden_size']}, and the decoder is {width} wide", where=where
        )
    return TowerConfig(
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["depth"],
        num_heads=heads,
        patch_size=raw["patch_size"],
        frames=raw["temporal_patch_size"],
        merge=raw["spatial_merge_size"],
        activation=raw["hidden_act"],
        rope_theta=float((raw.get("rope_parameters") or {}).get("rope_theta") or 10000.0),
        **changes,
    )


def sections_in(raw: Mapping[str, Any], head_dim: int, default: tuple[int, ...], where: str) -> tuple[int, ...]:
    """`mrope_section` of a decoder's fields.

    Raises:
        UserError: it does not make up half of a head.
    """
    positions = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    sections = tuple(positions.get("mrope_section") or default)
    if sum(sections) != head_dim // 2:
        raise UserError(
            f"mrope_section {shown(list(sections))} does not add up to half of a head's {head_dim}", where=where
        )
    return sections


def qwen25_vl_config(raw: dict[str, Any], where: str) -> Qwen25VLConfig:
    """Qwen2.5-VL from ``config.json``, its values checked by `check_fields`.

    Raises:
        UserError: sizes that contradict each other.
    """
    text = {**_TEXT_DEFAULTS, **raw["text_config"]}
    vision = {**_TOWER_DEFAULTS, **(raw.get("vision_config") or {})}
    spec = decoder_config(
        text,
        where,
        vocab_size=text["vocab_size"],
        intermediate_size=text["intermediate_size"],
        num_kv_heads=None,
        max_positions=32768,
        layer_pattern=layer_pattern(text, where),
        biases=("q_proj", "k_proj", "v_proj"),
    )
    if vision.get("spatial_patch_size", vision["patch_size"]) != vision["patch_size"]:
        raise UserError("vision_config has two patch sizes", where=where)
    full = tuple(vision["fullatt_block_indexes"])
    window = vision["window_size"] // vision["spatial_merge_size"] // vision["patch_size"]
    windowed = any(layer not in full for layer in range(vision["depth"]))
    if windowed and window < 1:
        raise UserError(
            f"vision_config.window_size {vision['window_size']} is less than the square of an image token", where=where
        )
    tower = tower_config(
        vision, spec.hidden_size, where, window=window if windowed else 0, full_layers=full if windowed else ()
    )
    sections = sections_in(text, spec.head_dim, (16, 24, 24), where)
    # transformers 5 takes the flag from either place.
    tied = raw.get("tie_word_embeddings", False) or spec.tie_word_embeddings
    return Qwen25VLConfig(
        text=dataclasses.replace(spec, tie_word_embeddings=tied, rotary_axes=sections_axes(sections)),
        vision=tower,
        image_token_id=raw.get("image_token_id", _IMAGE_TOKEN),
    )
