"""Encoded images on disk while a process lives, so that shuffled rows find theirs at once and none stays in memory.

Published parquet files have row groups of a thousand images and more, of which a reader must unpack all for one; text
files have images as base64 in their rows.
"""

from __future__ import annotations

import hashlib

from m3po_jax.data.schema import Image, StoredImage
from m3po_jax.data.spool import Place, Spool


class ImageSpool:
    """Encoded images in a spool, each distinct one once."""

    def __init__(self) -> None:
        self._spool = Spool("the images that rows hold")
        self._places: dict[str, Place] = {}

    def add(self, data: bytes) -> str:
        """Stores `data` and returns its SHA-256.

        Raises:
            UserError: the disk is full.
        """
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            self._places[key] = self._spool.add(data)
        return key

    def get(self, key: str) -> bytes:
        """The bytes whose SHA-256 is `key`; from any thread."""
        return self._spool.get(self._places[key])


class SpooledImages:
    """Images of rows that hold their bytes, in a spool that is made when the first comes."""

    def __init__(self) -> None:
        self._spool: ImageSpool | None = None

    def keep(self, images: tuple[Image, ...]) -> tuple[Image, ...]:
        """The same images, none of which holds bytes.

        Raises:
            UserError: the disk is full.
        """
        return tuple(image if image.bytes is None else self._kept(image, image.bytes) for image in images)

    def _kept(self, image: Image, data: bytes) -> StoredImage:
        self._spool = self._spool or ImageSpool()
        return StoredImage(self, (self._spool.add(data), image.path, image.exif), 0)

    def images(self, place: tuple[str, str | None, str]) -> tuple[Image]:
        key, path, exif = place
        assert self._spool is not None
        return (Image(self._spool.get(key), path, exif),)
