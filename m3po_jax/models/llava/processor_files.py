"""The processor's files of an exported LLaVA whose vision tower, or whose layout, is not the base directory's.

transformers and vLLM count image tokens by ``processor_config.json``, scale images by ``preprocessor_config.json``
and find images by the tokenizer's ``<image>``; an original release has none of the three.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.data.images import has_image_processor
from m3po_jax.data.templates import IMAGE_PLACEHOLDER
from m3po_jax.data.tokenizer import read_object, read_vocabulary
from m3po_jax.models.llava.weights import PAD

_PROCESSOR, _IMAGES, _TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"


def write_processor_files(raw_config: Mapping[str, Any], tower: Path, out_dir: Path) -> None:
    """Completes `out_dir`, a copy of the base directory's files, to a processor of the model that is exported.

    Args:
        raw_config: The exported ``config.json``.
        tower: The directory that the vision tower came from, whose image processor counts where it has one.

    Raises:
        UserError: a file that is no JSON object, or a tokenizer that cannot be read.
    """
    processor = read_object(out_dir / _PROCESSOR)
    if has_image_processor(tower):
        (out_dir / _IMAGES).unlink(missing_ok=True)
        processor.pop("image_processor", None)
        if (tower / _IMAGES).is_file():
            shutil.copyfile(tower / _IMAGES, out_dir / _IMAGES)
        elif images := read_object(tower / _PROCESSOR).get("image_processor"):
            _write(out_dir / _IMAGES, images)
    processor |= {
        "processor_class": "LlavaProcessor",
        "image_token": processor.get("image_token", IMAGE_PLACEHOLDER),
        "patch_size": raw_config["vision_config"].get("patch_size", 32),
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" drops
        "vision_feature_select_strategy": raw_config.get("vision_feature_select_strategy", "default"),
    }
    _write(out_dir / _PROCESSOR, processor)
    vocabulary = read_vocabulary(out_dir)
    tokens = {IMAGE_PLACEHOLDER: raw_config.get("image_token_index"), PAD: raw_config.get("pad_token_id")}
    _add_tokens(
        out_dir,
        {
            token: number
            for token, number in tokens.items()
            if vocabulary and token not in vocabulary and number is not None and number not in vocabulary.values()
        },
    )


def _add_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Makes special tokens known to every file of a tokenizer, under ids of their own."""
    if not tokens:
        return
    off = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    entries = {number: {"content": token, **off, "special": True} for token, number in sorted(tokens.items())}
    settings = read_object(folder / _TOKENIZER)
    stated = {str(number): entry for number, entry in entries.items()}
    settings["added_tokens_decoder"] = {**settings.get("added_tokens_decoder", {}), **stated}
    if PAD in tokens:
        settings["pad_token"] = PAD
    _write(folder / _TOKENIZER, settings)
    if (folder / "tokenizer.json").is_file():
        content = read_object(folder / "tokenizer.json")
        added = [*content.get("added_tokens", []), *({"id": number, **entry} for number, entry in entries.items())]
        _write(folder / "tokenizer.json", content | {"added_tokens": sorted(added, key=lambda token: token["id"])})
    if (folder / "added_tokens.json").is_file():
        _write(folder / "added_tokens.json", {**read_object(folder / "added_tokens.json"), **tokens})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
