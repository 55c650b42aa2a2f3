"""The table that ends a run: every system on every benchmark, beside the base's stop-bias frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3po_jax.config import Recipe
from m3po_jax.data.tables import write_json
from m3po_jax.evaluation.frontier import matched
from m3po_jax.pipeline.evaluate import Benchmark
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.files import is_writer, read_json, write_text

BASE = "base"
# What the recipe's own system is called beside its arms, from its pairing rule.
RULE_NAMES = {"m3p": "m3po", "mas_only": "mas_dpo", "vanilla": "dpo"}


def main_name(recipe: Recipe) -> str:
    """The recipe's own system, as the table and the report name it."""
    rule = recipe.select.rule
    if recipe.train.pairs:
        return "pairs" if recipe.train.objective == "preference" else "sft_chosen"
    if recipe.train.objective == "preference":
        return RULE_NAMES.get(rule, rule)
    if recipe.train.objective == "sft":
        return "sft_chosen" if recipe.train.sft_answers == "chosen" else "sft"
    return recipe.train.objective


def stop_bias_name(bias: float) -> str:
    """What the base with this bias on its stop tokens is called."""
    return f"base, stop bias {bias:+g}"


def contrast_name(alpha: float) -> str:
    """What the base decoded contrastively with this α is called."""
    return f"vcd α={alpha:g}"


@dataclass(frozen=True)
class Column:
    """A column of the table: key of the metric, head, which way is better, and how its numbers are printed."""

    key: str
    label: str
    better: str | None
    digits: int = 1
    percent: bool = True


COLUMNS = {
    "chair": [
        Column("chair_i", "CHAIR_i", "lower"),
        Column("delta_chair_i", "ΔC", "lower"),
        Column("chair_s", "CHAIR_s", "lower"),
        Column("recall", "Recall", "higher"),
        Column("f1", "F1", "higher"),
        Column("mean_objects", "Objects", None, 2, False),
        Column("mean_tokens", "Tokens", None, 1, False),
    ],
    "pope": [
        Column("accuracy", "Acc", "higher"),
        Column("f1", "F1", "higher"),
        Column("yes_ratio", "Yes", None),
    ],
    "short_answer": [Column("accuracy", "Acc", "higher")],
    "mme": [
        Column("perception", "Perception", "higher", 1, False),
        Column("cognition", "Cognition", "higher", 1, False),
    ],
    "vqa": [Column("accuracy", "Acc", "higher")],
    "mmbench": [Column("accuracy", "Circular", "higher"), Column("single_accuracy", "Single", "higher")],
    "amber_yes_no": [
        Column("accuracy", "Acc", "higher", 1, False),
        Column("f1", "F1", "higher", 1, False),
    ],
    "amber": [
        Column("chair", "CHAIR", "lower", 1, False),
        Column("cover", "Cover", "higher", 1, False),
        Column("hal", "Hal", "lower", 1, False),
        Column("cog", "Cog", "lower", 1, False),
        Column("mean_words", "Words", None, 1, False),
    ],
}
DELTA_NOTE = (
    "ΔC is CHAIR_i minus that of the base's stop-bias frontier at the same recall: below zero is better than merely "
    "stopping earlier; empty outside the frontier's recall."
)


def systems(recipe: Recipe, directory: RunDirectory) -> list[tuple[str, str, Path]]:
    """(name, kind, folder) of everything that was evaluated, in the table's order."""
    folder = directory.round
    found = [(BASE, "arm", folder(0))]
    found += [(name, "frontier", folder(0, name)) for name in map(stop_bias_name, recipe.evaluate.stop_bias)]
    found += [(name, "decoding", folder(0, name)) for name in map(contrast_name, recipe.evaluate.contrast_alpha)]
    found += [(arm, "arm", folder(1, arm)) for arm in recipe.arms]
    main = main_name(recipe)
    found += [(f"{main}, round {number}", "arm", folder(number)) for number in range(1, recipe.rounds)]
    found.append((main, "arm", folder(recipe.rounds)))
    return [system for system in found if list(system[2].glob("evaluation/*/results.json"))]


def _delta(results: Mapping[str, Any] | None, points: Sequence[Mapping[str, Any]]) -> float | None:
    return matched(results["summary"], points)["delta_chair_i"] if results else None


def build_tables(recipe: Recipe, directory: RunDirectory, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """`evaluation.json`: one table over all benchmarks."""
    everything = systems(recipe, directory)
    columns: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "values": {}, "intervals": {}} for name, kind, _ in everything
    ]
    warnings: list[str] = []
    notes = []
    for benchmark in benchmarks:
        metric = benchmark.config.metric
        results = [read_json(folder / "evaluation" / benchmark.name / "results.json") for _, _, folder in everything]
        points = [
            r["summary"]
            for r, (name, kind, _) in zip(results, everything, strict=True)
            if r and (name == BASE or kind == "frontier")
        ]
        # CHAIR's columns are the table's main ones and need no prefix while there is one such benchmark.
        plain = metric == "chair" and sum(b.config.metric == metric for b in benchmarks) == 1
        notes.append(f"{benchmark.name}: {metric}, n = {len(benchmark.prompts)}")
        for column in COLUMNS[metric]:
            if column.key == "delta_chair_i" and len(points) < 2:
                continue
            key = f"{benchmark.name}/{column.key}"
            label = column.label if plain else f"{benchmark.name} {column.label}"
            columns.append({"key": key, "label": label, "digits": column.digits, "better": column.better})
            for row, result in zip(rows, results, strict=True):
                if column.key == "delta_chair_i":
                    value = _delta(result, points)
                else:
                    value = result["summary"].get(column.key) if result else None
                factor = 100.0 if column.percent else 1.0
                row["values"][key] = None if value is None or math.isnan(value) else factor * value
                interval = (result or {}).get("intervals", {}).get(column.key)
                if interval:
                    row["intervals"][key] = [factor * bound for bound in interval]
        warnings += _warnings(benchmark.name, results[0])
    if any(c["key"].endswith("/delta_chair_i") for c in columns):
        notes.append(DELTA_NOTE)
    table = {"title": "Held-out images", "note": ". ".join(notes), "columns": columns, "rows": rows}
    return {"tables": [table], "warnings": warnings}


def _warnings(benchmark: str, base: Mapping[str, Any] | None) -> list[str]:
    found = []
    if base and base["metric"] == "pope" and base["summary"]["accuracy"] < 0.6:
        found.append(
            f"{benchmark}: the base answers {base['summary']['accuracy']:.0%} right, near chance; differences "
            "between systems mean little there"
        )
    if base and base.get("cut"):
        found.append(f"{benchmark}: {base['cut']} of the base's answers were cut at the length limit")
    return found


def markdown(table: Mapping[str, Any]) -> str:
    """A table as aligned Markdown."""
    head = ["System", *(column["label"] for column in table["columns"])]
    lines = [head]
    for row in table["rows"]:
        cells = [row["name"]]
        for column in table["columns"]:
            value = row["values"].get(column["key"])
            cells.append("" if value is None else f"{value:.{column['digits']}f}")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def render(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])


def write_tables(recipe: Recipe, directory: RunDirectory, benchmarks: Sequence[Benchmark]) -> None:
    """Writes ``evaluation.json`` and ``evaluation.md`` and prints the table on standard output."""
    tables = build_tables(recipe, directory, benchmarks)
    if not is_writer():
        return
    write_json(directory.root / "evaluation.json", tables)
    texts = [f"**{t['title']}**\n\n{markdown(t)}\n\n{t['note']}\n" for t in tables["tables"]]
    write_text(directory.root / "evaluation.md", "\n".join(texts))
    print("\n".join(texts), flush=True)
