"""Gemma 3's configuration with images, read from a Hugging Face ``config.json`` of any transformers version."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import MOST_TOKENS, Fields, flag, only, section, shown, token_id, token_ids, whole
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder_config import SIGLIP_VISION_FIELDS, vit_config
from m3po_jax.models.text_decoders.gemma3 import GEMMA3
from m3po_jax.models.vit import ViTConfig


@dataclass(frozen=True)
class Gemma3Config:
    """A tower, a projector and a decoder whose image tokens see each other.

    Attributes:
        tokens_per_side: The square of means of patches that an image becomes has so many image tokens along a side.
        image_start_id, image_end_id: The tokens around a run of image tokens.
    """

    text: DecoderConfig
    vision: ViTConfig
    image_token_id: int
    image_start_id: int
    image_end_id: int
    tokens_per_side: int

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of an image, and of a crop."""
        return self.tokens_per_side**2


GEMMA3_FIELDS = Fields(
    config_class="Gemma3Config",
    read={
        "text_config": section,
        "vision_config": section,
        "image_token_index": whole(0, MOST_TOKENS),
        "image_token_id": whole(0, MOST_TOKENS),
        "boi_token_index": whole(0, MOST_TOKENS),
        "eoi_token_index": whole(0, MOST_TOKENS),
        "mm_tokens_per_image": whole(1, MOST_TOKENS),
        "tie_word_embeddings": flag,
        # Of the whole model, as generation has them.
        "pad_token_id": token_id,
        "bos_token_id": token_id,
        "eos_token_id": token_ids,
    },
    harmless=frozenset({"initializer_range", "use_cache", "vocab_size", "hidden_size"}),
)
# Without SigLIP's pooling head: the decoder reads the patches.
_VISION_FIELDS = dataclasses.replace(
    SIGLIP_VISION_FIELDS, read={**SIGLIP_VISION_FIELDS.read, "vision_use_head": only(False)}
)
_TIED = "tie_word_embeddings"
# transformers takes that from the whole model alone.
_TEXT_FIELDS = dataclasses.replace(
    GEMMA3.fields,
    read={name: check for name, check in GEMMA3.fields.read.items() if name != _TIED},
    harmless=GEMMA3.fields.harmless | {_TIED},
)
_TYPES = {"text_config": GEMMA3.model_type, "vision_config": "siglip_vision_model"}


def gemma3_sections(raw: Mapping[str, Any]) -> dict[str, Fields]:
    """Of the file, of its decoder and of its tower."""
    return {"": GEMMA3_FIELDS, "text_config": _TEXT_FIELDS, "vision_config": _VISION_FIELDS}


def gemma3_config(raw: dict[str, Any], where: str) -> Gemma3Config:
    """Gemma 3 from ``config.json``, its values checked by `check_fields`.

    Raises:
        UserError: another decoder or tower, or sizes that contradict each other.
    """
    text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
    for name, part in (("text_config", text), ("vision_config", vision)):
        kind = part.get("model_type", _TYPES[name])
        if kind != _TYPES[name]:
            raise UserError(
                f"{name}.model_type is {shown(kind)}, and a gemma3 model has {_TYPES[name]}",
                where=where,
                remedy="take the config.json of a published Gemma 3",
            )
    tower = vit_config(vision, "siglip", where)
    tokens, patches = raw.get("mm_tokens_per_image", 256), tower.image_size // tower.patch_size
    side = math.isqrt(tokens)
    if side**2 != tokens or not 1 <= side <= patches or patches // (patches // side) != side:
        raise UserError(
            f"mm_tokens_per_image is {tokens}, which {patches} x {patches} patches are not pooled to in squares",
            where=where,
        )
    # transformers' class has an output layer of its own, without the cap that the text model's can have.
    spec = dataclasses.replace(
        GEMMA3.read_config(text, where),
        tie_word_embeddings=raw.get(_TIED, True),
        logits_soft_cap=None,
        image_span=tokens,
    )
    return Gemma3Config(
        text=spec,
        vision=tower,
        image_token_id=raw.get("image_token_index", raw.get("image_token_id", 262144)),
        image_start_id=raw.get("boi_token_index", 255999),
        image_end_id=raw.get("eoi_token_index", 256000),
        tokens_per_side=side,
    )
