"""Pictures that a program holds in memory, as encoded files: what rows of prompts have."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from m3po_jax.errors import UserError


def encoded_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row whose pictures in memory (PIL images, arrays, `Path` objects) are encoded files; all else as it is.

    Raises:
        UserError: a picture that is none, or whose file cannot be read.
    """
    pictures = {name: row[name] for name in ("image", "images") if name in row}
    return {**row, **{name: _encoded_value(value, where) for name, value in pictures.items()}}


def _encoded_value(value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_encoded_value(item, where) for item in value]
    if isinstance(value, np.ndarray):
        try:
            value = PIL.Image.fromarray(value)
        except (TypeError, ValueError):
            raise UserError(
                f"an array of shape {list(value.shape)} and type {value.dtype} is no image",
                where=where,
                remedy="give [height, width, 3] of uint8",
            ) from None
    if isinstance(value, PIL.Image.Image):
        return _file_of(value, where)
    if not isinstance(value, Path):
        return value
    try:
        return value.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(value)) from None


def _file_of(image: PIL.Image.Image, where: str) -> bytes:
    """A lossless file of a picture with its orientation, which a photo that was opened has and PNG drops unasked."""
    if 0 in image.size:
        raise UserError("an image without a pixel", where=where)
    for kind in ("PNG", "TIFF"):  # CMYK, LAB and others are no PNG
        file = io.BytesIO()
        try:
            image.save(file, kind, exif=image.getexif())
        except (OSError, KeyError, ValueError):
            continue
        return file.getvalue()
    raise UserError(f"an image of mode {image.mode} cannot be kept", where=where, remedy="convert('RGB') it first")
