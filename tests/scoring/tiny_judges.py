"""Tiny models in Hugging Face layout: dual encoders from transformers, LLaVA judges from the quickstart's shape."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image as PILImage

sys.path.append(str(Path(__file__).parents[1] / "models"))
from hf_models import dual_encoder, llava, torch_and_transformers

from m3po_jax.config import MeshConfig, ModelConfig
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.models.layers import Linear
from m3po_jax.models.processor import PlainText
from m3po_jax.pipeline.models import InputLimits, Policy, load_policy

__all__ = [
    "END",
    "QUICKSTART",
    "SIDE",
    "TEXT_LENGTH",
    "dual_encoder_directory",
    "llava",
    "one_device",
    "png",
    "prompt",
    "tiny_policy",
    "torch_and_transformers",
    "word_level",
]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
SIDE, TEXT_LENGTH, END = 28, 12, 153


def one_device() -> Any:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def png(seed: int, side: int = SIDE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def prompt(seed: int, instruction: str = "Describe the image.", images: int = 1, **more: Any) -> Prompt:
    pictures = tuple(Image(bytes=png(100 * seed + number)) for number in range(images))
    return Prompt(f"prompt-{seed}", pictures, instruction, **more)


def dual_encoder_directory(folder: Path, kind: str, seed: int = 0) -> Any:
    """Writes a random CLIP or SigLIP with the quickstart's words; returns the transformers model."""
    text = {"vocab_size": 192, "max_position_embeddings": TEXT_LENGTH, "eos_token_id": END}
    model = dual_encoder(kind, seed=seed, text=text)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / "scorer" / name, folder)
    settings = json.loads((QUICKSTART / "scorer" / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def tiny_policy(seed: int = 0, scale: float = 6.0, path: str | Path = QUICKSTART / "base") -> Policy:
    """A LLaVA of the quickstart's shape; `scale` times the usual initialisation, so that answers differ."""
    config = ModelConfig(
        path=str(path),
        init="random" if Path(path) == QUICKSTART / "base" else "pretrained",
        dtype="float32",
        param_dtype="float32",
        template="plain",
        image_fit="stretch",
    )
    policy = load_policy(config, seed, one_device(), InputLimits())
    for _, linear in nnx.iter_modules(policy.model):
        if isinstance(linear, Linear) and config.init == "random":
            linear.kernel[...] = linear.kernel[...] * scale
    return policy


def word_level(words: list[str], split: str = "whitespace") -> PlainText:
    """A tokenizer of these words, from id 4 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", "<image>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    parts = {
        "whitespace": pre_tokenizers.WhitespaceSplit(),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="never"),
        "letters": pre_tokenizers.Split("", "isolated"),
    }
    tokenizer.pre_tokenizer = parts[split]
    return PlainText(tokenizer.to_str(), frozenset({1, 2, 3}), 0)
