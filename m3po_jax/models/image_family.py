"""What a family says of images beside its model: how they are read, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from m3po_jax.data.images import ImageFit
from m3po_jax.data.model_images import ImagePlan, ImageReader, Images
from m3po_jax.errors import UserError

TYPICAL_SIZE = (640, 480)  # width and height of most of COCO's images


@dataclass(frozen=True)
class ImageSettings:
    """What a recipe says of how images are read.

    Attributes:
        fit: How LLaVA's images are fitted to their square (`model.image_fit`); Gemma 3 stretches them.
        min_pixels, max_pixels: Of a scaled image, where a family's images have several sizes; None: the model
            directory's own.
        pan_and_scan: Elongated images are followed by crops of them, where a family offers that.
    """

    fit: ImageFit = "pad"
    min_pixels: int | None = None
    max_pixels: int | None = None
    pan_and_scan: bool = False

    def check_square(self, family: str) -> None:
        """UserError where limits are given to a family whose images are all of one size."""
        for name in ("min_pixels", "max_pixels"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"images of a {family} model are all of one size", where=f"model.{name}", remedy="remove it"
                )


@dataclass(frozen=True)
class TowerCost:
    """What the linear layers of a vision tower do not say about its arithmetic.

    Attributes:
        share: Of the weights of its linear layers, those that run (layers above the one that is read do not).
        attention: Multiply-adds per (query, key) pair, of all layers that run.
        positions: Of a typical image.
    """

    share: float
    attention: float
    positions: int


@dataclass(frozen=True)
class ImageFamily:
    """Functions of a configuration.

    Attributes:
        token_key: The field of ``config.json`` that names the image token, for messages.
        reader: ``(config, folders, settings) -> reader``: from the settings of an image processor in the first of
            the folders that has one. Raises UserError.
        typical: What an image of `TYPICAL_SIZE` becomes under the family's usual settings: for estimates and plans.
        tower_cost: See `TowerCost`.
        feature_width: Of what `VisionLanguageModel.encode_images` gives.
        count_features: ``(config, images of a batch on the host) -> [b]``: the features that each row's images have.
        several_sizes: Images take several numbers of tokens, and each token a whole number of a float array.
        feature_settings: What that depends on beside the tower's weights.
        placeholder: What chat templates write for an image, where it is another token than the image token; "": it
            is not. The plan says what stands there in the prompt.
        pan_and_scan: The family offers it, see `ImageSettings`.
        sizes: What images become, in the words of docs/models.md.
        marks: The tokens around images whose ids a configuration states, by their spelling.
    """

    token_key: str
    reader: Callable[[Any, Sequence[Path], ImageSettings], ImageReader]
    typical: Callable[[Any], ImagePlan]
    tower_cost: Callable[[Any], TowerCost]
    feature_width: Callable[[Any], int]
    count_features: Callable[[Any, Images], Int[np.ndarray, " b"]]
    feature_settings: Callable[[Any], tuple[Any, ...]]
    several_sizes: bool = False
    placeholder: str = ""
    pan_and_scan: bool = False
    sizes: str = "one size"
    marks: Callable[[Any], Mapping[str, int]] = lambda config: {}
