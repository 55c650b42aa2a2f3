"""Errors that a user can mend.

Everything a user may get wrong (a file, a row, a setting) raises `UserError`; the command line prints it as
one line and exits with status 2. Any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """One clear line: where, what is wrong, how to mend it.

    Args:
        what: What is wrong, without a full stop.
        where: File, row id or configuration key, e.g. ``data/prompts.jsonl:17 (id 'cat-3')``.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        line = f"{where}: {what}" if where else what
        if remedy:
            line = f"{line}; {remedy}"
        super().__init__(" ".join(line.split()))


class Interrupted(Exception):
    """SIGTERM arrived and everything finished so far is saved; the same command continues from here."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a misspelt `name`, or the sorted list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


# No space on the device, a quota that is used up, and a file that has grown to its limit (`ulimit -f`).
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}
# Libraries in C++ hand such errors on as text: "... No space left on device [OS error 28: ENOSPC ...]".
_FULL_TEXT = re.compile(
    r"OS error (\d+)|\[Errno (\d+)\]|(No space left on device|Disk quota exceeded|File too large)"
)
_FULL_WORDS = dict(zip(("No space left on device", "Disk quota exceeded", "File too large"), FULL, strict=True))


def full_disk_number(error: BaseException | None) -> int | None:
    """The errno in `FULL` that an exception (or its cause, or what a library wrote into its text) stands for."""
    passed: set[int] = set()
    while error is not None and id(error) not in passed:
        passed.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return error.errno
        for code, bracketed, words in _FULL_TEXT.findall(str(error)):
            number = _FULL_WORDS[words] if words else int(code or bracketed)
            if number in FULL:
                return number
        error = error.__cause__ or error.__context__
    return None


def full_disk(number: int, place: str | Path, needed: int = 0) -> UserError:
    """The line for a disk that is full: the place, the space needed there and the space that is left.

    Args:
        number: Of `FULL`.
        needed: Bytes, as far as they are known; 0: they are not.
    """
    folder = Path(place).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = f"{_megabytes(shutil.disk_usage(folder).free)} are free"
    except OSError:
        free = ""
    size = f"at least {_megabytes(needed)} are needed" if needed else ""
    counts = ", ".join(filter(None, (size, free)))
    return UserError(
        f"{FULL[number]}" + (f" ({counts})" if counts else ""),
        where=str(place),
        remedy="make room there (`ulimit -f` may limit files too); nothing that was finished is lost, and the same "
        "command continues",
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@contextmanager
def full_disk_told(place: str | Path, needed: int = 0) -> Iterator[None]:
    """Turns a full disk, whoever reports it inside the block, into one line; see `full_disk`.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = full_disk_number(error)
        if number is None:
            raise
        raise full_disk(number, place, needed) from error
