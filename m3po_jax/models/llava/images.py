"""LLaVA-1.5's images: a square of one size, and as many tokens for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image as PILImage

from m3po_jax.data.images import ImageFit, ImageProcessor, has_image_processor
from m3po_jax.data.model_images import TOKENS, ImagePlan, Images, Size
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.models.image_family import ImageFamily, ImageSettings, TowerCost
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import PIXELS


@dataclass(frozen=True)
class LlavaImages:
    """Reads images.

    Attributes:
        processor: The pixel pipeline.
        fit: How an image is fitted to the square.
        tokens: Of each image.
    """

    processor: ImageProcessor
    fit: ImageFit
    tokens: int

    def plan(self, size: Size) -> ImagePlan:
        """The same for all sizes."""
        return ImagePlan(self.tokens, {PIXELS: (1, self.processor.height, self.processor.width, 3)})

    def read(self, image: PILImage.Image) -> dict[str, np.ndarray]:
        """Normalised pixels."""
        return {PIXELS: self.processor(image, self.fit)[None]}

    def key(self) -> str:
        return content_hash(dataclasses.asdict(self.processor), self.fit)


def _reader(config: LlavaConfig, folders: Sequence[Path], settings: ImageSettings) -> LlavaImages:
    """
    Raises:
        UserError: no settings, settings of another size than the configuration's, or limits of sizes.
    """
    settings.check_square("llava")
    side = config.vision.image_size
    folder = next((folder for folder in folders if has_image_processor(folder)), folders[0])
    processor = ImageProcessor.from_pretrained(folder)
    if (processor.height, processor.width) != (side, side):
        raise UserError(
            f"the image processor gives {processor.height} x {processor.width} pixels, config.json says {side}",
            where=str(folder),
            remedy="take both files from the same model",
        )
    return LlavaImages(processor, settings.fit, config.tokens_per_image)


def _typical(config: LlavaConfig) -> ImagePlan:
    side = config.vision.image_size
    return ImagePlan(config.tokens_per_image, {PIXELS: (1, side, side, 3)})


def _tower_cost(config: LlavaConfig) -> TowerCost:
    tower = config.vision.encoder
    used = max(layer if layer >= 0 else tower.num_layers + 1 + layer for layer in config.vision_feature_layers)
    positions = config.vision.num_patches + (config.vision.kind == "clip")
    return TowerCost(used / tower.num_layers, 2.0 * used * tower.hidden_size, positions)


def _count_features(config: LlavaConfig, images: Images) -> Int[np.ndarray, " b"]:
    return np.sum(images[TOKENS] > 0, axis=1) * config.tokens_per_image


LLAVA_IMAGES = ImageFamily(
    token_key="image_token_index",
    reader=_reader,
    typical=_typical,
    tower_cost=_tower_cost,
    feature_width=lambda config: config.feature_width,
    count_features=_count_features,
    feature_settings=lambda config: (config.vision, config.vision_feature_layers, config.keep_class_token),
)
