"""Images of Qwen2.5-VL and its successors: scaled so that whole patches fit, within limits of their pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image as PILImage

from m3po_jax.data.images import Colours, as_rgb, has_image_processor, image_settings
from m3po_jax.data.model_images import ImagePlan, Images, Size
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import shown
from m3po_jax.models.image_family import TYPICAL_SIZE, ImageFamily, ImageSettings, TowerCost
from m3po_jax.models.qwen2_5_vl.config import TowerConfig
from m3po_jax.models.qwen2_5_vl.model import GRID, PATCHES

MOST_ELONGATED = 200  # long side over short side, beyond which transformers refuses too
MOST_PIXELS = 2**26  # of a scaled image; published processors stop at 2^24
_CLASSES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # of that class, where a file states none


def scaled_size(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of `factor` near an image's aspect ratio, within the limits where that can be;
    the rule of Qwen2-VL's processor (`smart_resize`).

    Raises:
        UserError: an image that is too elongated.
    """
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise UserError(
            f"the image ({width} x {height} pixels) is more than {MOST_ELONGATED} times as long as it is wide",
            remedy="crop it, or drop the row",
        )
    wide, high = round(width / factor) * factor, round(height / factor) * factor
    if wide * high > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
        high = max(factor, math.floor(height / shrink / factor) * factor)
    elif wide * high < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        wide, high = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return wide, high


@dataclass(frozen=True)
class PatchReader:
    """Reads images as patches in the order of image tokens, see `models/qwen2_5_vl/grids.py`.

    Attributes:
        patch, merge: Pixels along a patch's side, and patches along an image token's.
        min_pixels, max_pixels: Limits of a scaled image; see `scaled_size`.
        resample: Pillow's filter number.
    """

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    resample: int
    colours: Colours

    def plan(self, size: Size) -> ImagePlan:
        """Tokens and the grid of patches."""
        return planned(*self._scaled(*size()), self.patch, self.merge)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return scaled_size(width, height, factor=self.patch * self.merge, **limits)

    def read(self, image: PILImage.Image) -> dict[str, np.ndarray]:
        """Normalised patches [n, 3·p·p], each (channel, row, column)."""
        image, p, m = as_rgb(image), self.patch, self.merge
        width, height = self._scaled(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), resample=PILImage.Resampling(self.resample))
        pixels = self.colours.normalized(image)
        pixels = pixels.reshape(height // p // m, m, p, width // p // m, m, p, 3)
        patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * p * p)
        return {PATCHES: np.ascontiguousarray(patches)}

    def key(self) -> str:
        return content_hash("patches", dataclasses.asdict(self))


def planned(width: int, height: int, patch: int, merge: int) -> ImagePlan:
    """Of an image that is scaled already."""
    high, wide = height // patch, width // patch
    grid = np.array([[high, wide]], np.int32)
    return ImagePlan(high * wide // merge**2, {PATCHES: (high * wide, 3 * patch**2)}, {GRID: grid})


def _limits(raw: Mapping[str, Any], settings: ImageSettings, where: str) -> tuple[int, int]:
    """The least and the most pixels: the recipe's, or the processor's by any of their names.

    Raises:
        UserError: they are no numbers of pixels, or leave nothing between them.
    """
    size = raw.get("size") or {}
    least = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or _MIN_PIXELS
    most = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or _MAX_PIXELS
    places = {"min_pixels": where, "max_pixels": where}
    if settings.min_pixels is not None:
        least, places["min_pixels"] = settings.min_pixels, "model.min_pixels"
    if settings.max_pixels is not None:
        most, places["max_pixels"] = settings.max_pixels, "model.max_pixels"
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PIXELS:
            raise UserError(
                f"{name} is {shown(value)}, and must be a number from 1 to {MOST_PIXELS}", where=places[name]
            )
    if least > most:
        raise UserError(
            f"min_pixels {least} is more than max_pixels {most}", where=places["max_pixels"], remedy="raise it"
        )
    return least, most


def reader_of(tower: TowerConfig, folders: Sequence[Path], settings: ImageSettings) -> PatchReader:
    """The reader that a model's processor files describe.

    Raises:
        UserError: no settings, malformed ones, or others than the configuration's.
    """
    folder = next((folder for folder in folders if has_image_processor(folder)), folders[0])
    raw, where = image_settings(folder, "image_processor_type", "patch_size", "min_pixels", "size")
    kind = raw.get("image_processor_type", _CLASSES[0])
    if kind not in _CLASSES:
        raise UserError(
            f"image_processor_type is {shown(kind)}, and must be one of {', '.join(_CLASSES)}",
            where=where,
            remedy="take both files from the same model",
        )
    if raw.get("do_resize", True) is not True or raw.get("do_convert_rgb", True) is not True:
        raise UserError("do_resize and do_convert_rgb must be true", where=where)
    defaults = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    of_tower = {"patch_size": tower.patch_size, "temporal_patch_size": tower.frames, "merge_size": tower.merge}
    for name, value in of_tower.items():
        if raw.get(name, defaults[name]) != value:
            raise UserError(
                f"{name} is {shown(raw.get(name, defaults[name]))}, config.json says {value}",
                where=where,
                remedy="take both files from the same model",
            )
    least, most = _limits(raw, settings, where)
    try:
        colours, resample = Colours.from_config(dict(raw)), int(PILImage.Resampling(raw.get("resample", 3)))
    except (TypeError, ValueError) as error:
        raise UserError(f"malformed image processor settings: {error}", where=where) from None
    return PatchReader(tower.patch_size, tower.merge, least, most, resample, colours)


def _typical(tower: TowerConfig) -> ImagePlan:
    limits = {"min_pixels": _MIN_PIXELS, "max_pixels": _MAX_PIXELS}
    size = scaled_size(*TYPICAL_SIZE, factor=tower.patch_size * tower.merge, **limits)
    return planned(*size, tower.patch_size, tower.merge)


def tower_cost(tower: TowerConfig) -> TowerCost:
    """Of a typical image: in layers with windows a patch meets those of its window alone."""
    positions = _typical(tower).shapes[PATCHES][0]
    full = len(tower.full_layers) if tower.window else tower.num_layers
    inside = min(tower.window**2 * tower.unit / positions, 1.0)
    layers = full + (tower.num_layers - full) * inside
    return TowerCost(1.0, 2.0 * layers * tower.hidden_size, positions)


def _count_features(config: Any, images: Images) -> Int[np.ndarray, " b"]:
    return np.sum(images[GRID][..., 0] * images[GRID][..., 1], axis=1) // config.vision.unit


def patch_images(feature_width: Callable[[Any], int]) -> ImageFamily:
    """What a family of this line says of images; its configuration's `vision` is a `TowerConfig`."""
    return ImageFamily(
        token_key="image_token_id",
        reader=lambda config, folders, settings: reader_of(config.vision, folders, settings),
        typical=lambda config: _typical(config.vision),
        tower_cost=lambda config: tower_cost(config.vision),
        feature_width=feature_width,
        count_features=_count_features,
        feature_settings=lambda config: (config.vision,),
        several_sizes=True,
        sizes="any size",
    )


QWEN3_VL_IMAGES = patch_images(lambda config: config.feature_width)
QWEN25_VL_IMAGES = patch_images(lambda config: config.vision.feature_width)
