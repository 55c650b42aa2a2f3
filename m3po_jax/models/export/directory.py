"""What every export is: a directory that appears whole or not at all, in types that other programs read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from m3po_jax.errors import UserError, nearest, system_failure
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.models.safetensors_io import DTYPES

AUTO = "auto"
_DTYPES: dict[str, np.dtype | None] = {
    **{AUTO: None},
    **{"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]},
}
EXPORT_DTYPES = tuple(_DTYPES)


def export_dtype(name: str) -> np.dtype | None:
    """The type of that name; None for ``auto``.

    Raises:
        UserError: an unknown name.
    """
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r}{nearest(name, _DTYPES)}", where="export")
    return _DTYPES[name]


@contextmanager
def atomic_directory(out_dir: Path, *, overwrite: bool, size: int = 0) -> Iterator[Path]:
    """A hidden sibling that becomes `out_dir` when the block succeeds and vanishes when it fails.

    On several hosts only process 0 writes; the others get a path that they must not touch.

    Args:
        size: Bytes that will be written at least, for the message of a full disk.

    Raises:
        UserError: a file is in the way, or files without `overwrite`; the disk is full, or nothing may be
            written there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError("a file is in the way", where=str(out_dir), remedy="choose another output directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise UserError("already holds files", where=str(out_dir), remedy="remove it or choose another directory")
    if not is_writer():
        yield out_dir
        return
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise system_failure(error, out_dir) or error from None
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        if out_dir.is_dir():
            previous = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
            os.replace(out_dir, previous)  # onto an empty directory: atomic
            os.replace(partial, out_dir)
            shutil.rmtree(previous)
        else:
            os.replace(partial, out_dir)
    except Exception as error:
        explained = None if isinstance(error, UserError) else system_failure(error, out_dir, size)
        if explained is not None:
            raise explained from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
