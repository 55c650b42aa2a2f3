"""Images as a model takes them, kept in memory while there is room: one that several prompts show, or that the next
epoch and the next questions meet again, is decoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.data.schema import Image

Arrays = dict[str, np.ndarray]
KEPT_BYTES = 1 << 28  # two hundred images of 336 x 336 pixels


class KeptImages:
    """The arrays of images that were read last; from any thread.

    Args:
        limit: Bytes that they may take.
    """

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit = limit
        self._images: OrderedDict[Any, Future[Arrays]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return KeptImages, (self.limit,)

    def get(self, image: Image, root: Path, max_pixels: int, read: Callable[[Image], Arrays]) -> Arrays:
        """The arrays of an image, which nobody may change; a second thread that asks for it waits for the first.

        Args:
            root, max_pixels: As of `images.decode`: an image is another one under another root, and refused where
                more pixels were allowed before.
            read: Makes them, by one reader throughout.

        Raises:
            UserError: what `read` raises; nothing is kept then.
        """
        image = image.read()
        key = (_content(image, root), image.exif, max_pixels)
        with self._lock:
            future = self._images.get(key)
            is_first = future is None
            if future is None:
                future = self._images[key] = Future()
            else:
                self._images.move_to_end(key)
        if not is_first:
            if future.exception() is None:
                return future.result()
            return read(image)  # whose error names the row that asks
        try:
            arrays = read(image)
        except BaseException as error:
            with self._lock:
                del self._images[key]
            future.set_exception(error)
            raise
        for array in arrays.values():
            array.setflags(write=False)
        future.set_result(arrays)
        self._make_room(_size(arrays))
        return arrays

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._bytes += added
            for key in [key for key, future in self._images.items() if future.done()]:
                if self._bytes <= self.limit:
                    break
                self._bytes -= _size(self._images.pop(key).result())


def _content(image: Image, root: Path) -> Any:
    """What tells an image from others, and from what lay in its place before."""
    if image.bytes is not None:
        return hashlib.blake2b(image.bytes, digest_size=16).digest()
    path = root / (image.path or "")
    try:
        state = path.stat()
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return str(path)
    return str(path), state.st_mtime_ns, state.st_size, state.st_ino


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
