"""Arrays of images as batches of models with square images have them, and a base for processors of tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import numpy as np

from m3po_jax.data.model_images import ImagePlan, Images, ProcessedImage
from m3po_jax.data.schema import Prompt, PromptTokens
from m3po_jax.models.forward import EncodedImages, encode_images


def shown(pixels: Any, tokens: int) -> Images | None:
    """Of pixels [b, m, h, w, 3], or features [b, m, n, v], of images that take so many tokens each."""
    if pixels is None:
        return None
    counts = {"tokens": np.full(pixels.shape[:2], tokens, np.int32)}
    if pixels.ndim == 5:
        return counts | {"pixels": pixels}
    return counts | {"features": pixels.reshape(pixels.shape[0], -1, pixels.shape[-1])}


def after_tower(model: Any, images: Images) -> Images:
    """The same images with the features that the model's tower makes of them in place of their pixels."""
    features = jax.jit(model.encode_images)(images)
    return {"tokens": images["tokens"], "features": np.asarray(features)}


class SquareImages(ABC):
    """The part of a processor that reads images, of which a subclass says `image_shape`, `tokens_per_image` and
    `pixel_values` [m, h, w, 3]."""

    image_shape: tuple[int, int, int]
    tokens_per_image: int
    image_buckets = None

    @abstractmethod
    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Its ids."""

    def tokenise(self, prompt: Prompt) -> PromptTokens:
        """Nobody reads its ids: `encode_prompt` makes them anew."""
        return PromptTokens(np.zeros(0, np.int32), "")

    @abstractmethod
    def pixel_values(self, prompt: Prompt) -> np.ndarray:
        """Of its images."""

    def image_plans(self, prompt: Prompt) -> list[ImagePlan]:
        return [ImagePlan(self.tokens_per_image, {"pixels": (1, *self.image_shape)}) for _ in prompt.images]

    def images(self, prompt: Prompt) -> tuple[ProcessedImage, ...]:
        if not prompt.images:
            return ()
        pixels = self.pixel_values(prompt)
        return tuple(plan.filled(pixels=x[None]) for plan, x in zip(self.image_plans(prompt), pixels, strict=True))

    def absent_images(self, prompt: Prompt) -> tuple[ProcessedImage, ...]:
        return tuple(plan.absent for plan in self.image_plans(prompt))


def encoded(model: Any, pixels: Any) -> EncodedImages | None:
    """Pixels [b, m, h, w, 3] after a LLaVA's tower."""
    return encode_images(model, shown(pixels, model.config.tokens_per_image))
