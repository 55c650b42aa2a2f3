"""The metrics file of a training stage: one JSON object a line, in step with the checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to `path`; `truncate` drops what a restored run will write again.

    Times are not in it: a run stopped and continued leaves the same file as one never stopped.
    """

    def __init__(self, path: Path, *, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def truncate(self, step: int) -> None:
        """Keeps the lines up to `step`; a line cut by a crash is dropped, too."""
        if not self.enabled or not self.path.is_file():
            return
        kept = [line for line in self.path.read_bytes().split(b"\n") if _step(line) <= step]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        temporary.replace(self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, on disk when this returns; numbers that JSON lacks (NaN) become null."""
        if not self.enabled:
            return
        finite = {name: float(value) if math.isfinite(float(value)) else None for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


def _step(line: bytes) -> float:
    """The step of a line; infinite for what is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, for reports."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
