"""Evaluation tables, their interval and frontier charts, and the records of single benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scipy import stats

from m3po_jax.evaluation.metric import verdict
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.report.charts import Point, forest_chart, frontier_chart
from m3po_jax.report.figures import Figure
from m3po_jax.report.formatting import clip, format_compact, format_number, format_percent, format_span, slug
from m3po_jax.workspace.contents import BenchmarkContents, Round, RunContents
from m3po_jax.workspace.files import as_dicts, as_number

KINDS = {"arm": "", "frontier": "stop bias", "decoding": "decoding"}
ITEMS_SHOWN = 30
# What the columns of evaluation tables mean, by label; a label that two metrics share means the same in both.
TERMS = {column.label: column.meaning for metric in METRICS.values() for column in metric.columns}


@dataclass
class TableCell:
    """One value of an evaluation table."""

    text: str
    interval: str = ""
    verdict: str = ""  # better | worse | differs: outside the base's interval


@dataclass
class EvaluationTable:
    """One table of `evaluation.json`, judged against its base."""

    title: str
    note: str
    columns: list[dict[str, Any]]
    rows: list[dict[str, Any]]  # name, kind, kind_label, is_base, cells
    figures: list[Figure]
    has_verdicts: bool


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = as_number(value[0]), as_number(value[1])
    return None if low is None or high is None else (min(low, high), max(low, high))


def meanings(labels: Iterable[str]) -> list[tuple[str, str]]:
    """(term, what it means) of the columns with these labels, some of which begin with a benchmark's name."""
    labels = list(labels)
    return [
        (term, meaning)
        for term, meaning in TERMS.items()
        if any(f" {label}".endswith(f" {term}") for label in labels)
    ]


def evaluation_tables(evaluation: dict[str, Any]) -> list[EvaluationTable]:
    """The tables of `evaluation.json`, malformed parts left out."""
    tables = evaluation.get("tables")
    return [
        _table(table, index)
        for index, table in enumerate(tables if isinstance(tables, list) else [])
        if isinstance(table, dict)
    ]


def _table(table: dict[str, Any], index: int) -> EvaluationTable:
    columns = []
    for column in as_dicts(table.get("columns")):
        digits = as_number(column.get("digits"))
        columns.append(
            {
                "key": str(column.get("key")),
                "label": str(column.get("label") or column.get("key")),
                "digits": 3 if digits is None else min(max(int(digits), 0), 8),
                "better": column.get("better") if column.get("better") in ("higher", "lower") else None,
            }
        )
    rows: list[dict[str, Any]] = []
    for row in as_dicts(table.get("rows")):
        kind = row.get("kind") if row.get("kind") in KINDS else "arm"
        values, intervals = row.get("values"), row.get("intervals")
        rows.append(
            {
                "name": str(row.get("name")),
                "kind": kind,
                "kind_label": KINDS[str(kind)],
                "is_base": row.get("name") == "base",
                "values": values if isinstance(values, dict) else {},
                "intervals": intervals if isinstance(intervals, dict) else {},
            }
        )
    base = next((row for row in rows if row["is_base"]), None)
    for row in rows:
        row["cells"] = [_cell(row, base, column) for column in columns]
    return EvaluationTable(
        title=str(table.get("title") or "Evaluation"),
        note=str(table.get("note") or ""),
        columns=columns,
        rows=rows,
        figures=_frontier(rows, columns, index) + _forests(rows, base, columns, index),
        has_verdicts=any(cell.verdict for row in rows for cell in row["cells"]),
    )


def _cell(row: dict[str, Any], base: dict[str, Any] | None, column: dict[str, Any]) -> TableCell:
    key, digits = column["key"], column["digits"]
    value, interval = as_number(row["values"].get(key)), _interval(row["intervals"].get(key))
    text = format_span(*interval, digits) if interval and value is not None else ""
    judged = ""
    if base is not None and row is not base:
        judged = verdict(value, _interval(base["intervals"].get(key)), column["better"])
    return TableCell(format_number(value, digits), text, judged)


def _forests(
    rows: list[dict[str, Any]], base: dict[str, Any] | None, columns: list[dict[str, Any]], index: int
) -> list[Figure]:
    figures = []
    for column in columns:
        key = column["key"]
        points = [
            Point(
                row["name"],
                0.0,
                value,
                row["kind"] if not row["is_base"] else "base",
                _interval(row["intervals"].get(key)),
            )
            for row in rows
            if (value := as_number(row["values"].get(key))) is not None
        ]
        if len(points) < 2 or not any(point.interval for point in points):
            continue
        band = _interval(base["intervals"].get(key)) if base else None
        wish = f"{column['better']} is better" if column["better"] else ""
        chart = forest_chart(column["label"], points, band=band, digits=column["digits"], x_label=wish)
        figures.append(Figure(f"forest-{index}-{slug(key)}", column["label"], chart))
    return figures


def _frontier(rows: list[dict[str, Any]], columns: list[dict[str, Any]], index: int) -> list[Figure]:
    """The first metric to be lowered against recall (or cover), with the base's stop-bias sweep as a line."""
    cost = next((c for c in columns if c["better"] == "lower"), None)
    gain = next((c for c in columns if any(w in (c["key"] + c["label"]).lower() for w in ("recall", "cover"))), None)
    if cost is None or gain is None or not any(row["kind"] == "frontier" for row in rows):
        return []
    points = []
    for row in rows:
        x, y = as_number(row["values"].get(gain["key"])), as_number(row["values"].get(cost["key"]))
        if x is not None and y is not None:
            points.append(Point(row["name"], x, y, "base" if row["is_base"] else row["kind"]))
    chart = frontier_chart(
        f"{cost['label']} against {gain['label']}", points, x_label=gain["label"], y_label=cost["label"]
    )
    if chart is None:
        return []
    figure = Figure(
        f"frontier-{index}",
        f"{cost['label']} at equal {gain['label']}",
        chart,
        "The line is the base model made to stop earlier or later. Only a system below the line does better "
        "than a shorter answer would.",
        [
            ("frontier", "base, stop bias swept"),
            ("arm", "trained arms"),
            ("decoding", "decoding, no training"),
        ],
    )
    return [figure]


@dataclass
class BenchmarkView:
    """One benchmark's numbers and the items that tell most."""

    name: str
    round: int
    metrics: list[tuple[str, str]]
    counts: list[tuple[str, str]]
    items: list[dict[str, Any]]
    total: int


def flatten(value: Any, prefix: str = "", limit: int = 80) -> list[tuple[str, str]]:
    """Numbers and short texts of nested results as (path, text), in file order."""
    rows: list[tuple[str, str]] = []
    if not isinstance(value, dict):
        return rows
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            rows += flatten(item, f"{name} / ", limit)
        elif isinstance(item, list) and len(item) == 2 and (pair := _interval(item)):
            rows.append((name, f"{format_compact(pair[0])} – {format_compact(pair[1])}"))
        elif isinstance(item, bool) or (isinstance(item, str) and len(item) < 80):
            rows.append((name, str(item)))
        elif as_number(item) is not None or item is None:
            rows.append((name, format_compact(item)))
    return rows[:limit]


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided McNemar p: the binomial tail of the smaller of the two discordant counts at 1/2."""
    total = fixed + broken
    return float(stats.binomtest(min(fixed, broken), total).pvalue) if total else 1.0


def _base_items(run: RunContents, name: str) -> dict[str, dict[str, Any]]:
    """The base model's records of a benchmark, where the run kept them (round 0, or an arm named base)."""
    rounds: list[Round] = [r for r in run.rounds if r.number == 0] + run.arms.get("base", [])
    for contents in rounds:
        if name in contents.benchmarks:
            return {str(item.get("id")): item for item in contents.benchmarks[name].items}
    return {}


def benchmark_views(run: RunContents) -> list[BenchmarkView]:
    """Every benchmark of every round, the latest round first."""
    return [
        _benchmark(run, contents, name, benchmark)
        for contents in reversed(run.rounds)
        for name, benchmark in contents.benchmarks.items()
    ]


def _benchmark(run: RunContents, contents: Round, name: str, benchmark: BenchmarkContents) -> BenchmarkView:
    base = _base_items(run, name) if contents.number else {}
    rows: list[dict[str, Any]] = []
    for item in benchmark.items:
        correct = item.get("correct") if isinstance(item.get("correct"), bool) else None
        before = base.get(str(item.get("id")), {}).get("correct")
        change = ""
        if isinstance(before, bool) and correct is not None and before != correct:
            change = "fixed" if correct else "broken"
        rows.append(
            {
                "id": clip(item.get("id"), 80),
                "prompt": clip(item.get("prompt"), 600),
                "output": clip(item.get("output"), 600),
                "parsed": clip(item.get("parsed"), 120) if item.get("parsed") is not None else None,
                "label": clip(item.get("label"), 120) if item.get("label") is not None else None,
                "correct": correct,
                "change": change,
            }
        )
    judged = [row for row in rows if row["correct"] is not None]
    unparsed = sum("parsed" in item and item["parsed"] is None for item in benchmark.items)
    counts = [("items", f"{len(rows):,}")] if rows else []
    if judged:
        right = sum(bool(row["correct"]) for row in judged)
        counts += [
            ("correct", f"{right:,} ({format_percent(right / len(judged), 1)})"),
            ("not parsed", f"{unparsed:,}"),
        ]
    fixed, broken = (sum(row["change"] == kind for row in rows) for kind in ("fixed", "broken"))
    if base:
        counts += [("fixed against base", f"{fixed:,}"), ("broken against base", f"{broken:,}")]
        counts += [("McNemar p", format_compact(round(mcnemar(fixed, broken), 4)))]
    order: dict[Any, int] = {"broken": 0, "fixed": 1, "": 2}
    # Stable: inside each class the benchmark's own order remains.
    rows.sort(key=lambda row: (order[row["change"]], row["correct"] is not False))
    return BenchmarkView(name, contents.number, flatten(benchmark.results), counts, rows[:ITEMS_SHOWN], len(rows))
