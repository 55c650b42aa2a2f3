"""LLaVA-1.5's configuration, read from a Hugging Face ``config.json`` of any transformers version."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import (
    MOST_LAYERS,
    MOST_TOKENS,
    Fields,
    flag,
    section,
    token_id,
    token_ids,
    whole,
    word,
)
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder_config import CLIP_VISION_FIELDS, vit_config
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.text_decoders import TEXT_DECODERS, text_decoder
from m3po_jax.models.text_decoders.llama import LLAMA
from m3po_jax.models.vit import ViTConfig


@dataclass(frozen=True)
class LlavaConfig:
    """A tower, a projector and a decoder; layer indices as of `vit.VisionTransformer.features`."""

    text: DecoderConfig
    vision: ViTConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...] = (-2,)
    keep_class_token: bool = False  # vision_feature_select_strategy: full (True) or default (False)
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that a prompt holds for each image."""
        return self.vision.num_patches + (1 if self.keep_class_token else 0)

    @property
    def feature_width(self) -> int:
        """Width of the features that the projector reads."""
        return self.vision.encoder.hidden_size * len(self.vision_feature_layers)


def _layers(value: Any) -> str | None:
    """A layer of the tower, or several."""
    values = value if isinstance(value, list) else [value]
    if not values or any(whole(-MOST_LAYERS, MOST_LAYERS)(one) for one in values):
        return "a layer's number or a list of them"
    return None


LLAVA_FIELDS = Fields(
    config_class="LlavaConfig",
    read={
        "text_config": section,
        "vision_config": section,
        "image_token_index": whole(0, MOST_TOKENS),
        "image_token_id": whole(0, MOST_TOKENS),
        "projector_hidden_act": word(ACTIVATIONS),
        "vision_feature_select_strategy": word(("default", "full")),
        "vision_feature_layer": _layers,
        "multimodal_projector_bias": flag,
        "tie_word_embeddings": flag,
        # Of the whole model, as older files and generation have them.
        "pad_token_id": token_id,
        "bos_token_id": token_id,
        "eos_token_id": token_ids,
    },
    harmless=frozenset(
        {
            # transformers writes 576 for models of any size; counted from the tower instead.
            "image_seq_length",
            # Of losses and of earlier versions: the text section has the vocabulary.
            *("ignore_index", "vocab_size", "use_cache", "initializer_range", "hidden_size"),
        }
    ),
)


def llava_sections(raw: Mapping[str, Any]) -> dict[str, Fields]:
    """Of the file, of its decoder (LLaMA's where it is another, which `llava_config` refuses) and of its tower."""
    text = raw.get("text_config")
    decoder = text_decoder(text) if isinstance(text, Mapping) else None
    return {"": LLAVA_FIELDS, "text_config": (decoder or LLAMA).fields, "vision_config": CLIP_VISION_FIELDS}


# Where a file has no vision section at all, LLaVA's own default is CLIP-L/336; a section of its own takes CLIP's.
_DEFAULT_TOWER = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14},
}


def _unsupported(what: str, where: str) -> UserError:
    decoders = ", ".join(TEXT_DECODERS)
    return UserError(
        f"{what} is not supported", where=where, remedy=f"LLaVA-1.5 has a CLIP tower and one of these: {decoders}"
    )


def llava_config(raw: dict[str, Any], where: str) -> LlavaConfig:
    """LLaVA-1.5 from ``config.json``, its values checked by `check_fields`.

    Raises:
        UserError: a decoder or tower that this family does not cover, or sizes that contradict each other.
    """
    text, vision = raw.get("text_config") or {}, raw.get("vision_config")
    decoder = text_decoder(text)
    if decoder is None:
        raise _unsupported(f"decoder {text['model_type']!r}", where)
    if vision and vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise _unsupported(f"vision tower {vision['model_type']!r}", where)
    spec = decoder.read_config(text, where)
    tower = vit_config(_DEFAULT_TOWER if vision is None else vision, "clip", where)
    layer = raw.get("vision_feature_layer", -2)
    layers = tuple(layer) if isinstance(layer, list) else (layer,)
    depth = tower.encoder.num_layers
    for number in layers:
        if not -depth - 1 <= number <= depth:
            raise UserError(f"vision_feature_layer {number}, and the tower has {depth} layers", where=where)
    # transformers 5 takes the flag from either place.
    tied = raw.get("tie_word_embeddings", False) or spec.tie_word_embeddings
    return LlavaConfig(
        # LLaVA's class in transformers has an output layer of its own, without the cap that Gemma 2's has.
        text=dataclasses.replace(spec, tie_word_embeddings=tied, logits_soft_cap=None),
        vision=tower,
        image_token_id=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        vision_feature_layers=layers,
        keep_class_token=raw.get("vision_feature_select_strategy", "default") == "full",
        projector_activation=raw.get("projector_hidden_act", "gelu"),
        projector_bias=raw.get("multimodal_projector_bias", True),
    )
