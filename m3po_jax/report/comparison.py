"""The comparison's section: verdict, tables with intervals, differences, data efficiency and rounds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3po_jax.evaluation.metric import Column, Frontier, Metric
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.report.charts import Line, Point, forest_chart, frontier_chart, line_chart, series_colour
from m3po_jax.report.figures import Figure
from m3po_jax.report.formatting import format_number, format_span, slug

_KINDS = {"base": "base", "frontier": "frontier", "decoding": "decoding"}


@dataclass
class ComparisonCell:
    """One value of a table, with its interval or intervals in small print."""

    text: str
    small: str = ""
    verdict: str = ""  # better | worse: both intervals of a difference exclude zero


@dataclass
class ComparisonTable:
    """One table of the section, with the note below it."""

    title: str
    columns: list[tuple[str, str]]  # label, and which way is better
    rows: list[tuple[str, str, list[ComparisonCell]]]  # name, kind, cells
    note: str = ""


@dataclass
class ComparisonView:
    """What the section shows.

    Attributes:
        facts: Label and value of what was held fixed.
        verdict: One finding a line.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    tables: list[ComparisonTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def comparison_view(results: Mapping[str, Any]) -> ComparisonView:
    """The section of `compare`'s ``results.json``.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what `compare` writes.
    """
    seeds = results["seeds"]
    view = ComparisonView(
        facts=[
            ("Seeds", f"{len(seeds)} of {len(results['planned_seeds'])}"),
            ("Rounds", str(results["rounds"])),
            ("Candidates", f"{results['candidates']} at temperature {results['temperature']:g}"),
            ("λ₊, λ₋", ", ".join(f"{value:g}" for value in results["lambda"])),
            ("β", f"{results['beta']:g}"),
        ],
        verdict=[str(line) for line in results["verdict"]],
    )
    curve = {row["arm"] for row in results["efficiency"]}
    for name in results["benchmark_order"]:
        benchmark = results["benchmarks"][name]
        _benchmark(view, name, benchmark, curve)
        _efficiency(view, name, benchmark, results["efficiency"])
        _rounds(view, name, benchmark, results["rounds"])
    view.tables.append(_cost({arm: results["compute"][arm] for arm in results["order"]}))
    return view


def _shown(benchmark: Mapping[str, Any], systems: Mapping[str, Any]) -> list[Column]:
    """The metric's columns that any system has a value for."""

    def has_value(key: str) -> bool:
        return any((entry["metrics"].get(key) or {}).get("mean") is not None for entry in systems.values())

    return [column for column in METRICS[benchmark["metric"]].columns if has_value(column.key)]


def _deciding(benchmark: Mapping[str, Any], shown: Sequence[Column]) -> list[Column]:
    """The first of the shown columns that the comparison decides on, for the charts."""
    return [column for key in METRICS[benchmark["metric"]].deciding for column in shown if column.key == key][:1]


def _span(low: float | None, high: float | None, column: Column) -> str:
    if low is None or high is None:
        return ""
    return format_span(column.factor * low, column.factor * high, column.digits)


def _value(value: Mapping[str, Any] | None, column: Column, bound: bool) -> ComparisonCell:
    if value is None or value["mean"] is None:
        return ComparisonCell("–")
    text = ("≤ " if bound else "") + format_number(column.factor * value["mean"], column.digits)
    if value["sd"] is not None:
        text += f" ± {format_number(column.factor * value['sd'], column.digits)}"
    return ComparisonCell(text, _span(value["low"], value["high"], column))


def _benchmark(view: ComparisonView, name: str, benchmark: Mapping[str, Any], curve: set[str]) -> None:
    order = [system for system in benchmark["order"] if system not in curve]
    systems = {system: benchmark["systems"][system] for system in order if system in benchmark["systems"]}
    shown = _shown(benchmark, systems)
    frontier = METRICS[benchmark["metric"]].frontier
    delta = frontier.delta if frontier else None
    rows = []
    for system, entry in systems.items():
        cells = [
            _value(entry["metrics"].get(column.key), column, column.key == delta and entry["beyond_frontier"])
            for column in shown
        ]
        rows.append((system, entry["kind"], cells))
    view.tables.append(
        ComparisonTable(
            f"{name}: {benchmark['questions']:,} questions about {benchmark['images']:,} images",
            _heads(shown),
            rows,
            "Mean over seeds ± standard deviation between seeds. Small: 95 % bootstrap interval over images."
            + "".join(f" {c.label}: {c.meaning}." for c in shown if c.key == delta),
        )
    )
    if frontier:
        _frontier(view, name, METRICS[benchmark["metric"]], frontier, systems)
    for reference, differences in benchmark["differences"].items():
        kept = {system: differences[system] for system in order if system in differences}
        _differences(view, name, reference, kept, shown, _deciding(benchmark, shown))


def _heads(shown: Sequence[Column]) -> list[tuple[str, str]]:
    return [(column.label, column.better or "") for column in shown]


def _frontier(
    view: ComparisonView, name: str, metric: Metric, frontier: Frontier, systems: Mapping[str, Any]
) -> None:
    gain, cost = metric.column(frontier.gain), metric.column(frontier.cost)
    points = []
    for system, entry in systems.items():
        x, y = ((entry["metrics"].get(column.key) or {}).get("mean") for column in (gain, cost))
        if x is not None and y is not None:
            points.append(Point(system, gain.factor * x, cost.factor * y, _KINDS.get(entry["kind"], "arm")))
    if not any(point.kind == "frontier" for point in points):
        return
    title = f"{name}: {cost.label} against {gain.label}"
    chart = frontier_chart(title, points, x_label=gain.label, y_label=cost.label)
    if chart is not None:
        legend = [("frontier", "base, stop bias swept"), ("arm", "trained systems"), ("decoding", "decoding")]
        note = "Means over seeds. Only a system below the line does better than a shorter answer would."
        title = f"{name}: at equal {gain.label.lower()}"
        view.figures.append(Figure(f"compare-frontier-{slug(name)}", title, chart, note, legend))


def _differences(
    view: ComparisonView,
    name: str,
    reference: str,
    differences: Mapping[str, Any],
    shown: Sequence[Column],
    deciding: Sequence[Column],
) -> None:
    judged = [column for column in shown if any(column.key in values for values in differences.values())]
    rows = []
    for system, values in differences.items():
        cells = []
        for column in judged:
            value = values.get(column.key)
            if value is None or value["mean"] is None:
                cells.append(ComparisonCell("–"))
                continue
            spans = [_span(value[a], value[b], column) for a, b in (("low", "high"), ("t_low", "t_high"))]
            text = format_number(column.factor * value["mean"], column.digits, sign=True)
            small = "; ".join(f"{what} {span}" for what, span in zip(("images", "seeds"), spans, strict=True) if span)
            verdict = value["outcome"] if value["outcome"] in ("better", "worse") else ""
            cells.append(ComparisonCell(text, small, verdict))
        rows.append((system, "arm", cells))
    note = "Paired differences. Marked where both intervals, over images and over seeds, exclude zero."
    view.tables.append(ComparisonTable(f"{name}: difference to {reference}", _heads(judged), rows, note))
    for column in deciding:
        points = []
        for system, values in differences.items():
            value = values.get(column.key)
            if value is not None and value["mean"] is not None and value["low"] is not None:
                interval = (column.factor * value["low"], column.factor * value["high"])
                points.append(Point(system, 0.0, column.factor * value["mean"], "arm", interval))
        if points:
            title, wish = f"{name}: {column.label} against {reference}", f"{column.better} is better"
            chart = forest_chart(title, points, band=None, digits=column.digits, reference=0.0, x_label=wish)
            identity = f"compare-{slug(name)}-{slug(reference)}"
            view.figures.append(
                Figure(identity, title, chart, "95 % interval over images; the dotted line is no difference.")
            )


def _efficiency(
    view: ComparisonView, name: str, benchmark: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> None:
    if len({row["pairs"] for row in points}) < 2:
        return
    scored = {row["arm"]: benchmark["systems"][row["arm"]] for row in points if row["arm"] in benchmark["systems"]}
    for column in _deciding(benchmark, _shown(benchmark, scored)):
        series: list[Line] = []
        orders = (("value", "highest value first"), ("random", "random pairs"))
        for system, (order, words) in itertools.product(dict.fromkeys(row["system"] for row in points), orders):
            of_line = [row for row in points if row["system"] == system and row["order"] in (order, "all")]
            of_line = [row for row in of_line if row["arm"] in scored]
            of_line = [row for row in of_line if scored[row["arm"]]["metrics"][column.key]["mean"] is not None]
            values = [column.factor * scored[row["arm"]]["metrics"][column.key]["mean"] for row in of_line]
            pairs, colour = [row["pairs"] for row in of_line], series_colour(len(series))
            series.append(Line(f"{system}, {words}", pairs, values, colour, bold=not series))
        chart = line_chart(f"{name}: {column.label} by number of pairs", series, x_label="pairs")
        if chart is not None:
            legend = [(line.colour, line.name) for line in series]
            title, note = f"{name}: data efficiency", f"{column.label}, {column.better} is better; the same steps."
            view.figures.append(Figure(f"compare-efficiency-{slug(name)}", title, chart, note, legend))


def _rounds(view: ComparisonView, name: str, benchmark: Mapping[str, Any], rounds: int) -> None:
    if not benchmark["rounds"]:
        return
    names = [system for system in benchmark["order"] if system in benchmark["rounds"]]
    arms = list(dict.fromkeys(system.rpartition(", round ")[0] for system in names))
    for column in _deciding(benchmark, _shown(benchmark, benchmark["rounds"])):
        series = []
        for style, arm in enumerate(arms):
            entries = [benchmark["systems"]["base"]]
            entries += [benchmark["rounds"][f"{arm}, round {number}"] for number in range(1, rounds)]
            entries.append(benchmark["systems"][arm])
            values = [(entry["metrics"].get(column.key) or {}).get("mean") for entry in entries]
            pairs = [(number, column.factor * value) for number, value in enumerate(values) if value is not None]
            series.append(Line(arm, [x for x, _ in pairs], [y for _, y in pairs], series_colour(style)))
        chart = line_chart(f"{name}: {column.label} over rounds", series, x_label="round")
        if chart is not None:
            legend = [(line.colour, line.name) for line in series]
            title, note = f"{name}: over rounds", f"{column.label}, {column.better} is better; round 0 is the base."
            view.figures.append(Figure(f"compare-rounds-{slug(name)}", title, chart, note, legend))


def _cost(compute: Mapping[str, Mapping[str, float]]) -> ComparisonTable:
    keys = (
        ("pairs", "Pairs"),
        ("generated_tokens", "Generated tokens"),
        ("judge_calls", "Judge calls"),
        ("optimizer_steps", "Steps"),
        ("batch_size", "Rows a step"),
        ("trained_tokens", "Trained tokens"),
    )
    rows = [
        (arm, "arm", [ComparisonCell(format_number(cost.get(key), 0)) for key, _ in keys])
        for arm, cost in compute.items()
    ]
    note = "Mean of a seed. Shared candidates and scores are counted in full for each system, and were made once."
    return ComparisonTable("Cost", [(label, "") for _, label in keys], rows, note)
