"""Idefics3's and SmolVLM's configuration, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import MOST_TOKENS, Fields, flag, section, shown, token_id, token_ids, whole
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder_config import SIGLIP_VISION_FIELDS, vit_config
from m3po_jax.models.text_decoders import TEXT_DECODERS, text_decoder
from m3po_jax.models.text_decoders.llama import LLAMA
from m3po_jax.models.vit import ViTConfig


@dataclass(frozen=True)
class Idefics3Config:
    """A tower, a linear layer and a decoder; squares of `shuffle` · `shuffle` patches become an image token."""

    text: DecoderConfig
    vision: ViTConfig
    image_token_id: int
    shuffle: int

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile, and of the whole image beside its tiles."""
        return self.vision.num_patches // self.shuffle**2

    @property
    def feature_width(self) -> int:
        """Of an image token: its patches side by side."""
        return self.vision.encoder.hidden_size * self.shuffle**2


_TIED = "tie_word_embeddings"
_TOP = {
    "text_config": section,
    "vision_config": section,
    "image_token_id": whole(0, MOST_TOKENS),
    "scale_factor": whole(1, 64),
    _TIED: flag,
    # Of the whole model, as generation has them.
    "pad_token_id": token_id,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
}
_NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
TOP_FIELDS = {
    kind: Fields(f"{name}Config", _TOP, frozenset({"use_cache", "initializer_range", "vocab_size", "hidden_size"}))
    for kind, name in _NAMES.items()
}
_VISION_READ = {name: check for name, check in SIGLIP_VISION_FIELDS.read.items() if name != "vision_use_head"}
VISION_FIELDS = {
    kind: dataclasses.replace(SIGLIP_VISION_FIELDS, config_class=f"{name}VisionConfig", read=_VISION_READ)
    for kind, name in _NAMES.items()
}
_TOWER_DEFAULTS = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}


def idefics3_sections(raw: Mapping[str, Any]) -> dict[str, Fields]:
    """Of the file, of its decoder (LLaMA's where it is another, which `idefics3_config` refuses) and of its tower."""
    text, kind = raw.get("text_config"), raw["model_type"]
    decoder = (text_decoder(text) if isinstance(text, Mapping) else None) or LLAMA
    # transformers takes the flag from the whole model alone.
    read = {name: check for name, check in decoder.fields.read.items() if name != _TIED}
    fields = dataclasses.replace(decoder.fields, read=read, harmless=decoder.fields.harmless | {_TIED})
    return {"": TOP_FIELDS[kind], "text_config": fields, "vision_config": VISION_FIELDS[kind]}


def _has_plain_positions(side: int) -> bool:
    """Whether transformers gives patch i of a side position i: its fractions are rounded to float32, and from 19 on
    some sides come out otherwise."""
    count = math.ceil((1.0 - 1 / side) / (1 / side))
    bounds = (1 / side + np.arange(count) * (1 / side)).astype(np.float32)
    fractions = np.minimum(np.arange(side, dtype=np.float32) * np.float32(1 / side), np.float32(1 - 1e-6))
    return bool(np.array_equal(np.searchsorted(bounds, fractions, side="right"), np.arange(side)))


def idefics3_config(raw: dict[str, Any], where: str) -> Idefics3Config:
    """Idefics3 or SmolVLM from ``config.json``, its values checked by `check_fields`.

    Raises:
        UserError: another decoder, or sizes that contradict each other.
    """
    text = raw.get("text_config") or {"rms_norm_eps": 1e-5}
    vision = {**_TOWER_DEFAULTS, **(raw.get("vision_config") or {})}
    decoder = text_decoder(text)
    if decoder is None:
        raise UserError(
            f"decoder {shown(text['model_type'])} is not supported",
            where=where,
            remedy=f"a {raw['model_type']} model has one of these: {', '.join(TEXT_DECODERS)}",
        )
    tower, shuffle = vit_config(vision, "siglip", where), raw.get("scale_factor", 2)
    side = tower.image_size // tower.patch_size
    if side % shuffle:
        raise UserError(f"scale_factor {shuffle} does not divide {side} patches along a side", where=where)
    if not _has_plain_positions(side):
        raise UserError(
            f"vision_config makes {side} patches along a side, some of which transformers gives another's position",
            where=where,
            remedy="no published model has as many; take one of these",
        )
    spec = dataclasses.replace(
        decoder.read_config(text, where), tie_word_embeddings=raw.get(_TIED, False), logits_soft_cap=None
    )
    return Idefics3Config(spec, tower, raw.get("image_token_id", 128257), shuffle)
