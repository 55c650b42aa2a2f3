"""What the report's charts show, as typed values: lines, dots, bars, marks with intervals, and their axes.

Every function is pure and turns data into a `Chart`; `drawing.draw` turns a `Chart` into SVG. A colour is the name of
one of the page's CSS variables (`drawing.COLOURS`), so that charts follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from m3po_jax.report.formatting import format_compact, format_number

WIDE, NARROW, HEIGHT = 480, 330, 240  # two and three charts in a row: text has the same size in both
ROW_HEIGHT, FOREST_MARGIN = 22, 46  # of a forest chart: one system, and the axis below all
MAX_POINTS = 160  # of one line; longer ones are averaged in equal bins
MAX_DOTS = 700  # of one group of a scatter chart
SERIES = 8  # colours of lines, in order
MARK_COLOURS = {"base": "text", "arm": "s0", "frontier": "all", "decoding": "s2"}

Values = tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """A system with its value: an arm, the base, a point of the stop-bias frontier, or a decoding method.

    `interval` is of y.
    """

    name: str
    x: float
    y: float
    kind: str = "arm"
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        limits: Where it begins and ends.
        label: What it measures, with its unit.
        whole: It counts whole things, such as steps and rounds.
        percent: Its values are shares, shown as percentages.
        rows: Names in place of numbers: the first stands at 0, the next at 1, downwards.
    """

    limits: tuple[float, float]
    label: str = ""
    whole: bool = False
    percent: bool = False
    rows: tuple[tuple[str, str], ...] = ()  # name and kind


@dataclass(frozen=True)
class Line:
    """Points joined by a line; x ascending."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    bold: bool = False


@dataclass(frozen=True)
class Dots:
    """Points of one group."""

    name: str
    x: Values
    y: Values
    colour: str


@dataclass(frozen=True)
class Steps:
    """A histogram: `heights` between consecutive `edges`, filled, and outlined unless it is the background."""

    name: str
    edges: Values
    heights: Values
    colour: str
    outlined: bool


@dataclass(frozen=True)
class Mark:
    """One labelled point.

    Attributes:
        text: What a pointer that rests on it reads.
        radius: In pixels.
        interval: Of x.
        label: Written beside it where there is room.
    """

    x: float
    y: float
    colour: str
    text: str
    radius: float = 4.0
    interval: tuple[float, float] | None = None
    label: str = ""


@dataclass(frozen=True)
class Bars:
    """Counts as bars along the bottom, the largest an eighth of the chart's height."""

    x: Values
    counts: Values
    colour: str = "all"


@dataclass(frozen=True)
class Rule:
    """A straight line across the chart at one value of an axis, or (``"diagonal"``) where x equals y."""

    axis: Literal["x", "y", "diagonal"]
    at: float = 0.0
    label: str = ""
    colour: str = "muted"


@dataclass(frozen=True)
class Band:
    """A shaded range of x."""

    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """One chart, complete: what is drawn from back to front, and its size in pixels."""

    title: str
    x: Axis
    y: Axis
    parts: tuple[Line | Dots | Steps | Mark | Bars | Rule | Band, ...]
    width: int = WIDE
    height: int = HEIGHT

    @property
    def lines(self) -> list[Line]:
        return [part for part in self.parts if isinstance(part, Line)]


def series_colour(number: int) -> str:
    """The colour of a chart's first, second, … line."""
    return f"s{number % SERIES}"


def bin_size(count: int, limit: int = MAX_POINTS) -> int:
    """Neighbouring points that are averaged into one, so that `count` points become at most `limit`."""
    return max(1, -(-count // limit))


def average(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of `bin_size` neighbours each; NaNs are left out.

    All bins but the last have the same size: uneven ones would show noise that is not in the data.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    keep = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    size = bin_size(len(xs), limit)
    if size == 1:
        return xs, ys
    starts = np.arange(0, len(xs), size)
    counts = np.diff(np.append(starts, len(xs)))
    return np.add.reduceat(xs, starts) / counts, np.add.reduceat(ys, starts) / counts


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range of positive length."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    low, high = _widen(float(values.min()), float(values.max()))
    return low - share * (high - low), high + share * (high - low)


def _values(array: Sequence[float] | np.ndarray) -> Values:
    return tuple(float(value) for value in array)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    reference: tuple[float, str] | None = None,
    breaks: Sequence[tuple[float, str]] = (),
    percent: bool = False,
) -> Chart | None:
    """Lines over a common x axis; None where no point is finite.

    Args:
        reference: A horizontal line and what it means.
        breaks: Vertical lines (starts of rounds) and their labels.
    """
    averaged = [(line, average(line.x, line.y)) for line in lines]
    lines = [replace(line, x=_values(x), y=_values(y)) for line, (x, y) in averaged if len(y)]
    if not lines:
        return None
    every_x = np.array([x for line in lines for x in line.x])
    every_y = np.array([y for line in lines for y in line.y] + ([reference[0]] if reference else []))
    rules = [Rule("x", at, label, "strong-line") for at, label in breaks]
    rules += [Rule("y", *reference)] if reference else []
    # Steps, rounds and pairs are whole, even where means of them are drawn.
    whole = bool(np.ptp(every_x) >= 2 or all(float(x).is_integer() for x in every_x))
    return Chart(
        title,
        Axis(_widen(float(every_x.min()), float(every_x.max())), x_label, whole=whole),
        Axis(_padded(every_y), percent=percent),
        (*rules, *sorted(lines, key=lambda line: line.bold)),
    )


def histogram_chart(
    title: str, groups: Sequence[tuple[str, np.ndarray]], *, x_label: str, bins: int = 28
) -> Chart | None:
    """Shares of each group over common bins: the group ``all`` as a filled background, the others outlined.

    Args:
        groups: Colour and values of each group; NaNs are left out, each group sums to 100 %.
    """
    finite = [(name, values[np.isfinite(values)]) for name, values in groups]
    finite = [(name, values) for name, values in finite if len(values)]
    if not finite:
        return None
    every = np.concatenate([values for _, values in finite])
    low, high = _widen(float(every.min()), float(every.max()))
    edges = np.linspace(low, high, min(bins, max(4, round(math.sqrt(len(every))))) + 1)
    steps = [
        Steps(name, _values(edges), _values(np.histogram(values, edges)[0] / len(values)), name, name != "all")
        for name, values in finite
    ]
    top = max(max(group.heights) for group in steps)
    return Chart(title, Axis((low, high), x_label), Axis((0.0, top * 1.06), percent=True), tuple(steps), width=NARROW)


def scatter_chart(
    title: str, groups: Sequence[tuple[str, np.ndarray, np.ndarray]], *, x_label: str, y_label: str
) -> Chart | None:
    """Groups of points; a larger group than `MAX_DOTS` is thinned evenly, in a fixed pseudo-random order."""
    finite = []
    for name, x, y in groups:
        keep = np.isfinite(x) & np.isfinite(y)
        if keep.any():
            finite.append((name, x[keep], y[keep]))
    if not finite:
        return None
    every_x, every_y = (np.concatenate([group[axis] for group in finite]) for axis in (1, 2))
    dots = []
    for name, x, y in finite:
        rows = np.sort(np.random.default_rng(0).permutation(len(x))[:MAX_DOTS])
        dots.append(Dots(name, _values(x[rows]), _values(y[rows]), name))
    x_axis, y_axis = Axis(_padded(every_x, 0.03), x_label), Axis(_padded(every_y, 0.03), y_label)
    return Chart(title, x_axis, y_axis, tuple(dots), width=NARROW)


def forest_chart(
    title: str,
    points: Sequence[Point],
    *,
    band: tuple[float, float] | None,
    digits: int,
    x_label: str,
    reference: float | None = None,
) -> Chart:
    """One row a system: value (`Point.y`) and interval on a common axis.

    Args:
        band: Shaded behind (the base's interval).
        reference: Where a dotted line stands (chance, no difference).
    """
    ends = [end for point in points for end in (point.interval or (point.y, point.y))]
    ends += [*(band or ()), *([] if reference is None else [reference])]
    parts: list[Band | Rule | Mark] = [Band(*band)] if band else []
    parts += [] if reference is None else [Rule("x", reference)]
    for row, point in enumerate(points):
        text = f"{point.name}: {format_number(point.y, digits)}"
        parts.append(Mark(point.y, row, MARK_COLOURS[point.kind], text, interval=point.interval))
    rows = tuple((_short(point.name), point.kind) for point in points)
    height = FOREST_MARGIN + ROW_HEIGHT * len(points)
    y_axis = Axis((-0.5, len(points) - 0.5), rows=rows)
    return Chart(title, Axis(_padded(np.array(ends)), x_label), y_axis, tuple(parts), height=height)


def frontier_chart(title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> Chart | None:
    """Systems in the plane of two metrics; those of kind `frontier` are joined by a line, in order of x."""
    if not points:
        return None
    curve = sorted((p.x, p.y) for p in points if p.kind == "frontier" or p.name == "base")
    line = [Line("frontier", _values([x for x, _ in curve]), _values([y for _, y in curve]), "all")]
    marks = [
        Mark(p.x, p.y, MARK_COLOURS[p.kind], p.name, label="" if p.kind == "frontier" else _short(p.name))
        for p in points
    ]
    x_axis = Axis(_padded(np.array([p.x for p in points]), 0.12), x_label)
    y_axis = Axis(_padded(np.array([p.y for p in points]), 0.12), y_label)
    return Chart(title, x_axis, y_axis, (*(line if len(curve) > 1 else ()), *marks))


def reliability_chart(
    title: str, curves: Sequence[tuple[Line, Sequence[float]]], *, x_label: str, diagonal: bool
) -> Chart:
    """Share of true answers against the score; bars along the bottom count the first curve's answers.

    Args:
        curves: By bins of answers: x their mean score, y the share of true ones, and how many they are.
        diagonal: The score is a probability: both axes run from 0 to 1, with the line of perfect calibration.
    """
    limits = (0.0, 1.0) if diagonal else _padded(np.array([x for line, _ in curves for x in line.x], float))
    most = max(max(counts) for _, counts in curves)
    parts: list[Bars | Rule | Line | Mark] = [Bars(_values(curves[0][0].x), _values(curves[0][1]))]
    parts += [Rule("diagonal")] if diagonal else []
    for line, counts in curves:
        parts.append(line)
        for x, y, n in zip(line.x, line.y, counts, strict=True):
            text = f"{line.name}: {format_compact(x)}, {100 * y:.0f} % right of {n:,.0f}"
            parts.append(Mark(x, y, line.colour, text, radius=2 + 4 * math.sqrt(n / most)))
    y_axis = Axis((0.0, 1.0), "right answers", percent=True)
    return Chart(title, Axis(limits, x_label), y_axis, tuple(parts), width=NARROW)


def _short(name: str) -> str:
    """A system's name as it fits beside a mark."""
    return name if len(name) <= 18 else name[:17] + "…"
