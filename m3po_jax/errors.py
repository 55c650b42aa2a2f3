"""Errors that a user can mend.

Everything a user may get wrong (a file, a row, a setting) raises `UserError`; the command line prints it as
one line and exits with status 2. Any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Exit statuses; sysexits.h: a launcher that sees EX_TEMPFAIL starts the same command again.
EXIT_USER_ERROR, EXIT_GATE_FAILED, EXIT_INTERRUPTED = 2, 3, 75

LONGEST_VALUE = 80  # characters of a quoted value; a longer one is cut in its middle
_LONGEST_PATH = 300  # a path is what its reader looks for
_LONGEST_TEXT = 1200
# A quoted value, as `repr` writes it (not the apostrophe of a word), or a long run without spaces.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)|\S{81,}""", re.DOTALL)


def shortened(text: str) -> str:
    """A message whose values are cut, so that no row's content fills a terminal.

    Values longer than `LONGEST_VALUE` keep their beginning and end; paths are left whole as far as they are any.
    """
    text = _QUOTED.sub(lambda value: _cut(value.group()), text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:900]} … {text[-250:]}"


def _cut(value: str) -> str:
    is_path = "/" in value and len(value) <= _LONGEST_PATH and not any(letter.isspace() for letter in value)
    if is_path or len(value) <= LONGEST_VALUE:
        return value
    return f"{value[:50]}…{value[-20:]}"


class UserError(Exception):
    """One clear line: where, what is wrong, how to mend it.

    Args:
        what: What is wrong, without a full stop.
        where: File, row id or configuration key, e.g. ``data/prompts.jsonl:17 (id 'cat-3')``.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        what, where = shortened(what), None if where is None else shortened(where)
        remedy = None if remedy is None else shortened(remedy)
        self.what, self.where, self.remedy = what, where, remedy
        line = f"{where}: {what}" if where else what
        if remedy:
            line = f"{line}; {remedy}"
        super().__init__(harmless(" ".join(line.split())))


class GateFailed(Exception):
    """The command did all its work, and the system that it made is worse than the recipe allows (`evaluate.gate`).

    Args:
        lines: What failed, a line each.
    """

    def __init__(self, lines: Iterable[str]):
        self.lines = [harmless(" ".join(line.split())) for line in lines]
        super().__init__("; ".join(self.lines))


class Interrupted(Exception):
    """Something that passes stopped the command (a signal, a server that is down); the same command continues.

    Everything finished so far is saved.
    """

    def __init__(self, reason: str = ""):
        super().__init__(harmless(" ".join(reason.split())))


def harmless(text: str) -> str:
    """`text` as a terminal may show it: what would act on the terminal, or hide or turn letters, as its escape.

    Servers, file names and rows may hold such characters: escape sequences, NUL, line ends that forge a line of ours,
    marks that turn the direction of writing, lone surrogates that no terminal can print.
    """
    return "".join(letter if _shows(letter) else ascii(letter)[1:-1] for letter in text)


def _shows(letter: str) -> bool:
    # The joiners belong to the spelling of some languages and to emoji.
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\u200c\u200d"


def nearest(name: str, names: Iterable[str], *, listed: bool = True) -> str:
    """`` (did you mean 'x'?)`` for a misspelt `name`, or the sorted list of `names`, unless not `listed`.

    Only a near name is suggested: one that few letters away, or that continues or ends it.
    """
    names = sorted(set(names))
    lowered = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.7)
    if close:
        return f" (did you mean {lowered[close[0]]!r}?)"
    return f" (known: {', '.join(names)})" if listed and names else ""


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
        free = f"{_size(shutil.disk_usage(folder).free)} are free"
    except OSError:
        free = ""
    size = f"at least {_size(needed)} are needed" if needed else ""
    counts = ", ".join(filter(None, (size, free)))
    return UserError(
        f"{FULL[number]}" + (f" ({counts})" if counts else ""),
        where=str(place),
        remedy="make room there (`ulimit -f` may limit files too); nothing that was finished is lost, and the same "
        "command continues",
    )


# What a file system answers where nothing may be written, or nothing can be read any more.
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG})


def system_failure(error: BaseException, place: str | Path = "", written: int = 0) -> UserError | None:
    """The line for an exception that a disk or its permissions explain; None for any other.

    Args:
        place: Where the work was; default: the file that the error names.
        written: Bytes of it, as far as they are known.
    """
    number = full_disk_number(error)
    named = str(place) or str(getattr(error, "filename", None) or "")
    if number is not None:
        return full_disk(number, named or ".", written)
    if isinstance(error, OSError) and error.errno in _REFUSED and named:
        return UserError(
            f"cannot be read or written ({error.strerror})",
            where=named,
            remedy="choose another place, or see to its permissions",
        )
    return None


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


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
