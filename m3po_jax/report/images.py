"""Bounded thumbnails of hostile images, as data URIs."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from m3po_jax.data import schema
from m3po_jax.data.images import decode
from m3po_jax.errors import UserError

MAX_PIXELS = 50_000_000  # refused before decoding
SIDES = (360, 256, 160, 96)  # longest side in pixels; the first at which all thumbnails fit the budget
BUDGET = 2_000_000  # bytes of all data URIs together


def _decode(data: bytes | None, side: int) -> Image.Image | None:
    """The picture that the models saw, at most `side` pixels long; None for bytes that are no readable image."""
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode(schema.Image(data), root=Path(), max_pixels=MAX_PIXELS, where="image", draft=(side, side))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    except UserError:  # no image may stop a report
        return None
    return image


def _encode(image: Image.Image | None, side: int) -> str | None:
    if image is None:
        return None
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def thumbnail(data: bytes | None, side: int = SIDES[0]) -> str | None:
    """A WebP data URI at most `side` pixels long, or None for bytes that are no readable image.

    The image is always decoded and encoded anew, so nothing of the original file (metadata, trailing bytes,
    scripts in SVG) reaches the page.
    """
    return _encode(_decode(data, side), side)


def thumbnails(images: Iterable[Any], budget: int = BUDGET) -> list[str | None]:
    """Data URIs of many encoded images, smaller the more there are, together within `budget` bytes.

    Images that do not fit even at the smallest size are left out from the end of the list.
    """
    decoded = [_decode(data, SIDES[0]) for data in images]
    uris: list[str | None] = []
    for side in SIDES:
        uris = [_encode(image, side) for image in decoded]
        if sum(len(uri) for uri in uris if uri) <= budget:
            return uris
    used = 0
    for index, uri in enumerate(uris):
        used += len(uri) if uri else 0
        if used > budget:
            uris[index] = None
    return uris
