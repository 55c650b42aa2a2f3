"""Images as a server gets them."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

from PIL import Image as PILImage

from m3po_jax.data import schema
from m3po_jax.data.images import decode, picture_hash


@dataclasses.dataclass
class Picture:
    """One image as a server gets it: a JPEG of bounded size, encoded when it is first needed."""

    encoded: bytes
    where: str
    max_side: int
    max_pixels: int
    _url: str = ""

    @property
    def digest(self) -> str:
        """Stands for the image in a cache key: of the original, so that an encoder's update pays nothing again."""
        return f"sha256:{picture_hash(self.encoded)}@{self.max_side}"

    @property
    def url(self) -> str:
        if not self._url:
            image = decode(
                schema.Image(bytes=self.encoded), root=Path(), max_pixels=self.max_pixels, where=self.where
            )
            image.thumbnail((self.max_side, self.max_side), PILImage.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=90)
            self._url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        return self._url


def grey_square(side: int = 224) -> bytes:
    """An encoded image that nobody refuses to look at."""
    buffer = io.BytesIO()
    PILImage.new("RGB", (side, side), (128, 128, 128)).save(buffer, format="PNG")
    return buffer.getvalue()
