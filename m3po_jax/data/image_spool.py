"""Encoded images on disk while a process lives, so that shuffled rows find theirs at once and none stays in memory.

Published parquet files have row groups of a thousand images and more, of which a reader must unpack all for one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile

from m3po_jax.errors import UserError


class ImageSpool:
    """Byte strings in a temporary file without a name, each distinct one once; it is gone when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="m3po-images-")  # noqa: SIM115 - as long as its readers
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def add(self, data: bytes) -> str:
        """Stores `data` and returns its SHA-256.

        Raises:
            UserError: the disk is full.
        """
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            try:
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"no room for a copy of the pairs' images ({error.strerror})",
                    where=tempfile.gettempdir(),
                    remedy="set TMPDIR to a folder with as much space as the images take",
                ) from None
            self._places[key] = (self._end, len(data))
            self._end += len(data)
        return key

    def get(self, key: str) -> bytes:
        """The bytes whose SHA-256 is `key`; from any thread."""
        start, size = self._places[key]
        return os.pread(self._file.fileno(), size, start)
