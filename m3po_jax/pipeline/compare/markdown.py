"""A comparison's results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.evaluation.markdown import table
from m3po_jax.evaluation.metric import Column
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.pipeline.summary import DELTA_NOTE

NOTE = (
    "Mean over seeds ± standard deviation between seeds (n − 1); in brackets the 95 % bootstrap interval of the mean "
    "over images, drawn for all systems and seeds alike."
)
DIFFERENCE_NOTE = (
    "Paired differences, mean over seeds; in brackets the 95 % bootstrap interval over images, then Student's over "
    "seeds. **Bold** where both exclude zero, with at least three seeds. Many differences are listed: one in twenty "
    "may look real by chance."
)
BEYOND = "≤: the recall lies beyond the frontier's, whose end stands for it, so that the true ΔC is at most this."


def markdown(results: Mapping[str, Any], times: Mapping[str, Mapping[str, float]]) -> str:
    """The whole page."""
    parts = [f"# {results['name']}: {len(results['seeds'])} seeds", "## What it shows"]
    parts.append("\n".join(f"- {line}" for line in results["verdict"]))
    curve_arms = {row["arm"] for row in results["efficiency"]}
    for name, compared in results["benchmarks"].items():
        parts += _benchmark(name, compared, curve_arms)
    parts += ["## Cost", _cost(results, times)]
    if results["training"]:
        parts += ["## Pairs and training", _training(results)]
    if results["efficiency"]:
        parts += ["## Data efficiency", _efficiency(results)]
    if any(compared["rounds"] for compared in results["benchmarks"].values()):
        parts += ["## Rounds", _rounds(results)]
    return "\n\n".join(parts) + "\n"


def columns(metric: str, systems: Mapping[str, Any]) -> list[Column]:
    """The metric's columns that any system has a value for."""
    defined = {
        key for entry in systems.values() for key, value in entry["metrics"].items() if value["mean"] is not None
    }
    return [column for column in METRICS[metric].columns if column.key in defined]


def cell(value: Mapping[str, Any] | None, column: Column, *, bound: bool = False) -> str:
    """``mean ± sd [low, high]`` as the column shows it."""
    if value is None or value["mean"] is None:
        return ""
    factor, digits = column.factor, column.digits
    text = ("≤ " if bound else "") + f"{factor * value['mean']:.{digits}f}"
    if value["sd"] is not None:
        text += f" ± {factor * value['sd']:.{digits}f}"
    if value["low"] is not None:
        text += f" [{factor * value['low']:.{digits}f}, {factor * value['high']:.{digits}f}]"
    return text


def _benchmark(name: str, compared: Mapping[str, Any], hidden: set[str]) -> list[str]:
    systems = {system: entry for system, entry in compared["systems"].items() if system not in hidden}
    shown = columns(compared["metric"], systems)
    rows = [
        [system]
        + [
            cell(
                entry["metrics"].get(column.key),
                column,
                bound=column.key == "delta_chair_i" and entry["beyond_frontier"],
            )
            for column in shown
        ]
        for system, entry in systems.items()
    ]
    parts = [f"## {name} ({compared['metric']}, {compared['questions']} questions, {compared['images']} images)"]
    parts += [table(["System", *(column.label for column in shown)], rows), NOTE]
    if any(column.key == "delta_chair_i" for column in shown):
        parts.append(DELTA_NOTE.replace("; empty outside the frontier's recall", "") + " " + BEYOND)
    for reference, differences in compared["differences"].items():
        kept = {s: values for s, values in differences.items() if s not in hidden or reference in hidden}
        judged = [column for column in shown if any(column.key in values for values in kept.values())]
        lines = [
            [system, *(difference_cell(values.get(column.key), column) for column in judged)]
            for system, values in kept.items()
        ]
        parts += [
            f"### {name}: difference to {reference}",
            table(["System", *(column.label for column in judged)], lines),
        ]
    if compared["differences"]:
        parts.append(DIFFERENCE_NOTE)
    return parts


def difference_cell(value: Mapping[str, Any] | None, column: Column) -> str:
    if value is None or value["mean"] is None:
        return ""
    factor, digits = column.factor, column.digits

    def span(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f" [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]"

    mean = f"{factor * value['mean']:+.{digits}f}"
    if value["outcome"] in ("better", "worse"):
        mean = f"**{mean}**"
    return mean + span(value["low"], value["high"]) + span(value["t_low"], value["t_high"])


def _cost(results: Mapping[str, Any], times: Mapping[str, Mapping[str, float]]) -> str:
    head = ["System", "Pairs", "Generated tokens", "Judge calls", "Steps", "Rows a step", "Trained tokens"]
    head += ["Generate s", "Score s", "Train s"]
    keys = ("pairs", "generated_tokens", "judge_calls", "optimizer_steps", "batch_size", "trained_tokens")
    rows = [
        [arm, *(f"{cost[key]:,.0f}" for key in keys)]
        + [f"{times[arm][key]:,.0f}" for key in ("generate_seconds", "score_seconds", "train_seconds")]
        for arm, cost in results["compute"].items()
    ]
    note = (
        "Mean of a seed. Candidates and scores that arms share are counted in full for each of them, and were made "
        "once. A judge call is one candidate scored. Seconds are of the wall clock, and fair within one run only."
    )
    return table(head, rows) + "\n\n" + note


def _training(results: Mapping[str, Any]) -> str:
    labels = {
        "chosen_mas": "Chosen MAS",
        "rejected_mas": "Rejected MAS",
        "length_difference": "Chosen − rejected tokens",
        "delta_logps/chosen": "Δ log p chosen",
        "delta_logps/rejected": "Δ log p rejected",
        "rewards/accuracies": "Accuracy",
    }
    rows = [
        [arm, *(f"{values[key]:.2f}" if key in values else "" for key in labels)]
        for arm, values in results["training"].items()
    ]
    note = (
        "Δ log p: nats a token against the reference, over the last tenth of the steps; below zero for the chosen "
        "answer is displacement."
    )
    parts = [table(["System", *labels.values()], rows), note]
    if results["signals"]:
        named = ", ".join(f"{key} {value:.2f}" for key, value in results["signals"].items())
        parts.append(f"The shared candidates: {named}.")
    return "\n\n".join(parts)


def _efficiency(results: Mapping[str, Any]) -> str:
    benchmarks = results["benchmarks"]
    shown = {
        name: columns(
            compared["metric"], {row["arm"]: compared["systems"][row["arm"]] for row in results["efficiency"]}
        )
        for name, compared in benchmarks.items()
    }
    head = ["System", "Pairs of", "Share", "Pairs"]
    head += [f"{name} {column.label}" for name, of_metric in shown.items() for column in of_metric]
    words = {"value": "the highest value", "random": "a random draw", "all": "all"}
    rows = [
        [row["system"], words[row["order"]], f"{row['budget']:g}", f"{row['pairs']:.0f}"]
        + [
            cell(row["metrics"][name].get(column.key), column)
            for name, of_metric in shown.items()
            for column in of_metric
        ]
        for row in results["efficiency"]
    ]
    return table(head, rows) + "\n\nThe number of steps is the same for all: fewer pairs are seen more often."


def _rounds(results: Mapping[str, Any]) -> str:
    parts = []
    for name, compared in results["benchmarks"].items():
        entries = dict(compared["rounds"]) | {
            f"{arm}, round {results['rounds']}": compared["systems"][arm]
            for arm in results["systems"]
            if arm in compared["systems"]
        }
        entries = dict(sorted(entries.items()))
        shown = columns(compared["metric"], entries)
        rows = [
            [system, *(cell(entry["metrics"].get(column.key), column) for column in shown)]
            for system, entry in entries.items()
        ]
        parts += [f"### {name}", table(["System", *(column.label for column in shown)], rows)]
    return "\n\n".join(parts)
