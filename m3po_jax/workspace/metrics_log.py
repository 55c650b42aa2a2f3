"""The JSON-lines files of a training stage, in step with its checkpoints.

`metrics.jsonl` and `warnings.jsonl` hold what is a function of data and settings: a run stopped and continued
leaves the same bytes as one never stopped. Times are in `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import full_disk_told


class MetricsLog:
    """Appends lines to `path`; `truncate` drops what a restored run will write again."""

    def __init__(self, path: Path, *, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def truncate(self, step: int) -> None:
        """Keeps the lines up to `step`; a line cut by a crash is dropped, too."""
        if not self.enabled or not self.path.is_file():
            return
        kept = [line for line in self.path.read_bytes().split(b"\n") if _step(line) <= step]
        with atomic_write(self.path) as file:
            file.write(b"".join(line + b"\n" for line in kept))

    def lines(self, step: int) -> list[dict[str, Any]]:
        """The whole lines up to `step` (on every process: all of them decide by it)."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return [json.loads(line) for line in content.split(b"\n") if _step(line) <= step]

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one line, on disk when this returns, and returns it; numbers that JSON lacks become null."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        if self.enabled:
            data = json.dumps(line, ensure_ascii=False) + "\n"
            with full_disk_told(self.path, len(data)), self.path.open("a", encoding="utf-8") as file:
                file.write(data)
        return line


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _step(line: bytes) -> float:
    """The step of a line; infinite for what is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, for reports; one that a crash has cut is left out, as `truncate` does."""
    return MetricsLog(path).lines(sys.maxsize)
