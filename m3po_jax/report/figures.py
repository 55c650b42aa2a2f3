"""The report's charts, made from what was read of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from m3po_jax.objectives.registry import starting_loss
from m3po_jax.report.formatting import as_dict, as_number, slug
from m3po_jax.report.run_data import Candidates, Pairs, Round, Run
from m3po_jax.report.svg import Series, bin_size, histogram_chart, line_chart, scatter_chart


@dataclass
class Figure:
    """One chart with its heading, what to look for, and its legend as (CSS class, text)."""

    id: str
    title: str
    svg: Markup
    note: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    data: dict[str, Any] | None = None  # numbers for the crosshair


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


def main_arm(run: Run) -> str:
    """The name of the run's own arm beside its comparison arms."""
    rule = run.setting("select.rule", "m3p")
    name = "m3po" if rule == "m3p" else str(rule)
    return name if name not in run.arms else f"{name} (this run)"


def _series(name: str, rounds: Sequence[Round], key: str, style: int, bold: bool) -> Series:
    xs, ys, offset = [], [], 0.0
    for found in rounds:
        last = 0.0
        for row in found.metrics:
            step, value = as_number(row.get("step")), as_number(row.get(key))
            if step is not None:
                last = max(last, step)
                if value is not None:
                    xs.append(offset + step)
                    ys.append(value)
        offset += last
    return Series(name, xs, ys, style, bold)


def _breaks(rounds: Sequence[Round]) -> list[tuple[float, str]]:
    """Where each later round starts on the axis of steps."""
    at, offset = [], 0.0
    for found in rounds:
        if offset and found.metrics:
            at.append((offset, f"round {found.number}"))
        offset += max((as_number(row.get("step")) or 0.0 for row in found.metrics), default=0.0)
    return at


def training_curves(run: Run, curves: Sequence[Curve]) -> list[Figure]:
    """One figure per metric, one line per arm; the steps of later rounds follow those of earlier ones."""
    figures = []
    start = starting_loss(as_dict(run.setting("train")))
    for curve in curves:
        reference = start if curve.key == "loss" and start is not None else curve.reference
        series = [_series(main_arm(run), run.rounds, curve.key, 0, True)]
        series += [_series(arm, rounds, curve.key, 1 + i, False) for i, (arm, rounds) in enumerate(run.arms.items())]
        series = [line for line in series if line.x]
        drawn = line_chart(
            curve.title,
            series,
            x_label="optimizer step",
            reference=reference,
            breaks=_breaks(run.rounds),
            percent=curve.percent,
        )
        if drawn is None:
            continue
        note = curve.note
        size = bin_size(max(len(line.x) for line in series))
        if size > 1:
            note = f"{note} Each point is a mean over {size} logged steps.".strip()
        legend = [(f"s{line.style % 8}", line.name) for line in series]
        figures.append(
            Figure(
                f"curve-{slug(curve.key)}",
                curve.title,
                drawn[0],
                note,
                legend if len(legend) > 1 else [],
                drawn[1],
            )
        )
    return figures


def _pair_scores(pairs: Pairs | None, name: str, role: str) -> np.ndarray:
    """MAS or confidence of the chosen or rejected answers, as the pair rows state them."""
    return pairs.numbers[f"{role}_{name}"] if pairs is not None else np.array([])


def distributions(found: Round) -> list[Figure]:
    """Histograms of MAS and confidence, and their scatter, for one round."""
    figures = []
    scores = found.candidates.scores if found.candidates is not None else {}
    empty = np.array([])
    paired = found.pairs is not None and len(found.pairs) > 0
    notes = {
        "mas": "Chosen and rejected answers should stand apart here.",
        "confidence": "The hard negatives M3PO looks for are rejected answers as confident as chosen ones.",
    }
    titles = {"mas": "Alignment score (MAS)", "confidence": "Confidence"}
    for name in ("mas", "confidence"):
        groups = [("all", scores.get(name, empty))]
        groups += [(role, _pair_scores(found.pairs, name, role)) for role in ("chosen", "rejected")]
        svg = histogram_chart(titles[name], groups, x_label="MAS" if name == "mas" else "confidence")
        if svg is not None:
            legend = [
                (css, f"{text} ({np.isfinite(values).sum():,})")
                for (css, values), text in zip(groups, ("all", "chosen", "rejected"), strict=True)
                if np.isfinite(values).any()
            ]
            figures.append(
                Figure(f"hist-{name}-{found.number}", titles[name], svg, notes[name] if paired else "", legend)
            )
    groups_xy = [("all", scores.get("mas", empty), scores.get("confidence", empty))]
    for role in ("chosen", "rejected"):
        x, y = (_pair_scores(found.pairs, name, role) for name in ("mas", "confidence"))
        groups_xy.append((role, x, y))
    svg = scatter_chart("Alignment against confidence", groups_xy, x_label="MAS", y_label="confidence")
    if svg is not None:
        figures.append(
            Figure(
                f"scatter-{found.number}",
                "Alignment against confidence",
                svg,
                "Upper left: confidently wrong. At most 700 points of each kind are drawn.",
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
