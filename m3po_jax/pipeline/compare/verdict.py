"""What a comparison shows, in plain words: never more than both intervals allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3po_jax.config import CompareConfig, EvaluateConfig
from m3po_jax.evaluation.gate import FAILED, PASSED, UNDECIDED, read_gate
from m3po_jax.evaluation.metric import Column
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.pipeline.arms import BASE
from m3po_jax.pipeline.compare.statistics import MIN_SEEDS, outcome
from m3po_jax.selection import CORRELATION_LIMIT

DISPLACED = -0.01  # nats a token: clearly more than rounding


def verdict(results: Mapping[str, Any], config: CompareConfig) -> list[str]:
    """One line a finding: the main system above the base's frontier, then against each reference, then why."""
    lines = []
    count = len(results["seeds"])
    if count < len(results["planned_seeds"]):
        lines.append(f"{count} of {len(results['planned_seeds'])} seeds are done; the table is of those.")
    if count < MIN_SEEDS:
        lines.append(
            f"With {count} seed{'s' if count > 1 else ''} nothing is claimed: at least {MIN_SEEDS} are needed."
        )
    for name, compared in results["benchmarks"].items():
        if config.main in compared["systems"]:
            lines += _benchmark(name, compared, config.main)
    lines += [f"Gate: {entry['text']}." for entry in results["gate"]]
    return lines + _why(results, config)


def gate(results: Mapping[str, Any], config: EvaluateConfig, main: str) -> list[dict[str, Any]]:
    """What `evaluate.gate` says of the main system: it fails where its mean drop over the seeds is beyond what is
    allowed and both intervals of the difference from the base, over images and over seeds, lie on the worse side.

    Returns:
        An entry for each number, with ``key``, ``allowed``, ``drop`` (in the unit that tables show), ``outcome``
        (passed, failed or undecided) and ``text``.
    """
    benchmarks = results["benchmarks"]
    metrics = {name: METRICS[compared["metric"]] for name, compared in benchmarks.items()}
    entries = []
    for guarded in read_gate(config.gate, metrics):
        difference = benchmarks[guarded.benchmark]["differences"].get(BASE, {}).get(main, {}).get(guarded.column.key)
        drop, judged = None, UNDECIDED
        if difference is None or difference["outcome"] in ("undefined", "few_seeds"):
            why = "too few seeds" if difference and difference["outcome"] == "few_seeds" else "no value"
            text = f"{main}, {guarded.key}: undecided, {why}"
        else:
            drop = guarded.column.factor * difference["mean"] * (-1 if guarded.column.better == "higher" else 1)
            beyond = drop > guarded.allowed
            judged = FAILED if beyond and difference["outcome"] == "worse" else PASSED
            unclear = ", but not outside noise" if beyond and judged == PASSED else ""
            text = (
                f"{main}, {guarded.key}: {judged}, {guarded.column.label} differs from the base's by "
                f"{_interval(difference, guarded.column)}, {'beyond' if beyond else 'within'} the allowed drop of "
                f"{guarded.allowed:g}{unclear}"
            )
        entries.append(
            {"key": guarded.key, "allowed": guarded.allowed, "drop": drop, "outcome": judged, "text": text}
        )
    return entries


def _benchmark(name: str, compared: Mapping[str, Any], main: str) -> list[str]:
    lines, metric = [], METRICS[compared["metric"]]
    base = compared["systems"].get(BASE, {"metrics": {}})["metrics"]
    if reason := metric.gate({key: value["mean"] for key, value in base.items()}):
        return [f"{name}: {reason}."]
    delta = compared["systems"][main]["metrics"].get(metric.frontier.delta) if metric.frontier else None
    if metric.frontier and delta is not None:
        column = metric.column(metric.frontier.delta)
        lines.append(_frontier(name, main, column, delta, compared["systems"][main]["beyond_frontier"]))
    for reference, differences in compared["differences"].items():
        if main == reference:
            continue
        for key in metric.deciding:
            difference = differences[main].get(key)
            if difference is not None and difference["outcome"] != "undefined":
                lines.append(_pairwise(name, main, reference, metric.column(key), difference))
                break
    return lines


def _frontier(name: str, main: str, column: Column, delta: Mapping[str, Any], beyond: bool) -> str:
    judged = outcome(delta, str(column.better))
    if judged == "undefined":
        return f"{name}: {main}'s recall lies below the base's stop-bias frontier, so it cannot be compared with it."
    bound = " (at most: its recall lies beyond the frontier's)" if beyond else ""
    numbers = f"{column.label} {_interval(delta, column)}{bound}"
    match judged:
        case "better":
            return f"{name}: {main} does better than the base's stop-bias frontier; {numbers}."
        case "worse":
            return f"{name}: {main} does worse than the base's stop-bias frontier; {numbers}."
        case "tie":
            return f"{name}: {main} is not shown to do better than the base's stop-bias frontier; {numbers}."
    return f"{name}: {main} against the base's stop-bias frontier: {numbers}; too few seeds for a claim."


def _pairwise(name: str, main: str, reference: str, column: Column, difference: Mapping[str, Any]) -> str:
    words = {
        "better": f"{main} beats {reference}",
        "worse": f"{main} is worse than {reference}",
        "tie": f"{main} and {reference} are not told apart",
        "few_seeds": f"{main} against {reference}, too few seeds for a claim",
    }[difference["outcome"]]
    return f"{name}: {words}; {column.label} differs by {_interval(difference, column)}."


def _interval(value: Mapping[str, Any], column: Column) -> str:
    """As the column shows it."""

    def shown(key: str) -> str:
        return f"{column.factor * value[key]:+.{column.digits}f}"

    text = f"{shown('mean')} [images {shown('low')} to {shown('high')}"
    if value["t_low"] is not None:
        text += f"; seeds {shown('t_low')} to {shown('t_high')}"
    return text + "]"


def _why(results: Mapping[str, Any], config: CompareConfig) -> list[str]:
    """Diagnostics that bear on the result."""
    lines, signals = [], results["signals"]
    correlation = signals.get("correlation/confidence_mean")
    if correlation is not None and correlation > CORRELATION_LIMIT:
        lines.append(
            f"Within prompts MAS and mean confidence correlate at {correlation:.2f} (above {CORRELATION_LIMIT}): "
            "confidence adds little to MAS, so a tie with mas_dpo is expected."
        )
    # Selection chooses among the answers of one prompt; over all answers easy prompts and hard ones tell apart too.
    for prefix, among in (("auroc_within/", "one prompt's answers"), ("auroc/", "all answers")):
        areas = {key.removeprefix(prefix): value for key, value in signals.items() if key.startswith(prefix)}
        if areas:
            listed = ", ".join(f"{name.removeprefix('confidence_')} {value:.2f}" for name, value in areas.items())
            lines.append(f"AUROC for a right answer among {among}: {listed} (0.5 is chance).")
    trained = results["training"]
    if (shift := trained.get(config.main, {}).get("delta_logps/chosen")) is not None and shift < DISPLACED:
        lines.append(
            f"{config.main} made the chosen answers less likely ({shift:+.2f} nats a token): likelihood displacement."
        )
    for name, compared in results["benchmarks"].items():
        lines += _yes_rate(name, compared, config.main)
    return lines


def _yes_rate(name: str, compared: Mapping[str, Any], main: str) -> list[str]:
    rates = {
        system: compared["systems"].get(system, {"metrics": {}})["metrics"].get("yes_ratio", {}).get("mean")
        for system in (BASE, main)
    }
    if None in rates.values():
        return []
    return [f"{name}: yes-rate {100 * rates[BASE]:.0f} % before, {100 * rates[main]:.0f} % after {main}."]
