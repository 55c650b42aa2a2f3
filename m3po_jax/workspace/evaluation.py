"""What the evaluation of one system on one benchmark leaves: its records of the questions, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3po_jax.data import tables
from m3po_jax.workspace.checksums import checksums
from m3po_jax.workspace.files import read_json
from m3po_jax.workspace.layout import ITEMS, RESULTS
from m3po_jax.workspace.records import Artifact


class Evaluation(Artifact):
    """One benchmark's folder. The results are written last, and mark that it is finished."""

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULTS).is_file()

    def results(self) -> dict[str, Any] | None:
        """None where the benchmark has not been evaluated."""
        return read_json(self.folder / RESULTS)

    def items(self) -> list[dict[str, Any]] | None:
        """The records of the questions, in order; None where the benchmark has not been evaluated."""
        if self.results() is None:
            return None
        return [row for _, row in tables.read_json_lines(self.folder / ITEMS)]

    def save(self, items: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> None:
        tables.write_json_lines(self.folder / ITEMS, items)
        tables.write_json(self.folder / RESULTS, results)

    def outputs(self) -> dict[str, str]:
        """File -> SHA-256 of what `save` wrote."""
        return {name: value or "" for name, value in checksums(self.folder, [ITEMS, RESULTS]).items()}
