"""SHA-256 of files; a file is read once in a process, as long as the file system says that it is the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3po_jax.data.tables import file_hash

Stamp = tuple[int, int, int, int]
_memory: dict[str, tuple[Stamp, str]] = {}


def _stamp(path: Path) -> Stamp:
    """Size, times of modification and of change, inode: what differs once a file is another."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def checksum(path: Path) -> str | None:
    """SHA-256 (hex) of a file's bytes; None where there is no such file, or it cannot be read."""
    try:
        stamp = _stamp(path)
        remembered = _memory.get(str(path))
        if remembered is None or remembered[0] != stamp:
            remembered = _memory[str(path)] = (stamp, file_hash(path))
        return remembered[1]
    except OSError:
        return None


def checksums(root: Path, names: Iterable[str]) -> dict[str, str | None]:
    """`checksum` of files below `root`, by name; several are read at a time, since hashing lets go of the GIL."""
    ordered = list(names)
    with ThreadPoolExecutor(min(8, len(ordered) or 1)) as threads:
        return dict(zip(ordered, threads.map(lambda name: checksum(root / name), ordered), strict=True))
