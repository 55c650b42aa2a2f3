"""Reading and writing the small files of a run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError


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


def as_number(value: Any) -> float | None:
    """`value` as a finite float, or None (missing, text, a truth value, NaN, infinity)."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_dict(value: Any) -> dict[str, Any]:
    """`value` where it is a dictionary, an empty one elsewhere: a malformed part of a file is left out."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The dictionaries among the items of a list, nothing of what is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
