"""LLaVA-1.5's stored tensors, in every layout that they are published in.

The canonical layout is transformers 4.x's (4.36 to 4.51), which is also what export writes. Read too: 4.52
and later (``model.language_model.…``), 5.x (a vision tower without ``vision_model``), the original release
(``model.mm_projector.0.…``, a bare LLaMA, usually no vision tower).
"""

from __future__ import annotations

import re
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models import tensor_names
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
_TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
PADDED_VOCABULARY = 64  # the HF conversion rounds 32,000 + <image> + <pad> up to a multiple of this


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


def with_tower(raw: dict[str, Any], tower: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """The Hugging Face configuration of an original release, or of a model that gets another CLIP tower.

    Args:
        raw: ``config.json`` of either layout.
        tower: ``config.json`` of the CLIP directory, if one was given.

    Raises:
        UserError: an original release's option that LLaVA-1.5 does not have.
    """
    if tower is not None:
        tower = {**(tower.get("vision_config") or tower), "model_type": "clip_vision_model"}
        tower = {key: value for key, value in tower.items() if key not in ("architectures", "transformers_version")}
    if not is_original(raw):
        return raw if tower is None else {**raw, "vision_config": tower}
    projector = raw.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu" or raw.get("mm_use_im_start_end") or raw.get("mm_use_im_patch_token"):
        raise UserError(
            f"mm_projector_type {projector!r} or its image marker tokens are not LLaVA-1.5's",
            where=where,
            remedy="LLaVA-1.5 has mlp2x_gelu and no marker tokens",
        )
    select = {"patch": "default", "cls_patch": "full"}.get(raw.get("mm_vision_select_feature", "patch"))
    if select is None:
        raise UserError(f"mm_vision_select_feature {raw['mm_vision_select_feature']!r} is unknown", where=where)
    vocabulary = int(raw.get("vocab_size", 32000))
    text = {key: raw[key] for key in _TEXT_KEYS if raw.get(key) is not None}
    padded = -(-(vocabulary + 2) // PADDED_VOCABULARY) * PADDED_VOCABULARY
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": vocabulary,
        "pad_token_id": vocabulary + 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": int(raw.get("mm_vision_select_layer", -2)),
        "vision_feature_select_strategy": select,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "torch_dtype": raw.get("torch_dtype", "float16"),
        "text_config": {"model_type": "llama", **text, "vocab_size": padded},
        **({"vision_config": tower} if tower is not None else {}),
    }
