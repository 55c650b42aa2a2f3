"""The charts of a run's training and of its rounds' scores, each with its heading, note and legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup

from m3po_jax.objectives.registry import starting_loss
from m3po_jax.report.charts import (
    MAX_DOTS,
    Chart,
    Line,
    bin_size,
    histogram_chart,
    line_chart,
    scatter_chart,
    series_colour,
)
from m3po_jax.report.drawing import Drawing, draw
from m3po_jax.report.formatting import slug
from m3po_jax.workspace.contents import Candidates, Pairs, Round, RunContents
from m3po_jax.workspace.files import as_dict, as_number


@dataclass
class Figure:
    """One chart with its heading, what to look for, and its legend as (CSS class, text).

    Attributes:
        id: Of the element in the page.
        readable: A crosshair reads the lines' values.
    """

    id: str
    title: str
    chart: Chart
    note: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    readable: bool = False

    @cached_property
    def _drawing(self) -> Drawing:
        return draw(self.chart, self.id)

    @property
    def svg(self) -> Markup:
        return self._drawing.svg

    def crosshair(self) -> dict[str, Any]:
        """The lines' values and where they stand in the drawing, for the page's script."""
        chart, drawing = self.chart, self._drawing
        lines = sorted(chart.lines, key=lambda line: line.colour)
        every = [abs(value) for line in lines for value in line.y]
        span = max(value for line in lines for value in line.y) - min(value for line in lines for value in line.y)
        # As many significant digits as tell the values apart.
        digits = 4 if span == 0 else max(4, math.ceil(math.log10(max(every) / span)) + 3)
        return {
            "x0": chart.x.limits[0],
            "x1": chart.x.limits[1],
            "left": drawing.left,
            "right": drawing.right,
            "top": drawing.top,
            "bottom": drawing.bottom,
            "width": chart.width,
            "percent": chart.y.percent,
            "digits": digits,
            "series": [
                {
                    "name": line.name,
                    "style": int(line.colour.removeprefix("s")),
                    "x": [float(f"{value:.9g}") for value in line.x],
                    "y": [float(f"{value:.{digits}g}") for value in line.y],
                }
                for line in lines
            ],
        }


@dataclass(frozen=True)
class Curve:
    """A training metric: its key in `metrics.jsonl`, and how to read it."""

    key: str
    title: str
    note: str
    percent: bool = False
    reference: tuple[float, str] | None = None


CURVES = (
    Curve("loss", "Training loss", "Losses of different objectives are not comparable with each other."),
    Curve(
        "rewards/margins",
        "Reward margin",
        "β-scaled log-ratio of the chosen answer minus that of the rejected one.",
        reference=(0.0, ""),
    ),
    Curve(
        "rewards/accuracies",
        "Preference accuracy",
        "Share of training pairs that the policy orders as the data does.",
        percent=True,
        reference=(0.5, "chance"),
    ),
    Curve(
        "delta_logps/chosen",
        "Chosen log-ratio per token",
        "Log-probability of chosen answers against the reference model, in nats per token. "
        "Below zero, training makes the good answers less likely too.",
        reference=(0.0, "reference"),
    ),
)
MORE_CURVES = (
    Curve("rewards/chosen", "Reward of chosen answers", "", reference=(0.0, "")),
    Curve("rewards/rejected", "Reward of rejected answers", "", reference=(0.0, "")),
    Curve("grad_norm", "Gradient norm", "Before clipping."),
    Curve("learning_rate", "Learning rate", ""),
    Curve("tokens_per_s", "Tokens per second", ""),
)


def main_arm(run: RunContents) -> str:
    """The name of the run's own arm beside its comparison arms."""
    rule = run.setting("select.rule", "m3p")
    name = "m3po" if rule == "m3p" else str(rule)
    return name if name not in run.arms else f"{name} (this run)"


def _series(name: str, rounds: Sequence[Round], key: str, style: int, bold: bool) -> Line:
    xs, ys, offset = [], [], 0.0
    for each in rounds:
        last = 0.0
        for row in each.metrics:
            step, value = as_number(row.get("step")), as_number(row.get(key))
            if step is not None:
                last = max(last, step)
                if value is not None:
                    xs.append(offset + step)
                    ys.append(value)
        offset += last
    return Line(name, xs, ys, series_colour(style), bold)


def _breaks(rounds: Sequence[Round]) -> list[tuple[float, str]]:
    """Where each later round starts on the axis of steps."""
    at, offset = [], 0.0
    for each in rounds:
        if offset and each.metrics:
            at.append((offset, f"round {each.number}"))
        offset += max((as_number(row.get("step")) or 0.0 for row in each.metrics), default=0.0)
    return at


def training_curves(run: RunContents, curves: Sequence[Curve]) -> list[Figure]:
    """One figure per metric, one line per arm; the steps of later rounds follow those of earlier ones."""
    figures = []
    start = starting_loss(as_dict(run.setting("train")))
    for curve in curves:
        reference = start if curve.key == "loss" and start is not None else curve.reference
        series = [_series(main_arm(run), run.rounds, curve.key, 0, True)]
        series += [_series(arm, rounds, curve.key, 1 + i, False) for i, (arm, rounds) in enumerate(run.arms.items())]
        series = [line for line in series if line.x]
        chart = line_chart(
            curve.title,
            series,
            x_label="optimizer step",
            reference=reference,
            breaks=_breaks(run.rounds),
            percent=curve.percent,
        )
        if chart is None:
            continue
        note = curve.note
        size = bin_size(max(len(line.x) for line in series))
        if size > 1:
            note = f"{note} Each point is a mean over {size} logged steps.".strip()
        legend = [(line.colour, line.name) for line in series] if len(series) > 1 else []
        figures.append(Figure(f"curve-{slug(curve.key)}", curve.title, chart, note, legend, readable=True))
    return figures


def _pair_scores(pairs: Pairs | None, name: str, role: str) -> np.ndarray:
    """MAS or confidence of the chosen or rejected answers, as the pair rows state them."""
    return pairs.numbers[f"{role}_{name}"] if pairs is not None else np.array([])


def distributions(one_round: Round) -> list[Figure]:
    """Histograms of MAS and confidence, and their scatter, for one round."""
    figures = []
    scores = one_round.candidates.scores if one_round.candidates is not None else {}
    empty = np.array([])
    paired = one_round.pairs is not None and len(one_round.pairs) > 0
    notes = {
        "mas": "Chosen and rejected answers should stand apart here.",
        "confidence": "The hard negatives M3PO looks for are rejected answers as confident as chosen ones.",
    }
    titles = {"mas": "Alignment score (MAS)", "confidence": "Confidence"}
    for name in ("mas", "confidence"):
        groups = [("all", scores.get(name, empty))]
        groups += [(role, _pair_scores(one_round.pairs, name, role)) for role in ("chosen", "rejected")]
        chart = histogram_chart(titles[name], groups, x_label="MAS" if name == "mas" else "confidence")
        if chart is not None:
            legend = [
                (css, f"{text} ({np.isfinite(values).sum():,})")
                for (css, values), text in zip(groups, ("all", "chosen", "rejected"), strict=True)
                if np.isfinite(values).any()
            ]
            figures.append(
                Figure(f"hist-{name}-{one_round.number}", titles[name], chart, notes[name] if paired else "", legend)
            )
    groups_xy = [("all", scores.get("mas", empty), scores.get("confidence", empty))]
    for role in ("chosen", "rejected"):
        x, y = (_pair_scores(one_round.pairs, name, role) for name in ("mas", "confidence"))
        groups_xy.append((role, x, y))
    chart = scatter_chart("Alignment against confidence", groups_xy, x_label="MAS", y_label="confidence")
    if chart is not None:
        figures.append(
            Figure(
                f"scatter-{one_round.number}",
                "Alignment against confidence",
                chart,
                f"Upper left: confidently wrong. At most {MAX_DOTS} points of each kind are drawn.",
                [(css, css) for css, x, y in groups_xy if (np.isfinite(x) & np.isfinite(y)).any()],
            )
        )
    return figures


def within_prompt_correlation(candidates: Candidates | None) -> float | None:
    """Pearson correlation of MAS and confidence after each prompt's means are taken out (pooled).

    None without scores or without variation.
    """
    if candidates is None or "mas" not in candidates.scores or "confidence" not in candidates.scores:
        return None
    mas, confidence = candidates.scores["mas"], candidates.scores["confidence"]
    keep = np.isfinite(mas) & np.isfinite(confidence)
    if not keep.any():
        return None
    _, group = np.unique(np.array(candidates.ids)[keep], return_inverse=True)
    count = np.bincount(group)
    x, y = (v[keep] - (np.bincount(group, v[keep]) / count)[group] for v in (mas, confidence))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 1e-12 else None
