"""Gemma 3's images: a square of one size, and with pan-and-scan crops of elongated ones beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image as PILImage

from m3po_jax.data.images import Colours, ImageProcessor, as_rgb, has_image_processor, image_settings
from m3po_jax.data.model_images import TOKENS, ImagePlan, Images, Size
from m3po_jax.data.tables import content_hash
from m3po_jax.data.templates import Piece, Special
from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import shown
from m3po_jax.models.gemma3.config import Gemma3Config
from m3po_jax.models.gemma3.model import PIXELS
from m3po_jax.models.image_family import ImageFamily, ImageSettings, TowerCost

START, END = "<start_of_image>", "<end_of_image>"
# Of transformers' processor, whatever the files say: crops' least side in pixels, their most, and the least ratio of
# the sides of an image that is cropped.
CROP_SIDE, MOST_CROPS, ELONGATED = 256, 4, 1.2
_CLASSES = ("Gemma3ImageProcessor", "Gemma3ImageProcessorFast", "Gemma3ImageProcessorPil")
_STANDARD = (0.5, 0.5, 0.5)

Box = tuple[int, int, int, int]


def crops_of(width: int, height: int) -> list[Box]:
    """The crops (left, top, right, bottom) of an image along its longer side; none of one that is nearly square or
    whose crops would be too small. The rule of Gemma 3's processor (`pan_and_scan`)."""
    long, short = max(width, height), min(width, height)
    if long / short < ELONGATED:
        return []
    count = min(MOST_CROPS, max(2, min(long // CROP_SIDE, math.floor(long / short + 0.5))))
    side = math.ceil(long / count)
    if min(side, short) < CROP_SIDE:
        return []
    ends = [(side * place, min(side * (place + 1), long)) for place in range(count)]
    return [(start, 0, end, height) if width >= height else (0, start, width, end) for start, end in ends]


@dataclass(frozen=True)
class Gemma3Images:
    """Reads images.

    Attributes:
        processor: The pixel pipeline of a square.
        tokens: Of each square.
        pan_and_scan: Elongated images are followed by crops of them.
    """

    processor: ImageProcessor
    tokens: int
    pan_and_scan: bool

    def plan(self, size: Size) -> ImagePlan:
        """Without pan-and-scan the same for all sizes."""
        crops = len(crops_of(*size())) if self.pan_and_scan else 0
        return planned(self.processor.height, self.tokens, crops)

    def read(self, image: PILImage.Image) -> dict[str, np.ndarray]:
        """Normalised pixels."""
        image = as_rgb(image)
        crops = [image.crop(box) for box in crops_of(*image.size)] if self.pan_and_scan else []
        return {PIXELS: np.stack([self.processor(one, "stretch") for one in (image, *crops)])}

    def key(self) -> str:
        return content_hash(dataclasses.asdict(self.processor), "gemma3", self.pan_and_scan)


def planned(side: int, tokens: int, crops: int = 0) -> ImagePlan:
    """Of an image with so many crops: the text is that of Gemma 3's processor."""
    square: tuple[Piece | int, ...] = ("\n\n", Special(START), tokens, Special(END), "\n\n")
    written = square
    if crops:
        written = ("Here is the original image ", *square, " and here are some crops to help you see better ")
        for number in range(crops):
            written += (" ", *square) if number else square
    return ImagePlan((1 + crops) * tokens, {PIXELS: (1 + crops, side, side, 3)}, written=written)


def _reader(config: Gemma3Config, folders: Sequence[Path], settings: ImageSettings) -> Gemma3Images:
    """
    Raises:
        UserError: no settings, malformed ones, or others than the configuration's.
    """
    settings.check_square("gemma3")
    folder = next((folder for folder in folders if has_image_processor(folder)), folders[0])
    raw, where = image_settings(folder, "image_processor_type", "size")
    kind, side = raw.get("image_processor_type", _CLASSES[0]), config.vision.image_size
    if kind not in _CLASSES:
        raise UserError(
            f"image_processor_type is {shown(kind)}, and must be one of {', '.join(_CLASSES)}",
            where=where,
            remedy="take both files from the same model",
        )
    if raw.get("do_resize", True) is not True or raw.get("do_convert_rgb") not in (True, None):
        raise UserError("do_resize and do_convert_rgb must be true", where=where)
    size = raw.get("size", {"height": 224, "width": 224})
    if not isinstance(size, Mapping) or (size.get("height"), size.get("width")) != (side, side):
        raise UserError(
            f"size is {shown(size)}, config.json says {side} x {side} pixels",
            where=where,
            remedy="take both files from the same model",
        )
    try:
        colours = Colours.from_config(raw, _STANDARD, _STANDARD)
        resample = int(PILImage.Resampling(raw.get("resample", PILImage.Resampling.BILINEAR)))
    except (TypeError, ValueError) as error:
        raise UserError(f"malformed image processor settings: {error}", where=where) from None
    processor = ImageProcessor(side, side, side, resample, colours, "stretch")
    return Gemma3Images(processor, config.tokens_per_image, settings.pan_and_scan)


def _tower_cost(config: Gemma3Config) -> TowerCost:
    tower = config.vision.encoder
    return TowerCost(1.0, 2.0 * tower.num_layers * tower.hidden_size, config.vision.num_patches)


def _count_features(config: Gemma3Config, images: Images) -> Int[np.ndarray, " b"]:
    return np.sum(images[TOKENS], axis=1)


def _marks(config: Gemma3Config) -> Mapping[str, int]:
    return {START: config.image_start_id, END: config.image_end_id}


def _feature_settings(config: Gemma3Config) -> tuple[Any, ...]:
    return config.vision, config.tokens_per_side


GEMMA3_IMAGES = ImageFamily(
    token_key="image_token_index",
    reader=_reader,
    typical=lambda config: planned(config.vision.image_size, config.tokens_per_image),
    tower_cost=_tower_cost,
    feature_width=lambda config: config.vision.encoder.hidden_size,
    count_features=_count_features,
    feature_settings=_feature_settings,
    placeholder=START,
    marks=_marks,
    pan_and_scan=True,
    sizes="one size, crops",
)
