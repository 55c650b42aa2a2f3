"""The results of a comparison: the table of arms, paired differences, cost, curves and the verdict in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import CompareConfig, Recipe
from m3po_jax.evaluation.bootstrap import resampled
from m3po_jax.evaluation.frontier import matched
from m3po_jax.evaluation.metric import Frontier, Metric
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.pipeline.compare import collect, plan, statistics
from m3po_jax.pipeline.compare.markdown import markdown
from m3po_jax.pipeline.compare.verdict import gate, verdict
from m3po_jax.pipeline.run import Run
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import ComparisonDirectory


def write_results(recipe: Recipe, directory: ComparisonDirectory, runs: Mapping[int, Run]) -> dict[str, Any]:
    """Makes and writes the tables of the seeds that are there."""
    arms = plan.trained_arms(recipe.compare)
    everything = [*arms, *(point.arm for point in plan.efficiency_points(recipe.compare))]
    cost = {arm: [collect.compute(run, arm) for run in runs.values()] for arm in everything}
    results: dict[str, Any] = {
        **plan.facts(recipe),
        "seeds": list(runs),
        "planned_seeds": recipe.compare.seeds,
        "benchmark_order": list(recipe.evaluate.benchmarks),
        "order": everything,
        "benchmarks": {
            name: benchmark_results(recipe, runs, name, everything) for name in recipe.evaluate.benchmarks
        },
        "compute": {arm: _means(values, timed=False) for arm, values in cost.items()},
        "training": {arm: _means([collect.training(run, arm) for run in runs.values()]) for arm in everything},
        "signals": _means([collect.signals(run) for run in runs.values()]),
        "systems": {
            arm: {"what": plan.what(recipe.compare, arm), "overrides": _overrides(runs, arm)} for arm in everything
        },
    }
    results["efficiency"] = _efficiency(recipe.compare, results)
    results["gate"] = gate(results, recipe.evaluate, recipe.compare.main)
    results["verdict"] = verdict(results, recipe.compare)
    times = {arm: _means(values, timed=True) for arm, values in cost.items()}
    if is_writer():
        directory.save(results, times, markdown(results, times))
    return results


def _overrides(runs: Mapping[int, Run], arm: str) -> dict[str, Any]:
    return dict(next(iter(runs.values())).recipe.arms[arm])


def _means(values: Sequence[Mapping[str, float]], timed: bool | None = None) -> dict[str, float]:
    """Means over seeds of the keys that all have; `timed` keeps the seconds alone, or leaves them out."""
    keys = [key for key in values[0] if all(key in value for value in values)]
    if timed is not None:
        keys = [key for key in keys if key.endswith("_seconds") == timed]
    return {key: float(np.mean([value[key] for value in values])) for key in keys}


def benchmark_results(recipe: Recipe, runs: Mapping[int, Run], name: str, arms: list[str]) -> dict[str, Any]:
    """Every system on one benchmark: metrics over seeds, and paired differences against `compare.against`."""
    benchmarks = {seed: next(b for b in run.benchmarks if b.name == name) for seed, run in runs.items()}
    metric = METRICS[recipe.evaluate.benchmarks[name].metric]
    placed = {seed: collect.systems(run, arms) for seed, run in runs.items()}
    cells = {
        seed: {system: cell for system, (_, cell) in systems.items()}
        | {
            runs[seed].system_name(cell): cell
            for arm in arms
            for cell in (runs[seed].directory.cell(number).of(arm) for number in range(1, recipe.rounds))
        }
        for seed, systems in placed.items()
    }
    images, sums = collect.sums(cells, benchmarks)
    values = _values(metric, sums, recipe.compare.resamples, recipe.seed)
    beyond = _add_deltas(metric.frontier, values, placed) if metric.frontier else {}
    # A system counts where every seed has it.
    shared = [s for s in cells[next(iter(cells))] if all(s in values.get(seed, {}) for seed in runs)]
    kinds = {system: kind for systems in placed.values() for system, (kind, _) in systems.items()}
    result: dict[str, Any] = {
        "metric": recipe.evaluate.benchmarks[name].metric,
        "images": len(images),
        "questions": len(benchmarks[next(iter(benchmarks))].prompts),
        "order": shared,  # JSON objects are written in the order of their keys
        "systems": {},
        "differences": {},
        "rounds": {},
    }
    for system in shared:
        entry = {
            "kind": kinds.get(system, "round"),
            "beyond_frontier": beyond.get(system, False),
            "metrics": {
                key: statistics.summarise([values[seed][system][key] for seed in runs])
                for key in values[next(iter(runs))][system]
            },
        }
        result["rounds" if entry["kind"] == "round" else "systems"][system] = entry
    for reference in recipe.compare.against:
        if reference not in shared:
            continue
        result["differences"][reference] = {
            system: {
                column.key: _difference(
                    [values[s][system][column.key] - values[s][reference][column.key] for s in runs], column.better
                )
                for column in metric.columns
                if column.better
                and all(column.key in values[s][system] and column.key in values[s][reference] for s in runs)
            }
            for system in shared
            if system != reference and kinds.get(system) in ("arm", "decoding")
        }
    return result


def _difference(values: Sequence[np.ndarray], better: str) -> dict[str, Any]:
    summary = statistics.summarise(values)
    return summary | {"better": better, "outcome": statistics.outcome(summary, better)}


def _values(
    metric: Metric, sums: Mapping[int, Mapping[str, np.ndarray]], resamples: int, seed: int
) -> dict[int, dict[str, dict[str, np.ndarray]]]:
    """Seed -> system -> key -> [R]; the same draws of images serve all of them."""
    placed = [(run, system) for run, tables in sums.items() for system in tables]
    if not placed:
        return {}
    tables = [sums[run][system] for run, system in placed]
    drawn = np.split(resampled(np.concatenate(tables, axis=1), resamples, seed), len(tables), axis=1)
    values: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    for (run, system), table in zip(placed, drawn, strict=True):
        rates = metric.rates(table)
        values.setdefault(run, {})[system] = {column.key: rates[column.key] for column in metric.drawn}
    return values


def _add_deltas(
    frontier: Frontier,
    values: dict[int, dict[str, dict[str, np.ndarray]]],
    placed: Mapping[int, Mapping[str, tuple[str, Cell]]],
) -> dict[str, bool]:
    """Adds ΔC to every system; returns which of them lie beyond the frontier's recall in any seed."""
    beyond: dict[str, bool] = {}
    for seed, systems in values.items():
        points = [s for s in systems if s in placed[seed] and placed[seed][s][0] in ("base", "frontier")]
        if len(points) < 2:
            continue
        gain, cost = (np.stack([systems[s][key] for s in points], axis=1) for key in (frontier.gain, frontier.cost))
        for name, metrics in systems.items():
            match = matched(metrics[frontier.gain], metrics[frontier.cost], gain, cost)
            metrics[frontier.delta] = match.delta
            beyond[name] = beyond.get(name, False) or bool(match.beyond[0])
    return beyond


def _efficiency(config: CompareConfig, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of the curve: pairs (mean over seeds) and every benchmark's metrics."""
    rows = []
    for point in plan.efficiency_points(config):
        scored = {
            name: compared["systems"][point.arm]["metrics"]
            for name, compared in results["benchmarks"].items()
            if point.arm in compared["systems"]
        }
        pairs = results["compute"][point.arm]["pairs"]
        rows.append(dataclasses.asdict(point) | {"pairs": pairs, "metrics": scored})
    return rows
