"""What a model directory holds, as one hash: it changes whenever a weight, a setting or a tokenizer does.

Every file that is read counts by its whole content. Small files are read each time; the hashes of large ones are kept
in one small file of the user's cache folder, beside what the file system said of each when it was hashed: size, time
of modification, time of change, inode and device. A file replaced in place under its old size and time of
modification (``cp -p``, ``rsync --times``, ``touch -r``) still has another time of change, which no program can set.
A file changed less than `SETTLED_SECONDS` ago is not kept: a second change within one tick of the file system's clock
would look like none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError

# Weights, configurations, processors, tokenizers (SentencePiece's and tiktoken's among them), chat templates.
# Pickled weights are never read, and so are no part of a model.
READ_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
KEPT_BYTES = 1 << 20  # smaller files are read each time
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system in use (FAT)
_PIECE_BYTES = 16 << 20  # read and hashed by one thread at a time
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CACHE_VERSION = 1

Stamp = list[int]  # size, mtime_ns, ctime_ns, inode, device


def directory_identity(directory: str | Path) -> str:
    """A hash of everything in a model directory that is read, by name and whole content.

    Symbolic links (a hub snapshot's) are followed; of the folders inside only that of further chat templates counts.

    Raises:
        UserError: a file cannot be read.
    """
    directory = Path(directory)
    everything = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    return files_identity(directory, [path for path in everything if path.suffix in READ_SUFFIXES and path.is_file()])


def tree_identity(directory: str | Path) -> str:
    """A hash of every file below a folder (a checkpoint's), by relative name and whole content.

    Raises:
        UserError: a file cannot be read.
    """
    directory = Path(directory)
    return files_identity(directory, [path for path in directory.rglob("*") if path.is_file()])


def files_identity(root: Path, files: Iterable[Path]) -> str:
    """A hash of `files` by their names under `root` and their whole contents: 16 hexadecimal digits.

    Raises:
        UserError: a file cannot be read.
    """
    ordered = sorted(files)
    digests = _file_digests(ordered)
    named = [
        (str(path.relative_to(root)).encode("utf-8", "surrogateescape").hex(), digest)
        for path, digest in zip(ordered, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def _file_digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's pieces, from the cache where the file is as it was."""
    cache_file = _cache_file()
    cached = _read_cache(cache_file)
    digests: list[str] = []
    fresh: dict[str, tuple[Stamp, str]] = {}
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        for path in files:
            real = os.path.realpath(path)
            try:
                stamp = _stamp(real)
                entry = cached.get(real)
                if entry is None or entry[0] != stamp:
                    settled = time.time_ns() - max(stamp[1], stamp[2]) > SETTLED_SECONDS * 1e9
                    entry = (stamp, _hash_file(real, stamp[0], threads))
                    if stamp[0] >= KEPT_BYTES and settled and _stamp(real) == stamp:
                        fresh[real] = entry
            except OSError as error:
                raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
            digests.append(entry[1])
    if fresh:
        _write_cache(cache_file, fresh)
    return digests


def _stamp(path: str) -> Stamp:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _hash_piece(path: str, offset: int) -> bytes:
    """SHA-256 of at most `_PIECE_BYTES` from `offset`; hashing releases the interpreter's lock."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        digest, left = hashlib.sha256(), _PIECE_BYTES
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _hash_file(path: str, size: int, threads: ThreadPoolExecutor) -> str:
    """SHA-256 over the size and the hashes of the pieces, which threads compute side by side."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for piece in threads.map(_hash_piece, [path] * (size // _PIECE_BYTES + 1), range(0, size + 1, _PIECE_BYTES)):
        digest.update(piece)
    return digest.hexdigest()


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "m3po_jax" / "file-hashes.json"


def _check(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_cache(path: Path) -> dict[str, tuple[Stamp, str]]:
    """The kept hashes by real path; nothing where the file is absent, damaged or another version's."""
    try:
        content = json.loads(path.read_text("utf-8"))
        files = content["files"]
        if content["version"] != _CACHE_VERSION or content["check"] != _check(files):
            return {}
        return {
            name: (stamp, digest) for name, (stamp, digest) in files.items() if _DIGEST.fullmatch(digest) is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_cache(path: Path, fresh: dict[str, tuple[Stamp, str]]) -> None:
    """Adds `fresh` to the cache and drops files that are gone; a folder that cannot be written keeps nothing."""
    files = {name: entry for name, entry in _read_cache(path).items() if os.path.exists(name)} | fresh
    content = {"version": _CACHE_VERSION, "check": _check(files), "files": files}
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    except (OSError, UnicodeEncodeError):
        return
