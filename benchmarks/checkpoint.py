"""The model and the inputs that every side of a benchmark gets: a random LLaVA in Hugging Face's format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True)
class Shapes:
    """What is run: `prompts` prompts of an image and `text_tokens`, `candidates` answers of `new_tokens` each."""

    prompts: int = 2
    text_tokens: int = 32
    candidates: int = 8
    new_tokens: int = 64
    vision: tuple[int, int, int, int, int] = (6, 256, 4, 336, 14)  # layers, width, heads, image, patch
    text: tuple[int, int, int, int] = (8, 512, 1376, 8)  # layers, width, MLP width, heads
    vocabulary: int = 32_064

    @property
    def image_tokens(self) -> int:
        return (self.vision[3] // self.vision[4]) ** 2

    @property
    def prefix(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def image_token_id(self) -> int:
        return self.vocabulary - 64

    @property
    def pad_token_id(self) -> int:
        return self.vocabulary - 63

    def as_json(self) -> dict[str, Any]:
        """For the report's `shapes`."""
        return {**asdict(self), "prefix": self.prefix, "dtype": "float32"}


FULL = Shapes()
TINY = Shapes(2, 16, 4, 8, (3, 32, 2, 56, 14), (2, 64, 128, 4), 512)
# Suffixes of the workloads' names, and what they change in the full shapes.
VARIATIONS: dict[str, dict[str, int]] = {
    "": {},
    "_k4": {"candidates": 4},
    "_k16": {"candidates": 16},
    "_new16": {"new_tokens": 16},
    "_new256": {"new_tokens": 256},
}


def shapes_of(workload: str, *, tiny: bool) -> Shapes:
    """The shapes that a workload's name asks for; tiny ones keep the same proportions."""
    changes = next(VARIATIONS[end] for end in sorted(VARIATIONS, key=len, reverse=True) if workload.endswith(end))
    if tiny:
        changes = {key: max(2, value // 8 if key == "new_tokens" else value // 2) for key, value in changes.items()}
    return replace(TINY if tiny else FULL, **changes)


def peer_config(shapes: Shapes) -> Any:
    """The configuration of a LLaVA of these shapes, in transformers."""
    import transformers

    layers, width, heads, image, patch = shapes.vision
    vision = transformers.CLIPVisionConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
    )
    layers, width, mlp, heads = shapes.text
    text = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=shapes.vocabulary,
        max_position_embeddings=2048,
        pad_token_id=shapes.pad_token_id,
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=shapes.image_token_id, dtype="float32"
    )


def save_checkpoint(shapes: Shapes, directory: Path) -> Path:
    """A random LLaVA of these shapes in `directory`, written by transformers itself."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(peer_config(shapes)).eval()
    model.save_pretrained(directory)
    return directory


def load_peer(directory: Path) -> Any:
    """The checkpoint in transformers: float32, one thread, no end token (so every answer has its full length)."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def load_ours(directory: Path) -> Any:
    """The checkpoint in m3po_jax, float32."""
    from m3po_jax.models.registry import load_model

    return load_model(directory, dtype="float32", param_dtype="float32").model


def prompts(shapes: Shapes) -> tuple[Int32[np.ndarray, "b p"], Float32[np.ndarray, "b 1 h w 3"]]:
    """Token ids (a begin token, the image's tokens, then text) and pixels of every prompt."""
    rng = np.random.default_rng(1)
    size = shapes.vision[3]
    token_ids = np.full((shapes.prompts, shapes.prefix), shapes.image_token_id, np.int32)
    token_ids[:, 0] = 1
    token_ids[:, 1 + shapes.image_tokens :] = rng.integers(3, 400, (shapes.prompts, shapes.text_tokens - 1))
    return token_ids, rng.normal(size=(shapes.prompts, 1, size, size, 3)).astype(np.float32)


def images_of(shapes: Shapes, pixels: Float32[np.ndarray, "b 1 h w 3"]) -> dict[str, np.ndarray]:
    """Pixels as m3po_jax wants them."""
    return {"tokens": np.full((len(pixels), 1), shapes.image_tokens, np.int32), "pixels": pixels}


def channels_first(pixels: Float32[np.ndarray, "b 1 h w 3"]) -> Float32[np.ndarray, "b 3 h w"]:
    """Pixels as transformers wants them."""
    return np.ascontiguousarray(pixels[:, 0].transpose(0, 3, 1, 2))


def answers(shapes: Shapes, count: int) -> Int32[np.ndarray, "b k t"]:
    """`count` random answers to every prompt, of the full length."""
    rng = np.random.default_rng(2)
    return rng.integers(3, 400, (shapes.prompts, count, shapes.new_tokens)).astype(np.int32)
