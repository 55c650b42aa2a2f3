"""The directory of a comparison: its recipe, its tables and report; the seeds' runs lie in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.config import Recipe
from m3po_jax.data.tables import write_json
from m3po_jax.recipes import to_yaml
from m3po_jax.workspace import layout
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.files import write_text


class ComparisonDirectory(RunDirectory):
    """Where a recipe's comparison lies."""

    @classmethod
    def of(cls, recipe: Recipe) -> ComparisonDirectory:
        return cls(RunDirectory.of(recipe).root / layout.COMPARISON)

    def save_recipe(self, recipe: Recipe) -> None:
        write_text(self.config, to_yaml(recipe))

    def save(self, results: Mapping[str, Any], times: Mapping[str, Any], text: str) -> None:
        """Writes the tables; seconds have a file of their own, as they never repeat."""
        write_json(self.root / layout.RESULTS, results)
        write_json(self.root / layout.TIMES, times)
        write_text(self.root / layout.RESULTS_TEXT, text)

    def text(self) -> str:
        """The tables as Markdown."""
        return (self.root / layout.RESULTS_TEXT).read_text(encoding="utf-8")
