"""Any Pillow image as 8-bit RGB with the colours that its file means.

Where Pillow's own conversion is right, this is it (and `transformers`', which calls it). It is not for deep images:
`convert("RGB")` cuts 16-bit grey values at 255, so that most of them turn white, and compares the transparent
colour of a PNG with samples of another scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image as PILImage

from m3po_jax.errors import UserError

_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # TIFF tags
# EXIF orientation -> what puts the picture upright (as PIL.ImageOps.exif_transpose).
_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


def orientation(image: PILImage.Image) -> int:
    """The EXIF orientation, 2 to 8; 1 where there is none, or none that can be read.

    Pillow turns a TIFF while it loads it and then knows of no orientation.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of a whole picture, of which Pillow's parsers raise many types
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def upright_turn(image: PILImage.Image) -> PILImage.Transpose | None:
    """What turns the picture as its EXIF orientation says it is looked at; None where nothing is to turn."""
    return _UPRIGHT.get(orientation(image))


def sample_bits(image: PILImage.Image) -> int | None:
    """Bits of a grey sample as the file of an image that is not loaded yet has them; None: as its mode says."""
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = tags.get(_BITS_PER_SAMPLE)
        return int(bits[0]) if isinstance(bits, tuple) and bits else None
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if image.format == "PNG" and tiles else None
    return {"L;2": 2, "L;4": 4, "RGB;16B": 16, "I;16B": 16}.get(raw) if isinstance(raw, str) else None


def is_deep(image: PILImage.Image) -> bool:
    """Whether `to_rgb` scales its samples."""
    deep = image.mode in _GREY_16 or (image.mode == "I" and image.format == "PPM")
    return deep or (sample_bits(image) in (2, 4, 16) and "transparency" in image.info)


def to_rgb(image: PILImage.Image, *, bits: int | None = None) -> PILImage.Image:
    """`image` in mode RGB; transparency is laid on white, as `transformers` 5's `convert_to_rgb` does.

    16-bit grey is scaled by its whole range: v becomes round(255 v / 65535). (Of 16-bit colour Pillow takes the
    upper byte while it decodes.)

    Args:
        bits: Of a sample in the file, see `sample_bits`.

    Raises:
        UserError: 32-bit integers or floats, of which no file says what is white; a mode that is no colour.
    """
    if image.mode in _GREY_16 or (image.mode == "I" and image.format == "PPM"):
        return _from_grey_16(image, bits or 16)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UserError(
            f"its pixels are {kind} (mode {image.mode}), which do not say what is black and what is white",
            remedy="save it with 8 or 16 bits",
        )
    clear = image.info.get("transparency")
    if clear is not None and bits in (2, 4, 16) and image.mode in ("L", "RGB"):
        # Pillow scales the samples to 8 bits and leaves the transparent colour as it is.
        largest = (1 << bits) - 1
        scaled = [value >> 8 if bits == 16 else value * 255 // largest for value in _listed(clear)]
        image = image.copy()
        image.info["transparency"] = scaled[0] if image.mode == "L" else tuple(scaled)
    if ("A" in image.getbands() and image.mode != "LAB") or clear is not None:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise UserError(f"its pixels are of mode {image.mode}", remedy="save it as RGB") from None


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [int(value)]


def _from_grey_16(image: PILImage.Image, bits: int) -> PILImage.Image:
    largest = (1 << bits) - 1
    values: Int[np.ndarray, "h w"] = np.asarray(image).astype(np.int64)
    grey = ((values.clip(0, largest) * 510 + largest) // (2 * largest)).astype(np.uint8)  # rounds halves up
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == 0:  # TIFF: 0 is white; Pillow inverts 8-bit samples only
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return PILImage.fromarray(grey).convert("RGB")
