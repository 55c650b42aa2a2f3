"""Byte strings on disk while a process lives: what rows need again and memory should not hold."""

from __future__ import annotations

import os
import tempfile

from m3po_jax.errors import UserError

Place = tuple[int, int]  # first byte, and how many


class Spool:
    """A temporary file without a name; it is gone when the process ends.

    Args:
        what: It holds, for messages.
    """

    def __init__(self, what: str):
        self._file = tempfile.TemporaryFile(prefix="m3po-spool-")  # noqa: SIM115 - as long as its readers
        self._what, self._end = what, 0

    def add(self, data: bytes) -> Place:
        """Stores `data`; one thread at a time.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"no room for a copy of {self._what} ({error.strerror})",
                where=tempfile.gettempdir(),
                remedy="set TMPDIR to a folder with as much space as they take",
            ) from None
        place = self._end, len(data)
        self._end += len(data)
        return place

    def get(self, place: Place) -> bytes:
        """What was stored at a place; from any thread."""
        start, size = place
        return os.pread(self._file.fileno(), size, start)
