"""Draws a `Chart` with matplotlib as SVG that lives inside the page.

matplotlib sets scales, ticks, labels and margins. Its SVG is then made part of the page: colours become the page's
CSS variables, text takes the page's font and stays text, and what identifies the drawing program goes. Texts come
from data: matplotlib escapes them, and its mathematical notation is off.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis as DrawnAxis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from m3po_jax.report.charts import Axis, Band, Bars, Chart, Dots, Line, Mark, Rule, Steps

# Variables of report.css; each is drawn in a colour that stands for it and for nothing else.
COLOURS = (
    *(f"s{number}" for number in range(8)),
    *("all", "chosen", "rejected", "text", "muted", "line", "strong-line", "surface"),
)
_STAND_INS = {name: f"#e1a0{number:02x}" for number, name in enumerate(COLOURS)}
_STAND_IN = re.compile(r"#e1a0([0-9a-f]{2})")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}(?:e-\d+)?")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib; only measures, the page's own font is shown
    "font.size": 11,
    "axes.unicode_minus": True,
    "text.color": _STAND_INS["muted"],
    "axes.labelcolor": _STAND_INS["muted"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "axes.edgecolor": _STAND_INS["strong-line"],
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 1,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": False,
}
_BASE_STYLE_PROPERTIES = {"stroke-linecap": "butt", "stroke-linejoin": "round"}


@dataclass(frozen=True)
class Drawing:
    """A chart as markup, and where its plot area lies in the SVG's pixels (y downwards)."""

    svg: Markup
    left: float
    right: float
    top: float
    bottom: float


class _Percent(ScalarFormatter):
    """Numbers with as many digits as tell the ticks apart, and a percent sign."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{super().__call__(x, pos)}\u00a0%"


def draw(chart: Chart, identity: str) -> Drawing:
    """The chart as SVG; equal charts give equal bytes.

    Args:
        identity: Of the chart within its page: ids inside the SVG are made from it.
    """
    style: list[Any] = ["default", _STYLE | {"svg.hashsalt": identity}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a script that the measuring font lacks is shown in the reader's
        figure = Figure((chart.width / 72, chart.height / 72), dpi=72)
        axes = figure.add_subplot()
        painter = _Painter(chart, axes)
        painter.axes_and_grid()
        for part in chart.parts:
            painter.paint(part)
        figure.tight_layout(pad=0.3)
        painter.labels()
        file = BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        box = axes.get_position()
    svg = _inline(file.getvalue(), chart, painter.titles)
    top, bottom = (chart.height * (1 - edge) for edge in (box.y1, box.y0))
    return Drawing(svg, chart.width * box.x0, chart.width * box.x1, top, bottom)


class _Painter:
    """Paints the parts of one chart; `titles` are the texts and classes of the groups that it names."""

    def __init__(self, chart: Chart, axes: Axes):
        self.chart, self.axes = chart, axes
        self.titles: dict[str, tuple[str, str]] = {}
        self.factor = 100 if chart.y.percent else 1
        self.marks: list[Mark] = []

    def axes_and_grid(self) -> None:
        axes, chart = self.axes, self.chart
        axes.patch.set_visible(False)
        axes.figure.patch.set_visible(False)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(bottom=False, left=False, pad=5)
        axes.set_xlim(*chart.x.limits)
        axes.set_ylim(*(self.factor * limit for limit in chart.y.limits))
        axes.set_xlabel(_plain(chart.x.label))
        axes.set_ylabel(_plain(chart.y.label), rotation_mode="anchor")
        _scale(axes.xaxis, chart.x, round(chart.width / 75))
        if chart.y.rows:
            axes.invert_yaxis()
            axes.set_yticks(range(len(chart.y.rows)), [_plain(name) for name, _ in chart.y.rows])
            for label, (_, kind) in zip(axes.get_yticklabels(), chart.y.rows, strict=True):
                label.set(color=_STAND_INS["muted" if kind == "frontier" else "text"])
                label.set_fontstyle("italic" if kind == "frontier" else "normal")
        else:
            _scale(axes.yaxis, chart.y, 4)
            axes.grid(axis="y")
        axes.set_axisbelow(True)

    def _named(self, artist: Any, kind: str, title: str) -> None:
        """Makes the artist a group of class `kind` with a tooltip."""
        identity = f"part{len(self.titles)}"
        self.titles[identity] = kind, title
        artist.set_gid(identity)
        artist.set_clip_on(False)

    def paint(self, part: Line | Dots | Steps | Mark | Bars | Rule | Band) -> None:
        axes, factor = self.axes, self.factor
        match part:
            case Line(name, x, y, colour, bold):
                # A single point has no line: its dot shows.
                width, marker = (2.6 if bold else 1.5), ("o" if len(x) == 1 else None)
                style: dict[str, Any] = {"color": _STAND_INS[colour], "lw": width, "marker": marker, "ms": width}
                self._named(axes.plot(x, factor * np.array(y), **style)[0], "line", name)
            case Dots(name, x, y, colour):
                style = {"color": _STAND_INS[colour], "ms": 4, "mew": 0, "alpha": 0.5}
                self._named(axes.plot(x, factor * np.array(y), "o", **style)[0], "dots", name)
            case Steps(name, edges, heights, colour, outlined):
                style = {"ec": _STAND_INS[colour], "lw": 1.6} if outlined else {"lw": 0}
                style["fc"] = to_rgba(_STAND_INS[colour], 0.16 if outlined else 0.35)
                self._named(axes.stairs(factor * np.array(heights), edges, fill=True, **style), "steps", name)
            case Bars(x, counts, colour):
                (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
                tall, wide = 0.125 * (y1 - y0) / max(counts) * np.array(counts), 8 / self.chart.width * (x1 - x0)
                for bar in axes.bar(x, tall, wide, color=_STAND_INS[colour], alpha=0.35):
                    self._named(bar, "count", "")
            case Band(low, high):
                self._named(axes.axvspan(low, high, color=_STAND_INS["all"], alpha=0.16, lw=0), "band", "")
            case Rule():
                self._rule(part)
            case Mark():
                self._mark(part)

    def _mark(self, mark: Mark) -> None:
        axes, colour, y = self.axes, _STAND_INS[mark.colour], self.factor * mark.y
        if mark.interval:
            whisker = axes.plot(mark.interval, (y, y), color=colour, lw=1.6, solid_capstyle="butt")[0]
            self._named(whisker, "whisker", mark.text)
        rim = _STAND_INS["surface"]
        dot = axes.plot(mark.x, y, "o", color=colour, ms=2 * mark.radius, mec=rim, mew=1.5)[0]
        self._named(dot, "mark", mark.text)
        self.marks.append(mark)

    def _rule(self, rule: Rule) -> None:
        axes, at = self.axes, self.factor * rule.at if rule.axis == "y" else rule.at
        strokes: dict[str, Any] = {"color": _STAND_INS[rule.colour], "lw": 1, "ls": (0, (3, 3))}
        if rule.axis == "diagonal":
            self._named(axes.axline((0, 0), (1, self.factor), **strokes), "rule", "")
            return
        across = rule.axis == "y"
        self._named((axes.axhline if across else axes.axvline)(at, **strokes), "rule", "")
        if rule.label:
            x, y, offset, side = (1.0, at, (0, 4), "right") if across else (at, 1.0, (4, -8), "left")
            frame = axes.get_yaxis_transform() if across else axes.get_xaxis_transform()
            note = axes.annotate(_plain(rule.label), (x, y), offset, frame, "offset points", ha=side)
            note.set_in_layout(False)

    def labels(self) -> None:
        """Names beside marks, where they cover neither marks nor each other and are nearest to their own.

        Where marks crowd, a name stands further off, at the end of a line; what finds no place is left to tooltips.
        """
        axes = self.axes
        frame = axes.get_window_extent()
        places = axes.transData.transform([(mark.x, self.factor * mark.y) for mark in self.marks] or [(0, 0)])
        taken = [Bbox([place - 5, place + 5]) for place in places]
        for number, mark in enumerate(self.marks):
            for dx, dy in (*_BESIDE, *_FURTHER) if mark.label else ():
                joined = (dx, dy) in _FURTHER
                text = axes.annotate(
                    _plain(mark.label), (mark.x, self.factor * mark.y), (dx, dy), textcoords="offset points",
                    ha="center" if dx == 0 else "left" if dx > 0 else "right", color=_STAND_INS["text"],
                    arrowprops=_JOIN if joined else None,
                )  # fmt: skip
                text.get_window_extent()  # puts it into its place
                box = Text.get_window_extent(text)  # without the line
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 + 8 or box.y0 < frame.y0 or box.y1 > frame.y1 + 8
                covers = any(box.overlaps(other) for other in taken)
                clear = _is_clear(box, places, number) if joined else _nearest(box, places) == number
                if not outside and not covers and clear:
                    taken.append(box)
                    break
                text.remove()


# Where a name stands, in points from its mark.
_BESIDE = ((8, -4), (-8, -4), (8, 7), (8, -14), (-8, 7), (-8, -14), (0, 9), (0, -17))
_FURTHER = tuple((dx, dy) for far in (24, 40, 60) for dy in (far, -far, far / 2, -far / 2) for dx in (-far, far))
_JOIN = {"arrowstyle": "-", "color": _STAND_INS["muted"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}


def _is_clear(box: Bbox, places: np.ndarray, number: int) -> bool:
    """Whether a line from a name at `box` to its mark passes by the other marks."""
    start = places[number]
    along = np.clip(start, (box.x0, box.y0), (box.x1, box.y1)) - start
    others = np.delete(places, number, axis=0) - start
    share = np.clip(others @ along / max(along @ along, 1e-9), 0.0, 1.0)
    return bool(np.all(np.hypot(*(others - share[:, None] * along).T) > 5))


def _nearest(box: Bbox, places: np.ndarray) -> int:
    """The mark that a name at `box` seems to belong to."""
    inside = np.clip(places, (box.x0, box.y0), (box.x1, box.y1))
    return int(np.argmin(np.hypot(*(places - inside).T)))


def _scale(drawn: DrawnAxis, axis: Axis, ticks: int) -> None:
    """About so many round numbers, with as many digits as tell them apart."""
    drawn.set_major_locator(MaxNLocator(ticks, integer=axis.whole, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    if axis.whole:
        drawn.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        return
    formatter = _Percent(useOffset=False) if axis.percent else ScalarFormatter(useOffset=False)
    formatter.set_scientific(not axis.percent)
    formatter.set_powerlimits((-3, 6))
    drawn.set_major_formatter(formatter)


def _plain(text: str) -> str:
    """One line without characters that XML cannot hold."""
    return _UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


def _inline(data: bytes, chart: Chart, titles: dict[str, tuple[str, str]]) -> Markup:
    """matplotlib's SVG as an element of the page."""
    root = ElementTree.fromstring(data)
    for element in list(root):
        if not element.tag.endswith("}g"):
            root.remove(element)  # metadata, and a style sheet that would hold for the whole page
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        element.attrib = dict(_attributes(element))
        kind, title = titles.get(element.get("id", ""), ("", ""))
        if element.tag == "g":
            element.attrib.pop("id", None)
            if kind:
                element.set("class", kind)
            if title:
                tooltip = ElementTree.Element("title")
                tooltip.text = _plain(title)
                element.insert(0, tooltip)
        if element.tag not in ("text", "title"):
            element.text = None
    for group in root.iter("g"):
        for dot in group.iter("use") if group.get("class") == "dots" else ():
            group.set("style", dot.attrib.pop("style"))  # once for all
    root.attrib = {"viewBox": f"0 0 {chart.width} {chart.height}", "role": "img", "aria-label": _plain(chart.title)}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True))


def _attributes(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """The attributes that the page needs, in short."""
    for name, value in element.attrib.items():
        local = name.rpartition("}")[2]
        if local == "style":
            if style := _styled(value):
                yield "style", style
        elif local == "transform" and value.startswith("rotate(-0 "):
            continue
        elif local in ("d", "x", "y", "transform"):
            shown = _DECIMALS.sub(lambda number: f"{float(number.group()):.2f}".rstrip("0").rstrip("."), value)
            yield local, " ".join(shown.split())
        elif local in ("id", "href"):
            yield local, value


def _styled(style: str) -> str:
    """Declarations in the page's colours; of a text's font only whether it leans."""
    kept = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font" or name.startswith("font-"):
            kept += ["font-style: italic"] if "italic" in value.split() else []
        elif name and _BASE_STYLE_PROPERTIES.get(name) != value:
            kept.append(f"{name}: {_STAND_IN.sub(_variable, value)}")
    return "; ".join(kept)


def _variable(stand_in: re.Match[str]) -> str:
    return f"var(--{COLOURS[int(stand_in.group(1), 16)]})"
