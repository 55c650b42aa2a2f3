"""Idefics3's and SmolVLM's images: square tiles of one size in rows and columns, then the whole image as another."""

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

from m3po_jax.data.images import Colours, as_rgb, has_image_processor, image_settings
from m3po_jax.data.model_images import TOKENS, ImagePlan, Images, Size
from m3po_jax.data.tables import content_hash
from m3po_jax.data.templates import Piece, Special
from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import LARGEST_IMAGE, shown
from m3po_jax.models.idefics3.config import Idefics3Config
from m3po_jax.models.idefics3.model import PIXELS
from m3po_jax.models.image_family import TYPICAL_SIZE, ImageFamily, ImageSettings, TowerCost

AROUND, WHOLE = Special("<fake_token_around_image>"), Special("<global-img>")
LONGEST = 4096  # of transformers' processor, whatever the files say
_NAMED_PLACES = 6  # rows and columns that the tokenizers have tokens for
_CLASSES = tuple(f"{kind}ImageProcessor{end}" for kind in ("Idefics3", "SmolVLM") for end in ("", "Fast", "Pil"))
_STANDARD = (0.5, 0.5, 0.5)


def scaled_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) of an image whose longer side becomes `longest`; the rule of Idefics3's processor."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height = max(height + height % 2, 1)
        if width > LONGEST:
            width, height = LONGEST, int(LONGEST / (width / height))
    else:
        width, height = int(longest * ratio), longest
        width = max(width + width % 2, 1)
        if height > LONGEST:
            width, height = int(LONGEST * (width / height)), LONGEST
    return max(width, 1), max(height, 1)


def tiled_size(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) in whole tiles that hold an image of that shape; the same processor's."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return width, math.ceil(int(width / ratio) / tile) * tile
    height = math.ceil(height / tile) * tile
    return math.ceil(int(height * ratio) / tile) * tile, height


@dataclass(frozen=True)
class TileReader:
    """Reads images.

    Attributes:
        tile: Side of a tile in pixels.
        tokens: Of each tile, and of the whole image.
        splits: Images are cut; else a square of the whole image is all.
        longest: What an image's longer side is scaled to before.
        resample: Pillow's filter number.
    """

    tile: int
    tokens: int
    splits: bool
    longest: int
    resample: int
    colours: Colours

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles; (0, 0): the whole image alone."""
        if not self.splits:
            return 0, 0
        wide, high = tiled_size(*scaled_size(width, height, self.longest), self.tile)
        return (high // self.tile, wide // self.tile) if max(wide, high) > self.tile else (0, 0)

    def plan(self, size: Size) -> ImagePlan:
        """Tiles, and what is written around their tokens."""
        return planned(self.tile, self.tokens, *(self._grid(*size()) if self.splits else (0, 0)))

    def read(self, image: PILImage.Image) -> dict[str, np.ndarray]:
        """Normalised pixels."""
        image, t = as_rgb(image), self.tile
        rows, columns = self._grid(*image.size)
        scaled = self._resized(image, *scaled_size(*image.size, self.longest))
        if self.splits:
            scaled = self._resized(scaled, *tiled_size(*scaled.size, t))
        boxes = [(x * t, y * t, (x + 1) * t, (y + 1) * t) for y in range(rows) for x in range(columns)]
        tiles = [*(scaled.crop(box) for box in boxes), self._resized(scaled, t, t)]
        return {PIXELS: np.stack([self.colours.normalized(tile) for tile in tiles])}

    def _resized(self, image: PILImage.Image, width: int, height: int) -> PILImage.Image:
        return image.resize((width, height), resample=PILImage.Resampling(self.resample))

    def key(self) -> str:
        return content_hash("tiles", dataclasses.asdict(self))


def planned(tile: int, tokens: int, rows: int, columns: int) -> ImagePlan:
    """Of an image with so many tiles: the text is that of Idefics3's processor."""
    written: list[Piece | int] = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            place = f"<row_{row}_col_{column}>"
            written += [AROUND, Special(place) if max(row, column) <= _NAMED_PLACES else place, tokens]
        written.append("\n")
    written += [*(["\n"] if rows else []), AROUND, WHOLE, tokens, AROUND]
    count = rows * columns + 1
    return ImagePlan(count * tokens, {PIXELS: (count, tile, tile, 3)}, written=tuple(written))


def _edge(raw: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """The longest edge of an entry.

    Raises:
        UserError: it is no number of pixels.
    """
    size = raw.get(name, {"longest_edge": default})
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    if isinstance(edge, bool) or not isinstance(edge, int) or not 1 <= edge <= LARGEST_IMAGE:
        raise UserError(f"{name} is {shown(size)}, and must have a longest_edge up to {LARGEST_IMAGE}", where=where)
    return edge


def _reader(config: Idefics3Config, folders: Sequence[Path], settings: ImageSettings) -> TileReader:
    """
    Raises:
        UserError: no settings, malformed ones, or others than the configuration's.
    """
    settings.check_square("idefics3")
    folder = next((folder for folder in folders if has_image_processor(folder)), folders[0])
    raw, where = image_settings(folder, "image_processor_type", "max_image_size", "size")
    kind, side = raw.get("image_processor_type", _CLASSES[0]), config.vision.image_size
    if kind not in _CLASSES:
        raise UserError(
            f"image_processor_type is {shown(kind)}, and must be one of {', '.join(_CLASSES)}",
            where=where,
            remedy="take both files from the same model",
        )
    if raw.get("do_resize", True) is not True or raw.get("do_convert_rgb") not in (True, None):
        raise UserError("do_resize and do_convert_rgb must be true", where=where)
    splits = raw.get("do_image_splitting", True)
    if not isinstance(splits, bool):
        raise UserError(f"do_image_splitting is {shown(splits)}, and must be true or false", where=where)
    longest, tile = _edge(raw, "size", 4 * 364, where), _edge(raw, "max_image_size", 364, where)
    if tile != side:
        raise UserError(
            f"max_image_size is {tile}, config.json says {side} x {side} pixels",
            where=where,
            remedy="take both files from the same model",
        )
    try:
        colours = Colours.from_config(raw, _STANDARD, _STANDARD)
        resample = int(PILImage.Resampling(raw.get("resample", PILImage.Resampling.LANCZOS)))
    except (TypeError, ValueError) as error:
        raise UserError(f"malformed image processor settings: {error}", where=where) from None
    return TileReader(tile, config.tokens_per_tile, splits, longest, resample, colours)


def _typical(config: Idefics3Config) -> ImagePlan:
    """Scaled to four tiles along the longer side, as published processors do."""
    tile = config.vision.image_size
    wide, high = tiled_size(*scaled_size(*TYPICAL_SIZE, 4 * tile), tile)
    return planned(tile, config.tokens_per_tile, high // tile, wide // tile)


def _tower_cost(config: Idefics3Config) -> TowerCost:
    """A patch meets those of its tile alone."""
    tower, tiles = config.vision.encoder, _typical(config).shapes[PIXELS][0]
    attention = 2.0 * tower.num_layers * tower.hidden_size / tiles
    return TowerCost(1.0, attention, tiles * config.vision.num_patches)


def _count_features(config: Idefics3Config, images: Images) -> Int[np.ndarray, " b"]:
    return np.sum(images[TOKENS], axis=1)


IDEFICS3_IMAGES = ImageFamily(
    token_key="image_token_id",
    reader=_reader,
    typical=_typical,
    tower_cost=_tower_cost,
    feature_width=lambda config: config.feature_width,
    count_features=_count_features,
    feature_settings=lambda config: (config.vision, config.shuffle),
    sizes="tiles",
)
