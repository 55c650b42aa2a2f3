"""LLaVA-1.5's stored tensors, in every layout that they are published in.

The canonical layout is transformers 4.x's (4.36 to 4.51), which is also what export writes. Read too: 4.52
and later (``model.language_model.…``), 5.x (a vision tower without ``vision_model``), the original release
(``model.mm_projector.0.…``, a bare LLaMA, usually no vision tower).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.errors import UserError
from m3po_jax.models import tensor_names
from m3po_jax.models.config_fields import (
    MOST_LAYERS,
    MOST_TOKENS,
    Fields,
    check_fields,
    only,
    shown,
    text,
    whole,
    word,
)
from m3po_jax.models.encoder_config import CLIP_VISION_FIELDS, with_older_section
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.tensor_map import Path, Source

# Published prefix -> canonical prefix; the first match wins. No name means two things in two layouts.
_PREFIXES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that older versions saved.
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")
PADDED_VOCABULARY = 64  # the HF conversion rounds 32,000 + <image> + <pad> up to a multiple of this
PAD = "<pad>"


def canonical_name(name: str) -> str | None:
    """The 4.x name of a tensor of any layout; None for buffers that hold nothing."""
    if _SKIPPED.search(name):
        return None
    for old, new in _PREFIXES:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def tower_name(name: str) -> str | None:
    """LLaVA's name of a tensor of a CLIP directory, whole or vision part; None: not the tower's."""
    if _SKIPPED.search(name) or name in ("logit_scale", "logit_bias"):
        return None
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")):
        return None
    return "vision_tower.vision_model." + name.removeprefix("vision_model.")


def tensor_map(config: LlavaConfig) -> dict[Path, Source]:
    """The canonical stored tensor of every parameter: the names of transformers before 4.52."""
    tensors = tensor_names.decoder(config.text, ("decoder",), "language_model.model", "language_model.lm_head")
    for name in ("linear_1", "linear_2"):
        tensors |= tensor_names.linear(
            ("projector", name), f"multi_modal_projector.{name}", bias=config.projector_bias
        )
    return tensors | tensor_names.vision_transformer(
        config.vision, ("vision_tower",), "vision_tower.vision_model", pooled=False
    )


def is_original(raw: dict[str, Any]) -> bool:
    """Whether ``config.json`` is of the original release, which nests no `text_config`."""
    return "text_config" not in raw and ("mm_vision_tower" in raw or "mm_hidden_size" in raw)


def default_tower(raw: dict[str, Any]) -> str:
    """The CLIP model that an original release sees with and does not contain; empty for the HF layout."""
    return str(raw.get("mm_vision_tower") or "") if is_original(raw) else ""


# Of the original release's ``config.json``, beside LLaMA's own fields.
ORIGINAL_FIELDS = Fields(
    config_class="",
    read={
        "mm_vision_tower": text,
        "mm_vision_select_layer": whole(-MOST_LAYERS, MOST_LAYERS),
        "mm_vision_select_feature": word(("patch", "cls_patch")),
        "mm_projector_type": only("mlp2x_gelu"),
        "mm_use_im_start_end": only(False),
        "mm_use_im_patch_token": only(False),
        "mm_patch_merge_type": only("flat", None),
        "mm_resampler_type": only(None),
        "image_aspect_ratio": only("pad", "square", None),  # how images are fitted is `model.image_fit`
        "s2": only(False, None),
    },
    harmless=frozenset(
        {
            # Widths follow from the tower; the rest is of LLaVA's own training.
            *("mm_hidden_size", "use_mm_proj", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler"),
            *("tune_mm_mlp_adapter", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "mm_tunable_parts"),
            *("mm_projector_lr", "mm_vision_tower_lr", "tokenizer_model_max_length", "tokenizer_padding_side"),
            *("image_grid_pinpoints", "s2_scales", "image_crop_resolution", "image_split_resolution"),
        }
    ),
)


# Of an original release's ``config.json`` written by other tools; -200 is LLaVA's own mark in prompts, no token.
_IMAGE_TOKEN_KEYS = ("image_token_index", "image_token_id", "ignore_index")


def _image_and_pad(
    raw: Mapping[str, Any], read_vocabulary: Callable[[], Mapping[str, int]], rows: int, where: str
) -> tuple[int, int]:
    """Ids of ``<image>`` and ``<pad>``: those of the tokenizer, and where it has none its next ones, as the
    conversion to Hugging Face's layout adds them.

    Args:
        read_vocabulary: Gives the tokens of the release's tokenizer; none where it has no tokenizer.
        rows: Of its vocabulary.

    Raises:
        UserError: ``config.json`` states something that is no token.
    """
    stated = raw.get("image_token_index", raw.get("image_token_id"))
    if whole(-MOST_TOKENS, MOST_TOKENS, null=True)(stated):
        raise UserError(f"image_token_index is {shown(stated)}, and must be a token's id", where=where)
    vocabulary = read_vocabulary()
    following = max(vocabulary.values(), default=rows - 1) + 1
    image = stated if stated is not None and stated >= 0 else vocabulary.get(IMAGE_PLACEHOLDER)
    if image is None:
        image, following = following, following + 1
    elif image == following:
        following += 1
    return image, vocabulary.get(PAD, following)


def with_tower(
    raw: dict[str, Any],
    tower: dict[str, Any] | None,
    where: str,
    vocabulary: Callable[[], Mapping[str, int]] = dict,
) -> dict[str, Any]:
    """The Hugging Face configuration of an original release, or of a model that gets another CLIP tower.

    Args:
        raw: ``config.json`` of either layout.
        tower: ``config.json`` of the CLIP directory, if one was given.
        vocabulary: Reads the tokens of the model's tokenizer; asked for an original release alone, which does not say
            where its image token is.

    Raises:
        UserError: a tower that is not CLIP's, or an original release's option that LLaVA-1.5 does not have.
    """
    vision: dict[str, Any] = {}
    if tower is not None:
        if tower.get("model_type", "clip") not in ("clip", "clip_vision_model"):
            raise UserError(
                f"model_type is {shown(tower['model_type'])}, and must be clip or clip_vision_model",
                where="model.vision_tower",
                remedy="take a CLIP directory",
            )
        section = with_older_section(tower, "vision_config", CLIP_VISION_FIELDS).get("vision_config") or tower
        if not isinstance(section, dict):
            raise UserError(f"vision_config is {shown(section)}, and must be an object", where="model.vision_tower")
        about_file = ("architectures", "transformers_version")
        vision = {"vision_config": {k: v for k, v in section.items() if k not in about_file}}
        vision["vision_config"]["model_type"] = "clip_vision_model"
    if not is_original(raw):
        return {**raw, **vision}
    stated = {key: value for key, value in raw.items() if key in ORIGINAL_FIELDS.names}
    check_fields({"": ORIGINAL_FIELDS}, {"mm_projector_type": "linear", **stated}, where)
    left_out = ("architectures", "torch_dtype", "dtype", *_IMAGE_TOKEN_KEYS)
    decoder = {k: v for k, v in raw.items() if k not in stated and k not in left_out}
    # `check_fields` judges the decoder's fields where they stand now; the vocabulary is needed before.
    rows = raw.get("vocab_size", 32000)
    if whole(1, MOST_TOKENS)(rows):
        raise UserError(f"vocab_size is {shown(rows)}, and must be a whole number", where=where)
    image, pad = _image_and_pad(raw, vocabulary, rows, where)
    needed = max(image, pad) + 1
    padded = rows if needed <= rows else -(-needed // PADDED_VOCABULARY) * PADDED_VOCABULARY
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": image,
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "torch_dtype": raw.get("torch_dtype", raw.get("dtype", "float16")),
        "text_config": {**decoder, "model_type": "llama", "vocab_size": padded},
        **vision,
    }


def stored_rows(raw: dict[str, Any]) -> int | None:
    """Rows of vocabulary that an original release stores: fewer than its configuration here has; None: no release."""
    return raw.get("vocab_size", 32000) if is_original(raw) else None
