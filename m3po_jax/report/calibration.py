"""The calibration page: AUROC and reliability of MAS and of each confidence variant, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3po_jax.report.charts import Line, Point, forest_chart, reliability_chart, series_colour
from m3po_jax.report.figures import Figure
from m3po_jax.report.formatting import clip, format_compact, format_number, format_percent, format_span, slug
from m3po_jax.workspace.contents import Round
from m3po_jax.workspace.files import as_dict, as_dicts, as_number

TONES = {"warn": "Warning", "good": "Good", "note": "Note"}


@dataclass
class CalibrationView:
    """One round's page."""

    number: int
    verdict: list[tuple[str, str, str]]  # tone, its name, text
    truths: list[str]
    rows: list[dict[str, str]]
    comparison: Figure | None
    figures: list[Figure]
    bins: list[tuple[str, list[tuple[str, str, str, str]]]]  # signal, (range, count, mean score, true)
    judges: list[str]


def label(name: str, signal: dict[str, Any]) -> str:
    """A signal's name for people."""
    if name == "mas":
        return "MAS"
    if name == "confidence":
        return f"confidence: {clip(signal.get('variant') or 'used', 40)} (in use)"
    if name.startswith("mas_"):
        return f"MAS: {name.removeprefix('mas_')}"
    return f"confidence: {name.removeprefix('confidence_')}"


def calibration_views(rounds: list[Round]) -> list[CalibrationView]:
    """A page for every round that has something to show, the latest first."""
    views = [_view(each) for each in reversed(rounds) if each.calibration]
    return [view for view in views if view.rows or view.verdict or view.judges]


def _view(one_round: Round) -> CalibrationView:
    calibration = one_round.calibration
    stated = {name: item for name, item in calibration.items() if isinstance(item, dict) and "auroc" in item}
    # MAS, its members, the confidence in use, the other variants.
    order = {name: (not name.startswith("mas"), "_" in name, name) for name in stated}
    signals = [(name, stated[name]) for name in sorted(stated, key=lambda name: order[name])]
    correlations = as_dict(calibration.get("correlation_mas_confidence"))
    rows = []
    for name, signal in signals:
        variant = f"confidence_{signal.get('variant')}" if name == "confidence" else name
        within, reliability = as_dict(signal.get("within")), as_dict(signal.get("reliability"))
        rows.append(
            {
                "name": clip(label(name, signal), 60),
                "auroc": format_number(signal.get("auroc"), 2),
                "within": format_number(within.get("auroc"), 2),
                "interval": format_span(within.get("low"), within.get("high"), 2),
                "n": format_number(signal.get("n"), 0),
                "ece": format_number(reliability.get("ece"), 3),
                "correlation": format_number(correlations.get(variant), 2),
            }
        )
    return CalibrationView(
        number=one_round.number,
        verdict=[
            (tone, TONES[tone], clip(line.get("text"), 600))
            for line in as_dicts(calibration.get("verdict"))
            if (tone := str(line.get("tone"))) in TONES
        ],
        truths=[_truth(truth) for truth in as_dicts(calibration.get("truths"))],
        rows=rows,
        comparison=_comparison(one_round.number, signals),
        figures=_figures(one_round.number, signals),
        bins=[(label(name, signal), lines) for name, signal in signals if (lines := _bin_lines(signal))],
        judges=[_judge(judge) for judge in as_dicts(calibration.get("judges"))],
    )


def _truth(truth: dict[str, Any]) -> str:
    n, true = as_number(truth.get("n")) or 0, as_number(truth.get("true")) or 0
    share = f", {format_percent(true / n)} of them right" if n else ""
    return f"{format_number(n, 0)} answers{share}: {clip(truth.get('meaning'), 120)}"


def _judge(judge: dict[str, Any]) -> str:
    parts = [f"{clip(judge.get('judge'), 80)} at {clip(judge.get('server'), 120)}"]
    for key in ("requests", "prompt_tokens", "completion_tokens"):
        parts.append(f"{format_number(judge.get(key), 0)} {key.replace('_', ' ')}")
    parts.append(f"cost {format_compact(judge.get('cost'))}")
    if as_number(judge.get("guessed")):
        parts.append(f"of {format_number(judge.get('guessed'), 0)} requests guessed, as the server tells no tokens")
    return ", ".join(parts)


def _bins(signal: dict[str, Any]) -> list[dict[str, float]]:
    """The bins of a reliability curve, malformed ones left out."""
    names = ("low", "high", "count", "score", "true")
    bins = []
    for item in as_dicts(as_dict(signal.get("reliability")).get("bins")):
        values = {name: as_number(item.get(name)) for name in names}
        if all(value is not None for value in values.values()):
            bins.append({name: float(value) for name, value in values.items() if value is not None})
    return bins


def _bin_lines(signal: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"{format_compact(b['low'])} to {format_compact(b['high'])}",
            format_number(b["count"], 0),
            format_number(b["score"], 3),
            format_percent(b["true"], 1),
        )
        for b in _bins(signal)
    ]


def _comparison(number: int, signals: list[tuple[str, dict[str, Any]]]) -> Figure | None:
    """Every signal's AUROC within prompts on one axis."""
    points = []
    for name, signal in signals:
        within = as_dict(signal.get("within"))
        value, low, high = (as_number(within.get(key)) for key in ("auroc", "low", "high"))
        if value is not None:
            interval = None if low is None or high is None else (low, high)
            points.append(Point(label(name, signal).removeprefix("confidence: "), 0.0, value, "arm", interval))
    if not points:
        return None
    title = "Who knows which answer is right?"
    chart = forest_chart(title, points, band=None, digits=2, x_label="AUROC within prompts", reference=0.5)
    note = (
        "How often a right answer outscores a wrong one to the same prompt: 0.5, the dotted line, is chance. "
        "Whiskers are bootstrap intervals over prompts (95 %)."
    )
    return Figure(f"auroc-{number}", title, chart, note)


def _figures(number: int, signals: list[tuple[str, dict[str, Any]]]) -> list[Figure]:
    mas = [(name, signal) for name, signal in signals if name.startswith("mas")]
    figures = _reliability(number, "mas", "Reliability of MAS", mas)
    for name, signal in signals:
        if name.startswith("confidence"):
            title = f"Reliability of {label(name, signal).removesuffix(' (in use)')}"
            figures += _reliability(number, name, title, [(name, signal)])
    return figures


def _reliability(number: int, key: str, title: str, signals: list[tuple[str, dict[str, Any]]]) -> list[Figure]:
    curves = []
    for style, (name, signal) in enumerate(signals):
        bins = _bins(signal)
        if bins:
            x, y, n = ([b[part] for b in bins] for part in ("score", "true", "count"))
            curves.append((Line(label(name, signal), x, y, series_colour(style)), n))
    if not curves:
        return []
    nats = as_dict(signals[0][1].get("reliability")).get("scale") == "nats"
    axis = "confidence in nats" if nats else "score, as a probability"
    chart = reliability_chart(title, curves, x_label=axis, diagonal=not nats)
    note = "" if nats else "A calibrated score lies on the dotted line. "
    note += "A dot's size and the bars below tell how many answers it stands for."
    legend = [(line.colour, line.name) for line, _ in curves] if len(curves) > 1 else []
    return [Figure(f"reliability-{slug(key)}-{number}", title, chart, note, legend)]
