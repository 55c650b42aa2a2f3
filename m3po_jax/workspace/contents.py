"""Reads whatever exists of a run directory, of any version; what cannot be read is noted, not fatal.

Texts and images are read for the rows that the report shows only, so that a run of many gigabytes needs
little memory here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from m3po_jax.errors import UserError
from m3po_jax.workspace import layout
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.files import as_dict, as_number
from m3po_jax.workspace.layout import arms, rounds

_PAIR_NUMBERS = ("chosen_mas", "rejected_mas", "chosen_confidence", "rejected_confidence", "value")


@dataclass
class Candidates:
    """All candidates of a round, joined with their scores; one entry per candidate in every field."""

    ids: list[str]
    candidate: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    distinct: int  # texts that differ within their prompt
    scores: dict[str, np.ndarray]  # column -> float64, NaN where there is no score

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Pairs:
    """The numbers of all pairs of a round."""

    ids: list[str]
    chosen: np.ndarray
    rejected: np.ndarray
    numbers: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Round:
    """One round of the run, or of one of its comparison arms."""

    cell: Cell
    candidates: Candidates | None = None
    pairs: Pairs | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    drops: list[tuple[str, str]] = field(default_factory=list)  # (prompt id, reason)
    calibration: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    training_warnings: list[dict[str, Any]] = field(default_factory=list)
    prompt_count: int | None = None
    benchmarks: dict[str, BenchmarkContents] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.cell.round


@dataclass
class BenchmarkContents:
    """One benchmark's results and items of a round."""

    results: dict[str, Any]
    items: list[dict[str, Any]]


@dataclass
class RunContents:
    """What there is of a run directory; whatever is missing is empty."""

    path: Path
    config: dict[str, Any]
    config_text: str
    manifest: dict[str, Any]
    evaluation: dict[str, Any]
    rounds: list[Round]
    arms: dict[str, list[Round]]
    comparison: dict[str, Any]  # results of `m3po compare`
    problems: list[str]  # files that could not be read, in plain words

    def setting(self, key: str, default: Any = None) -> Any:
        """A dotted key of the saved recipe."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value


class Reader:
    """Tolerant readers that note every problem once."""

    def __init__(self, root: Path):
        self.root = root
        self.problems: list[str] = []

    def note(self, path: Path, what: str) -> None:
        line = f"{path.relative_to(self.root)}: {what}"
        if line not in self.problems:
            self.problems.append(line)

    def mapping(self, path: Path) -> dict[str, Any]:
        """A JSON object; empty where the file is missing or unreadable."""
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (ValueError, OSError, RecursionError):
            self.note(path, "not readable as JSON, left out")
            return {}
        if not isinstance(value, dict):
            self.note(path, "not a JSON object, left out")
        return as_dict(value)

    def _text(self, path: Path) -> str:
        """A file's text; empty where it is missing or unreadable."""
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            self.note(path, "cannot be read, left out")
            return ""

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """Rows of a JSON-lines file. A broken last line is a write in progress; any other is noted."""
        texts = self._text(path).split("\n")
        rows, broken, last = [], 0, len(texts) - 1
        for number, text in enumerate(texts):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                broken += number != last
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken += 1
        if broken:
            self.note(path, f"{broken} malformed line{'s' if broken > 1 else ''} left out")
        return rows

    def table(self, folder: Path, columns: Sequence[str] | None, ids: Iterable[str] | None = None) -> pa.Table | None:
        """All parquet shards of a folder (or one file), with the wanted columns that exist."""
        files = [folder] if folder.is_file() else sorted(folder.glob("*.parquet"))
        tables = []
        wanted = None if ids is None else pa.array(sorted(set(ids)), pa.string())
        for file in files:
            try:
                present = pq.read_schema(file).names
                if "id" not in present:
                    self.note(file, "has no column 'id', left out")
                    continue
                names = [name for name in present if columns is None or name in columns]
                chosen = None if wanted is None else pc.field("id").isin(wanted)
                tables.append(pq.read_table(file, columns=names, filters=chosen, partitioning=None))
            except (pa.ArrowException, OSError):
                self.note(file, "not readable as parquet, left out")
        if not tables:
            return None
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException:
            self.note(folder, "shards disagree about their columns, only the first is shown")
            return tables[0]

    def numbers(self, table: pa.Table, name: str, where: Path) -> np.ndarray:
        """A column as float64; NaN for nulls, and throughout where it is missing or not numeric."""
        if name in table.column_names:
            try:
                column = pc.fill_null(table.column(name).cast(pa.float64()), float("nan"))
                return np.asarray(column.to_numpy(), dtype=np.float64)
            except pa.ArrowException:
                self.note(where, f"column {name!r} is not numeric, left out")
        return np.full(len(table), np.nan)

    def candidates(self, cell: Cell) -> Candidates | None:
        columns = ["id", "candidate", "text", "token_ids", "finish_reason"]
        folder = cell.candidates.folder
        table = self.table(folder, columns)
        scores = self.table(cell.scores.folder, None)
        if table is None:
            if scores is None:
                return None
            table = scores.select([name for name in ("id", "candidate") if name in scores.column_names])
        ids = [str(value) for value in table.column("id").to_pylist()]
        index = self.numbers(table, "candidate", folder)
        candidate = np.nan_to_num(index, nan=-1).astype(np.int64)
        names = table.column_names
        tokens = np.full(len(ids), np.nan)
        if "token_ids" in names:
            lengths = pc.list_value_length(table.column("token_ids")).cast(pa.float64())
            tokens = np.asarray(pc.fill_null(lengths, float("nan")).to_numpy())
        truncated = np.zeros(len(ids), bool)
        if "finish_reason" in names:
            truncated = np.array([r == "length" for r in table.column("finish_reason").to_pylist()], bool)
        distinct = 0
        if "text" in names:
            texts = table.column("text").to_pylist()
            distinct = len({(i, _normalised(str(text))) for i, text in zip(ids, texts, strict=True)})
        return Candidates(ids, candidate, tokens, truncated, distinct, self._join(ids, candidate, scores, cell))

    def _join(
        self, ids: list[str], candidate: np.ndarray, scores: pa.Table | None, cell: Cell
    ) -> dict[str, np.ndarray]:
        if scores is None:
            return {}
        score_ids = [str(value) for value in scores.column("id").to_pylist()]
        index = np.nan_to_num(self.numbers(scores, "candidate", cell.scores.folder), nan=-1).astype(np.int64)
        row_of = {key: row for row, key in enumerate(zip(score_ids, index.tolist(), strict=True))}
        rows = np.array([row_of.get(key, -1) for key in zip(ids, candidate.tolist(), strict=True)], np.int64)
        joined = {}
        for name in scores.column_names:
            if name in ("id", "candidate", "abstained"):
                continue
            values = self.numbers(scores, name, cell.scores.folder)
            joined[name] = np.where(rows >= 0, values[np.maximum(rows, 0)], np.nan) if len(values) else values
        return joined

    def pairs(self, cell: Cell) -> Pairs | None:
        where = cell.selection.folder
        table = self.table(where, ["id", "chosen_candidate", "rejected_candidate", *_PAIR_NUMBERS])
        if table is None:
            return None
        chosen, rejected = (
            np.nan_to_num(self.numbers(table, name, where), nan=-1).astype(np.int64)
            for name in ("chosen_candidate", "rejected_candidate")
        )
        numbers = {name: self.numbers(table, name, where) for name in _PAIR_NUMBERS}
        return Pairs([str(value) for value in table.column("id").to_pylist()], chosen, rejected, numbers)

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        """Metrics in the order of steps; where a resumed run wrote a step again, the later row counts."""
        by_step: dict[float, dict[str, Any]] = {}
        for row in self.lines(path):
            step = as_number(row.get("step"))
            if step is not None:
                by_step[step] = row
        return [by_step[step] for step in sorted(by_step)]

    def prompts(self, cell: Cell, columns: Sequence[str], ids: Iterable[str] | None = None) -> pa.Table | None:
        """What a round's selection kept of its prompts."""
        file = cell.folder / layout.PROMPTS
        return self.table(file, columns, ids) if file.is_file() else None

    def round(self, cell: Cell) -> Round:
        pairs, prompts = cell.selection.folder, self.prompts(cell, ["id"])
        benchmarks = {
            folder.name: BenchmarkContents(self.mapping(folder / layout.RESULTS), self.lines(folder / layout.ITEMS))
            for folder in (evaluation.folder for evaluation in cell.evaluations())
        }
        return Round(
            cell,
            candidates=self.candidates(cell),
            pairs=self.pairs(cell),
            summary=self.mapping(pairs / layout.SUMMARY),
            drops=[(str(row.get("id")), str(row.get("reason"))) for row in self.lines(pairs / layout.DROPS)],
            calibration=self.mapping(cell.scores.folder / layout.CALIBRATION),
            metrics=self.metrics(cell.folder / layout.METRICS),
            training_warnings=self.lines(cell.folder / layout.WARNINGS),
            prompt_count=None if prompts is None else len(prompts),
            benchmarks={name: kept for name, kept in benchmarks.items() if kept.results or kept.items},
        )

    def rounds(self, arm: str | None = None) -> list[Round]:
        """All rounds of one system."""
        return [self.round(Cell(self.root, number, arm)) for number in rounds(self.root, arm)]

    def config(self, path: Path) -> tuple[dict[str, Any], str]:
        text = self._text(path)
        try:
            return as_dict(yaml.safe_load(text)), text
        except Exception as error:  # PyYAML raises many types; the rest of the run is still worth it
            self.note(path, f"not readable ({type(error).__name__}), left out")
            return {}, ""


def _normalised(text: str) -> str:
    """Two answers are the same if they differ in case and spaces only."""
    return " ".join(text.casefold().split())


def read_run(run_dir: Path) -> tuple[RunContents, Reader]:
    """Everything in a run directory but texts and images, and the reader that fetches those.

    Raises:
        UserError: no such directory, or nothing of a run in it.
    """
    if not run_dir.is_dir():
        raise UserError("no such run directory", where=str(run_dir), remedy="give the folder of a run")
    reader = Reader(run_dir)
    config, config_text = reader.config(run_dir / layout.CONFIG)
    run = RunContents(
        path=run_dir,
        config=config,
        config_text=config_text,
        manifest=reader.mapping(run_dir / layout.MANIFEST),
        evaluation=reader.mapping(run_dir / layout.EVALUATION),
        rounds=reader.rounds(),
        arms={arm: of_arm for arm in arms(run_dir) if (of_arm := reader.rounds(arm))},
        comparison=reader.mapping(run_dir / layout.RESULTS)
        or reader.mapping(run_dir / layout.COMPARISON / layout.RESULTS),
        problems=reader.problems,
    )
    if not (run.config or run.manifest or run.evaluation or run.rounds or run.arms or run.comparison):
        raise UserError(
            f"nothing to report: no {layout.CONFIG}, {layout.MANIFEST}, round-* or {layout.EVALUATION}",
            where=str(run_dir),
            remedy="give the folder of a run, or run a stage first",
        )
    return run, reader
