"""Reading and writing the small files of a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError


def is_writer() -> bool:
    """Whether this process writes what all processes know."""
    return jax.process_index() == 0


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it when complete."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where it is absent.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})", where=str(path), remedy="delete it and repeat") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where it is absent, garbled or something else, as a report needs it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
