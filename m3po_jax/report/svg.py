"""Small inline SVG charts, coloured by CSS classes so that they follow the reader's light or dark theme.

Every function is pure and deterministic and returns escaped markup. Marks are classed, never coloured here:
`s0` … `s7` are the series colours, `chosen`, `rejected`, `base` the roles. Coordinates have one decimal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from m3po_jax.report.formatting import format_compact, format_number

WIDE, NARROW, HEIGHT = 480, 330, 240  # two and three charts in a row: text has the same size in both
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34
CHARACTER = 5.6  # width of one of a tick's label
MAX_POINTS = 160  # of one line; longer ones are averaged in equal bins


@dataclass(frozen=True)
class Series:
    """One line: x ascending, y of the same length; `style` picks the colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    bold: bool = False


@dataclass(frozen=True)
class BinCurve:
    """Share of true items (y in [0, 1]) by mean score x, one entry a bin, and how many items each bin has."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    count: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class Point:
    """A labelled mark with an optional interval of y."""

    name: str
    x: float
    y: float
    kind: str = "arm"
    interval: tuple[float, float] | None = None


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers inside [low, high], about `count` of them; `whole`: of whole things, such as steps and rounds."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    raw = max(raw, 1.0) if whole else raw
    power = 10.0 ** math.floor(math.log10(raw))
    factors = [factor for factor in (1, 2, 2.5, 5, 10) if not whole or (factor * power).is_integer()]
    step = next(factor * power for factor in factors if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.15g}") for k in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with as many digits as tell the ticks apart and put each where it stands."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=0.0)

    def true(labels: list[str]) -> bool:
        read = [float(label.replace("−", "-").replace(",", "")) for label in labels]
        return all(abs(a - b) <= 1e-3 * step for a, b in zip(read, values, strict=True))

    labels = [format_compact(value) for value in values]
    tiny = max(map(abs, values)) < 1e-3
    for digits in range(1, 16):
        if true(labels):
            break
        if tiny:
            labels = [f"{value:.{digits}e}".replace("-", "−") for value in values]
        else:
            labels = [format_number(value, digits) for value in values]
    return labels


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


class _Frame:
    """Scales, gridlines and axis labels of one chart."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int = WIDE,
        height: int = HEIGHT,
        left: int = LEFT,
        percent: bool = False,
    ):
        """Scales for these ranges; `percent`: y is a share, `left`: the least margin, which long labels widen."""
        self.x0, self.x1 = _widen(*x)
        self.y0, self.y1 = _widen(*y)
        scale, unit = (100, " %") if percent else (1, "")
        marks = ticks(scale * self.y0, scale * self.y1, 4)
        self.y_ticks = [(mark / scale, label + unit) for mark, label in zip(marks, tick_labels(marks), strict=True)]
        left = max(left, math.ceil(CHARACTER * max(len(label) for _, label in self.y_ticks)) + 8)
        self.left, self.right, self.height, self.width = left, width - RIGHT, height, width
        self.parts: list[Markup] = []

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def py(self, y: float) -> float:
        return self.height - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (self.height - BOTTOM - TOP)

    def add(self, template: str, *args: object, **kwargs: object) -> None:
        self.parts.append(Markup(template).format(*args, **kwargs))

    def axes(self, x_label: str, *, y_axis: bool = True, whole: bool = False) -> None:
        """Gridlines and labels; `whole`: x counts whole things."""
        bottom = self.height - BOTTOM
        for value, label in self.y_ticks if y_axis else []:
            at = self.py(value)
            self.add('<path class="grid" d="M{} {:.1f}H{}"/>', self.left, at, self.right)
            self.add(
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>',
                self.left - 6,
                at + 3.5,
                label,
            )
        marks = ticks(self.x0, self.x1, round(self.width / 75), whole=whole)
        labels = tick_labels(marks)
        # Labels that would touch each other are thinned.
        apart = max(map(len, labels)) * CHARACTER + 8
        room = (self.px(marks[-1]) - self.px(marks[0])) / max(len(marks) - 1, 1)
        every = max(1, math.ceil(apart / room)) if room > 0 else 1
        for value, label in list(zip(marks, labels, strict=True))[::every]:
            self.add(
                '<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>',
                self.px(value),
                bottom + 14,
                label,
            )
        self.add('<path class="axis" d="M{} {}H{}"/>', self.left, bottom, self.right)
        middle = (self.left + self.right) / 2
        self.add(
            '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>',
            middle,
            self.height - 4,
            x_label,
        )

    def svg(self, title: str, extra: str = "") -> Markup:
        body = Markup("").join(self.parts)
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}</svg>').format(
            self.width, self.height, title, Markup(extra), body
        )


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range of positive length."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    low, high = _widen(float(values.min()), float(values.max()))
    return low - share * (high - low), high + share * (high - low)


def _path(frame: _Frame, x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{frame.px(a):.1f} {frame.py(b):.1f}" for a, b in zip(x, y, strict=True))


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    reference: tuple[float, str] | None = None,
    breaks: Sequence[tuple[float, str]] = (),
    percent: bool = False,
) -> tuple[Markup, dict[str, object]] | None:
    """Lines over a common x axis.

    Args:
        reference: A horizontal line and what it means.
        breaks: Vertical lines (starts of rounds) and their labels.

    Returns:
        The chart and its numbers for the reader's crosshair; None where no point is finite.
    """
    drawn = [(s, *average(s.x, s.y)) for s in series]
    drawn = [item for item in drawn if len(item[1])]
    if not drawn:
        return None
    every_y = np.concatenate([y for _, _, y in drawn] + ([np.array([reference[0]])] if reference else []))
    every_x = np.concatenate([x for _, x, _ in drawn])
    frame = _Frame((float(every_x.min()), float(every_x.max())), _padded(every_y), percent=percent)
    # Steps, rounds and pairs are whole, even where means of them are drawn.
    frame.axes(x_label, whole=np.ptp(every_x) >= 2 or all(float(x).is_integer() for x in every_x))
    for at, label in breaks:
        frame.add('<path class="break" d="M{:.1f} {}V{}"/>', frame.px(at), TOP, HEIGHT - BOTTOM)
        frame.add('<text class="tick" x="{:.1f}" y="{}">{}</text>', frame.px(at) + 4, TOP + 8, label)
    if reference:
        at = frame.py(reference[0])
        frame.add('<path class="reference" d="M{} {:.1f}H{}"/>', frame.left, at, frame.right)
        frame.add(
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>',
            frame.right,
            at - 4,
            reference[1],
        )
    for s, x, y in sorted(drawn, key=lambda item: item[0].bold):
        frame.add(
            '<path class="line s{}{}" d="{}"><title>{}</title></path>',
            s.style % 8,
            " bold" if s.bold else "",
            # A single point has no line; a zero-length stroke with round caps shows it as a dot.
            _path(frame, x, y) + ("h0" if len(x) == 1 else ""),
            s.name,
        )
    span = float(every_y.max() - every_y.min())
    digits = 4 if span == 0 else max(4, math.ceil(math.log10(float(np.abs(every_y).max()) / span)) + 3)
    data: dict[str, object] = {
        "x0": frame.x0,
        "x1": frame.x1,
        "left": frame.left,
        "right": frame.right,
        "width": frame.width,
        "bottom": HEIGHT - BOTTOM,
        "percent": percent,
        "digits": digits,
        "series": [
            {
                "name": s.name,
                "style": s.style % 8,
                "x": [float(f"{v:.9g}") for v in x],
                "y": [float(f"{v:.{digits}g}") for v in y],
            }
            for s, x, y in drawn
        ],
    }
    return frame.svg(title), data


def histogram_chart(
    title: str, groups: Sequence[tuple[str, np.ndarray]], *, x_label: str, bins: int = 28
) -> Markup | None:
    """Shares of each group over common bins: the first group as filled bars, the others as outlines.

    Args:
        groups: CSS class and values of each group; NaNs are left out, each group sums to 100 %.
    """
    finite = [(name, values[np.isfinite(values)]) for name, values in groups]
    finite = [(name, values) for name, values in finite if len(values)]
    if not finite:
        return None
    every = np.concatenate([values for _, values in finite])
    low, high = _widen(float(every.min()), float(every.max()))
    edges = np.linspace(low, high, min(bins, max(4, round(math.sqrt(len(every))))) + 1)
    shares = [(name, np.histogram(values, edges)[0] / len(values)) for name, values in finite]
    top = max(float(share.max()) for _, share in shares)
    frame = _Frame((float(edges[0]), float(edges[-1])), (0.0, top * 1.06), width=NARROW, percent=True)
    frame.axes(x_label)
    for name, share in shares:
        xs = np.repeat(edges, 2)
        ys = np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
        frame.add('<path class="hist {}" d="{}Z"/>', name, _path(frame, xs, ys))
    return frame.svg(title)


def scatter_chart(
    title: str,
    groups: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    x_label: str,
    y_label: str,
    limit: int = 700,
) -> Markup | None:
    """Groups of points; a larger group than `limit` is thinned evenly, in a fixed pseudo-random order."""
    finite = []
    for name, x, y in groups:
        keep = np.isfinite(x) & np.isfinite(y)
        if keep.any():
            finite.append((name, x[keep], y[keep]))
    if not finite:
        return None
    every_x, every_y = (np.concatenate([group[axis] for group in finite]) for axis in (1, 2))
    frame = _Frame(_padded(every_x, 0.03), _padded(every_y, 0.03), width=NARROW)
    frame.axes(x_label)
    frame.add(
        '<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>',
        100,
        y_label,
    )
    for name, x, y in finite:
        rows = np.sort(np.random.default_rng(0).permutation(len(x))[:limit])
        dots = "".join(f"M{frame.px(x[row]):.1f} {frame.py(y[row]):.1f}h0" for row in rows)
        frame.add('<path class="dots {}" d="{}"/>', name, dots)
    return frame.svg(title)


def forest_chart(
    title: str,
    points: Sequence[Point],
    *,
    band: tuple[float, float] | None,
    digits: int,
    x_label: str,
    reference: float | None = None,
) -> Markup:
    """One row a system: value (`Point.y`) and interval on a common axis.

    Args:
        band: Shaded behind (the base's interval).
        reference: Where a dotted line stands (chance, no difference).
    """
    lows = [p.interval[0] if p.interval else p.y for p in points]
    highs = [p.interval[1] if p.interval else p.y for p in points]
    left, row_height = 118, 22
    height = TOP + BOTTOM + row_height * len(points)
    marks = [] if reference is None else [reference]
    frame = _Frame(_padded(np.array([*lows, *highs, *(band or ()), *marks])), (0.0, 1.0), left=left, height=height)
    if band:
        x, end = frame.px(band[0]), frame.px(band[1])
        frame.add(
            '<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>',
            x,
            TOP,
            max(end - x, 1),
            row_height * len(points),
        )
    frame.axes(x_label, y_axis=False)
    if reference is not None:
        frame.add('<path class="reference" d="M{:.1f} {}V{}"/>', frame.px(reference), TOP, height - BOTTOM)
    for row, point in enumerate(points):
        y = TOP + row_height * (row + 0.5)
        shown = point.name if len(point.name) <= 18 else point.name[:17] + "…"
        frame.add('<g class="{}">', f"mark-{point.kind}")
        frame.add('<text class="name" x="{}" y="{:.1f}" text-anchor="end">{}</text>', left - 10, y + 4, shown)
        if point.interval:
            frame.add(
                '<path class="whisker" d="M{:.1f} {:.1f}H{:.1f}"/>',
                frame.px(lows[row]),
                y,
                frame.px(highs[row]),
            )
        frame.add(
            '<circle cx="{:.1f}" cy="{:.1f}" r="4"><title>{}: {:.{}f}</title></circle></g>',
            frame.px(point.y), y, point.name, point.y, digits,
        )  # fmt: skip
    return frame.svg(title)


def frontier_chart(title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> Markup | None:
    """Systems in the plane of two metrics; those of kind `frontier` are joined by a line, in order of x."""
    if not points:
        return None
    frame = _Frame(_padded(np.array([p.x for p in points]), 0.12), _padded(np.array([p.y for p in points]), 0.12))
    frame.axes(x_label)
    frame.add(
        '<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>',
        100,
        y_label,
    )
    line = sorted((p.x, p.y) for p in points if p.kind == "frontier" or p.name == "base")
    if len(line) > 1:
        frame.add('<path class="frontier" d="{}"/>', _path(frame, *np.array(line).T))
    # Boxes that labels must not cover: the marks, then the labels already placed.
    taken = [(frame.px(p.x) - 5, frame.py(p.y) - 5, frame.px(p.x) + 5, frame.py(p.y) + 5) for p in points]
    for p in points:
        x, y = frame.px(p.x), frame.py(p.y)
        frame.add(
            '<g class="mark-{}"><circle cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>',
            p.kind,
            x,
            y,
            p.name,
        )
        if p.kind != "frontier":
            shown = p.name if len(p.name) <= 18 else p.name[:17] + "…"
            width = 6.2 * len(shown)
            for dx, dy in ((8, 4), (-8 - width, 4), (8, -7), (8, 14), (-8 - width, -7), (-8 - width, 14)):
                box = (x + dx, y + dy - 10, x + dx + width, y + dy + 2)
                inside = box[0] >= frame.left and box[2] <= frame.width and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
                free = all(box[0] > o[2] or box[2] < o[0] or box[1] > o[3] or box[3] < o[1] for o in taken)
                if inside and free:  # a label with no free place is left to the mark's tooltip
                    taken.append(box)
                    frame.add('<text class="name" x="{:.1f}" y="{:.1f}">{}</text>', box[0], y + dy, shown)
                    break
        frame.add("</g>")
    return frame.svg(title)


def reliability_chart(title: str, curves: Sequence[BinCurve], *, x_label: str, diagonal: bool) -> Markup:
    """Share of true answers against the score; bars along the bottom count the first curve's answers.

    Args:
        diagonal: The score is a probability: both axes run from 0 to 1, with the line of perfect calibration.
    """
    every = np.concatenate([np.asarray(curve.x, float) for curve in curves])
    x_range = (0.0, 1.0) if diagonal else _padded(every)
    frame = _Frame(x_range, (0.0, 1.0), width=NARROW, left=LEFT + 8, percent=True)
    frame.axes(x_label)
    frame.add(
        '<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>',
        100,
        "right answers",
    )
    most = max(max(curve.count) for curve in curves)
    bottom, tallest = HEIGHT - BOTTOM, 30
    for at, count in zip(curves[0].x, curves[0].count, strict=True):
        tall, left = tallest * count / most, frame.px(at) - 4
        bar = '<rect class="count" x="{:.1f}" y="{:.1f}" width="8" height="{:.1f}"/>'
        frame.add(bar, left, bottom - tall, tall)
    if diagonal:
        ends = frame.px(0), frame.py(0), frame.px(1), frame.py(1)
        frame.add('<path class="reference" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>', *ends)
    for curve in curves:
        frame.add('<g class="bins s{}">', curve.style % 8)
        line = _path(frame, np.asarray(curve.x, float), np.asarray(curve.y, float))
        frame.add('<path class="line s{}" d="{}"/>', curve.style % 8, line)
        for x, y, n in zip(curve.x, curve.y, curve.count, strict=True):
            frame.add(
                '<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>',
                frame.px(x),
                frame.py(y),
                2 + 4 * math.sqrt(n / most),
                f"{curve.name}: {format_compact(x)}, {100 * y:.0f} % right of {n:,.0f}",
            )
        frame.add("</g>")
    return frame.svg(title)
