"""CLIP's and SigLIP's towers, read from the sections of a ``config.json`` of any transformers version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import (
    LARGEST_IMAGE,
    MOST_LAYERS,
    MOST_TOKENS,
    WIDEST,
    Fields,
    only,
    real,
    side,
    token_id,
    whole,
    word,
)
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.vit import ViTConfig

_ENCODER = {
    "hidden_size": whole(1, WIDEST),
    "intermediate_size": whole(1, WIDEST),
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "num_attention_heads": whole(1, WIDEST),
    "hidden_act": word(ACTIVATIONS),
    "layer_norm_eps": real(0, 1),
}
_VISION = {
    **_ENCODER,
    "image_size": side(1, LARGEST_IMAGE),
    "patch_size": side(1, LARGEST_IMAGE),
    "num_channels": only(3),
}
_TEXT = {
    **_ENCODER,
    "vocab_size": whole(1, MOST_TOKENS),
    "max_position_embeddings": whole(1, 2**16),
    # Where CLIP reads a text's vector; SigLIP reads the last slot.
    "eos_token_id": whole(0, MOST_TOKENS),
}
# Of drawing weights; training here is without dropout; a text's ids come from the tokenizer.
_HARMLESS = frozenset({"initializer_range", "initializer_factor", "attention_dropout", "dropout"})
_IDS = frozenset({"bos_token_id", "pad_token_id"})

CLIP_VISION_FIELDS = Fields(
    "CLIPVisionConfig",
    _VISION,
    # The width of the common space stands in the whole model's configuration.
    _HARMLESS | {"projection_dim"},
)
CLIP_TEXT_FIELDS = Fields("CLIPTextConfig", _TEXT, _HARMLESS | _IDS | {"projection_dim"})
SIGLIP_VISION_FIELDS = Fields("SiglipVisionConfig", {**_VISION, "vision_use_head": only(True)}, _HARMLESS)
SIGLIP_TEXT_FIELDS = Fields(
    "SiglipTextConfig",
    {**_TEXT, "eos_token_id": token_id, "projection_size": whole(1, WIDEST, null=True)},
    _HARMLESS | _IDS,
)

# What transformers' classes take for a key that the file does not have.
CLIP_VISION_DEFAULTS = {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP_VISION_DEFAULTS = {
    **{"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
}
CLIP_TEXT_DEFAULTS = {
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77},
    "eos_token_id": 49407,
}
SIGLIP_TEXT_DEFAULTS = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vocab_size": 32000},
    **{"max_position_embeddings": 64, "projection_size": None},
}
_VISION_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def encoder_config(raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> EncoderConfig:
    """The layers of one tower, its values checked by `check_fields`.

    Raises:
        UserError: heads that do not divide the width.
    """
    values = {**defaults, **raw}
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}", where=where)
    return EncoderConfig(
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        activation=values["hidden_act"],
        layer_norm_eps=float(values["layer_norm_eps"]),
    )


def vit_config(raw: Mapping[str, Any], kind: str, where: str) -> ViTConfig:
    """A CLIP or SigLIP `vision_config`; absent keys take the published defaults of that model.

    Raises:
        UserError: sizes that contradict each other.
    """
    defaults = {**_VISION_SIZES, **{"clip": CLIP_VISION_DEFAULTS, "siglip": SIGLIP_VISION_DEFAULTS}[kind]}
    image, patch = (_side({**defaults, **raw}[name]) for name in ("image_size", "patch_size"))
    if patch > image:
        raise UserError(f"patch_size {patch} is larger than image_size {image}", where=where)
    return ViTConfig(kind=kind, encoder=encoder_config(raw, defaults, where), image_size=image, patch_size=patch)


def _side(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value


def with_older_section(raw: Mapping[str, Any], name: str, fields: Fields) -> dict[str, Any]:
    """`raw` with the section `name` as transformers reads it where ``NAME_dict`` of its first versions is there.

    That section wins whole: what it does not state is the class's default, whatever `name` says.
    """
    older = raw.get(f"{name}_dict")
    merged = {key: value for key, value in raw.items() if key != f"{name}_dict"}
    if older is None:
        return merged
    if not isinstance(older, dict):
        return {**merged, name: older}  # refused as any section that is no object
    kept = {key: value for key, value in (raw.get(name) or {}).items() if key not in fields.read}
    return {**merged, name: {**kept, **older}}
