"""The table that ends a run: every system on every benchmark, beside the base's stop-bias frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import EvaluateConfig, Recipe, SelectConfig, TrainConfig
from m3po_jax.evaluation.frontier import matched
from m3po_jax.evaluation.markdown import table as aligned
from m3po_jax.evaluation.metric import Frontier, verdict
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.arms import BASE
from m3po_jax.pipeline.evaluate import Benchmark
from m3po_jax.pipeline.gate import gate_verdicts
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import RunDirectory


def main_name(train: TrainConfig, select: SelectConfig) -> str:
    """The recipe's own system, as the table and the report name it."""
    return objective_of(train).system_name(select.rule)


def stop_bias_name(bias: float) -> str:
    """What the base with this bias on its stop tokens is called."""
    return f"base, stop bias {bias:+g}"


def contrast_name(alpha: float) -> str:
    """What the base decoded contrastively with this α is called."""
    return f"vcd α={alpha:g}"


DELTA_NOTE = (
    "ΔC is CHAIR_i minus that of the base's stop-bias frontier at the same recall: below zero is better than merely "
    "stopping earlier; empty outside the frontier's recall."
)


def decodings(config: EvaluateConfig, base: Cell) -> list[tuple[str, str, Cell]]:
    """(name, kind, cell) of the base's stop-bias frontier and contrastive decodings."""
    names = [("frontier", name) for name in map(stop_bias_name, config.stop_bias)]
    names += [("decoding", name) for name in map(contrast_name, config.contrast_alpha)]
    return [(name, kind, base.of(name)) for kind, name in names]


def system_name(cell: Cell, main: str, rounds: int) -> str:
    """What a trained system is called; its last round by the system's name alone.

    Args:
        main: `main_name` of the run.
        rounds: That the run has.
    """
    name = main if cell.arm is None else cell.arm
    return name if cell.round == rounds else f"{name}, round {cell.round}"


def systems(recipe: Recipe, directory: RunDirectory) -> list[tuple[str, str, Cell]]:
    """(name, kind, cell) of everything that was evaluated, in the table's order."""
    base, first = directory.cell(0), directory.cell(1)
    every = [(BASE, "arm", base), *decodings(recipe.evaluate, base)]
    every += [(arm, "arm", first.of(arm)) for arm in recipe.arms]
    main, cells = main_name(recipe.train, recipe.select), map(first.at, range(1, recipe.rounds + 1))
    every += [(system_name(cell, main, recipe.rounds), "arm", cell) for cell in cells]
    return [system for system in every if any(one.is_finished for one in system[2].evaluations())]


def _deltas(frontier: Frontier, results: Sequence[Any], on_frontier: Sequence[bool]) -> list[float | None] | None:
    """Every system's cost minus the base's at the same gain, None outside the frontier's gain.

    None of a frontier that has one point only.
    """

    def read(key: str) -> np.ndarray:
        values = [r["summary"][key] if r else None for r in results]
        return np.array([np.nan if value is None else value for value in values])

    gain, cost = read(frontier.gain), read(frontier.cost)
    points = np.array([r is not None and on for r, on in zip(results, on_frontier, strict=True)])
    if points.sum() < 2:
        return None
    rows = len(results), 1
    match = matched(gain, cost, np.tile(gain[points], rows), np.tile(cost[points], rows))
    return [None if beyond or np.isnan(d) else float(d) for d, beyond in zip(match.delta, match.beyond, strict=True)]


def build_tables(everything: Sequence[tuple[str, str, Cell]], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """One table over all benchmarks, as the report reads it, of what `systems` lists."""
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "values": {}, "intervals": {}} for name, kind, _ in everything
    ]
    warnings: list[str] = []
    notes, with_deltas = [], False
    for benchmark in benchmarks:
        metric = benchmark.metric
        results = [cell.evaluation(benchmark.name).results() for _, _, cell in everything]
        values = {
            column.key: [r["summary"].get(column.key) if r else None for r in results] for column in metric.drawn
        }
        deltas = None
        if metric.frontier:
            on_frontier = [name == BASE or kind == "frontier" for name, kind, _ in everything]
            if deltas := _deltas(metric.frontier, results, on_frontier):
                values[metric.frontier.delta] = deltas
        # Its columns are the table's main ones and need no prefix while there is one such benchmark.
        plain = metric.frontier is not None and sum(b.metric is metric for b in benchmarks) == 1
        notes.append(f"{benchmark.name}: {benchmark.title}, n = {len(benchmark.prompts)}")
        notes += [r["note"] for r in results[:1] if r and "note" in r]
        for column in metric.columns:
            if column.key not in values:
                continue
            key = f"{benchmark.name}/{column.key}"
            label = column.label if plain else f"{benchmark.name} {column.label}"
            columns.append({"key": key, "label": label, "digits": column.digits, "better": column.better})
            for row, result, value in zip(rows, results, values[column.key], strict=True):
                row["values"][key] = None if value is None or math.isnan(value) else column.factor * value
                interval = (result or {}).get("intervals", {}).get(column.key)
                if interval:
                    row["intervals"][key] = [column.factor * bound for bound in interval]
        warnings += _warnings(benchmark, results[0])
        with_deltas |= deltas is not None
    if with_deltas:
        notes.append(DELTA_NOTE)
    warnings += worse_than_base(columns, rows)
    table = {"title": "Held-out images", "note": ". ".join(notes), "columns": columns, "rows": rows}
    return {"tables": [table], "warnings": warnings}


def worse_than_base(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each trained system that lies outside the base's interval on the worse side, with every such number.

    Args:
        columns: `key`, `label`, `digits` and `better` of each.
        rows: Systems, the base among them: `name`, `kind`, and `values` and `intervals` by the columns' keys.
    """
    base = next((row for row in rows if row["name"] == BASE), None)
    if base is None:
        return []
    lines = []
    for row in rows:
        if row is base or row["kind"] != "arm":
            continue
        worse = []
        for column in columns:
            key, digits = column["key"], column["digits"]
            value, interval = row["values"].get(key), base["intervals"].get(key)
            if interval and verdict(value, (interval[0], interval[1]), column["better"]) == "worse":
                low, high = (_cell(bound, digits) for bound in interval)
                before = _cell(base["values"][key], digits)
                worse.append(f"{column['label']} {_cell(value, digits)} (base {before}, interval {low} to {high})")
        if worse:
            lines.append(f"{row['name']} is worse than the base, outside its interval: {', '.join(worse)}")
    return lines


def _warnings(benchmark: Benchmark, base: Mapping[str, Any] | None) -> list[str]:
    if not base:
        return []
    warnings = [benchmark.metric.gate(base["summary"])]
    if base.get("cut"):
        warnings.append(f"{base['cut']} of the base's answers were cut at the length limit")
    return [f"{benchmark.name}: {line}" for line in warnings if line]


def markdown(table: Mapping[str, Any]) -> str:
    """A table as aligned Markdown."""
    columns = table["columns"]
    rows = [
        [row["name"], *(_cell(row["values"].get(c["key"]), c["digits"]) for c in columns)] for row in table["rows"]
    ]
    return aligned(["System", *(column["label"] for column in columns)], rows)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_tables(recipe: Recipe, directory: RunDirectory, benchmarks: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """Writes the table into the run directory and prints it on standard output; returns the gate's verdicts."""
    everything = systems(recipe, directory)
    deciding = directory.cell(1).at(recipe.rounds)
    verdicts = gate_verdicts(everything, benchmarks, recipe.evaluate, deciding=deciding, seed=recipe.seed)
    tables = build_tables(everything, benchmarks) | {"gate": verdicts}
    if not is_writer():
        return verdicts
    texts = [f"**{t['title']}**\n\n{markdown(t)}\n\n{t['note']}\n" for t in tables["tables"]]
    texts += [f"Warning: {line}.\n" for line in tables["warnings"]]
    texts += [f"Gate: {verdict['text']}.\n" for verdict in verdicts]
    directory.save_evaluation(tables, "\n".join(texts))
    print("\n".join(texts), flush=True)
    return verdicts
