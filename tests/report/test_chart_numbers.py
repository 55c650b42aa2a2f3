"""Charts show the right numbers: as a `Chart` states them, and as read from a drawing by its axes' labels alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from m3po_jax.report import charts
from m3po_jax.report.charts import Axis, Band, Bars, Chart, Dots, Line, Mark, Rule, Steps
from m3po_jax.report.drawing import COLOURS, draw
from m3po_jax.report.figures import CURVES, Figure, training_curves

NUMBER = re.compile(r"[−-]?[\d,]*\.?\d+")


class Picture:
    """A drawing, and what its coordinates mean by the labels that a reader sees."""

    def __init__(self, chart: Chart):
        self.drawing, self.chart = draw(chart, "here"), chart
        self.root = ElementTree.fromstring(str(self.drawing.svg))
        texts = [
            (text.text or "", float(text.get("x", "nan")), float(text.get("y", "nan")), text.get("style", ""))
            for text in self.root.iter("text")
        ]
        below = [item for item in texts if item[2] > self.drawing.bottom and item[1] > self.drawing.left - 1]
        first = min((y for _, _, y, _ in below), default=0.0)  # the line of tick labels, above the axis' own
        self.x_labels = [(t, x) for t, x, y, style in below if y < first + 5 and "middle" in style]
        self.y_labels = [(t, y) for t, x, y, _ in texts if x < self.drawing.left and y <= self.drawing.bottom + 8]
        # Of very large and very small numbers the power of ten stands once, at the axis' end.
        self.powers = {"x": 1.0, "y": 1.0}
        for text, _, y, _ in texts:
            if re.fullmatch(r"1e[−-]?\d+", text):
                self.powers["x" if y > self.drawing.bottom else "y"] = number(text)
        self.y_labels = [(t, y) for t, y in self.y_labels if NUMBER.fullmatch(t.removesuffix("\u00a0%"))]
        self.x_labels = [(t, x) for t, x in self.x_labels if NUMBER.fullmatch(t)]
        self.texts = [text for text, *_ in texts]

    def scale(self, axis: str):
        """The map from a coordinate to the value that the axis' labels give it; None with less than two."""
        shown = self.x_labels if axis == "x" else self.y_labels
        shift = 0.0 if axis == "x" else -4.18  # the baseline of a label below its tick
        ticks = sorted((number(text) * self.powers[axis], at + shift) for text, at in shown)
        if len(ticks) < 2:
            return None
        (low, a), *_, (high, b) = ticks
        for value, at in ticks:  # evenly spaced values stand evenly spaced
            assert low + (at - a) * (high - low) / (b - a) == pytest.approx(value, abs=abs(high - low) * 0.01)
        return lambda at: low + (at - a) * (high - low) / (b - a)

    def groups(self, kind: str) -> list[ElementTree.Element]:
        return [group for group in self.root.iter("g") if group.get("class") == kind]

    def points(self, group: ElementTree.Element) -> np.ndarray:
        """Where a group's line runs, or its symbols stand: values [n, 2]."""
        symbols = [(use.get("x"), use.get("y")) for use in group.iter("use")]
        if not symbols:
            path = next(group.iter("path")).get("d", "")
            symbols = re.findall(r"[ML] (\S+) (\S+)", path)
        x_of, y_of = self.scale("x") or (lambda at: math.nan), self.scale("y") or (lambda at: math.nan)
        return np.array([(x_of(float(x)), y_of(float(y))) for x, y in symbols])


def number(label: str) -> float:
    value = float(label.replace("−", "-").replace(",", "").removesuffix("\u00a0%"))
    return value / 100 if label.endswith("%") else value


ranges = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))


@settings(max_examples=40, deadline=None)
@example((0.99991, 2e-5), True)
@example((10_000.1, 0.8), False)
@example((-1e-9, 2e-9), False)
@example((2e-5, 1e-6), False)
@given(ranges, st.booleans())
def test_a_line_is_where_its_axes_say(limits, percent):
    low, span = limits
    assume(span > 1e-7 * abs(low))  # below that a line is flat
    y = low + span * np.array([0.0, 0.7, 0.2, 1.0])
    chart = charts.line_chart("", [charts.Line("a", [0, 10, 20, 40], y.tolist(), "s0")], x_label="", percent=percent)
    assert chart is not None
    (line,) = chart.lines
    assert (line.x, line.y, line.colour) == ((0, 10, 20, 40), tuple(y.tolist()), "s0")
    assert chart.y.limits[0] < y.min() < y.max() < chart.y.limits[1] and chart.y.percent == percent
    picture = Picture(chart)
    for labels in (picture.x_labels, picture.y_labels):
        shown = [text for text, _ in labels]
        assert len(set(shown)) == len(shown) >= 2, shown
    points = picture.points(picture.groups("line")[0])
    assert points[:, 0] == pytest.approx([0, 10, 20, 40], abs=0.2)
    assert points[:, 1] == pytest.approx(y.tolist(), abs=0.01 * span)
    read = Figure("f", "", chart, readable=True).crosshair()
    assert read["series"][0]["y"] == pytest.approx(y.tolist(), abs=0.01 * span), "the crosshair's numbers"


def test_the_crosshair_stands_where_the_lines_do():
    chart = charts.line_chart("", [charts.Line("a", [3, 7, 23], [1.0, 2.0, 1.5], "s0")], x_label="step")
    read = Figure("f", "", chart, readable=True).crosshair()
    d = next(Picture(chart).groups("line")[0].iter("path")).get("d")
    drawn = [float(x) for x, _ in re.findall(r"[ML] (\S+) (\S+)", d)]
    share = [(x - read["x0"]) / (read["x1"] - read["x0"]) for x in (3, 7, 23)]
    assert drawn == pytest.approx([read["left"] + s * (read["right"] - read["left"]) for s in share], abs=0.02)
    assert 0 < read["top"] < read["bottom"] < chart.height and read["width"] == chart.width


@pytest.mark.parametrize("last", [1, 2, 3, 4, 7, 25, 60, 1000, 12_345, 2_000_000])
def test_steps_are_whole(last):
    steps = np.unique(np.linspace(1, last, min(last, 500)).round())
    chart = charts.line_chart("", [charts.Line("a", steps, [0.5] * len(steps), "s0")], x_label="")
    assert chart.x.whole
    shown = [text for text, _ in Picture(chart).x_labels]
    assert len(set(shown)) == len(shown) >= 1
    assert all(number(label).is_integer() for label in shown), shown


def test_rounds_and_single_steps_are_whole():
    for x in ([0, 1], [0, 1, 2], [3], [1]):
        chart = charts.line_chart("", [charts.Line("a", x, [0.1 * v for v in x], "s0")], x_label="round")
        assert {number(label) for label, _ in Picture(chart).x_labels} == set(map(float, x))


def test_a_curve_s_steps_run_on_over_rounds():
    def training(number, losses):
        rows = [{"step": n + 1, "loss": loss} for n, loss in enumerate(losses)]
        return SimpleNamespace(number=number, metrics=rows)

    rounds = [training(1, [0.7, 0.6, 0.5]), training(2, [0.65, 0.4])]
    arms = {"mas_dpo": [training(1, [0.7, 0.69])]}
    run = SimpleNamespace(rounds=rounds, arms=arms, setting=lambda key, default=None: default)
    (figure,) = training_curves(run, [curve for curve in CURVES if curve.key == "loss"])
    arm, main = figure.chart.lines
    assert (main.x, main.y, main.bold) == ((1, 2, 3, 4, 5), (0.7, 0.6, 0.5, 0.65, 0.4), True)
    assert (arm.name, arm.x, arm.y, arm.bold) == ("mas_dpo", (1, 2), (0.7, 0.69), False)
    (start,) = [part for part in figure.chart.parts if isinstance(part, Rule)]
    assert (start.axis, start.at, start.label) == ("x", 3, "round 2"), "it starts where the first one ended"
    assert (figure.chart.x.label, figure.legend) == ("optimizer step", [(main.colour, main.name), ("s1", "mas_dpo")])
    picture = Picture(figure.chart)
    assert [text for text, _ in picture.x_labels] == ["1", "2", "3", "4", "5"]
    assert picture.points(picture.groups("line")[1]) == pytest.approx(np.array([main.x, main.y]).T, abs=0.02)
    assert picture.points(picture.groups("rule")[0])[:, 0] == pytest.approx([3, 3], abs=0.02)
    assert "round 2" in picture.texts


def test_a_forest_s_marks_and_whiskers():
    points = [
        charts.Point("a", 0.0, 51.5, "arm", (51.2, 51.9)),
        charts.Point("b" * 30, 0.0, 51.45, "frontier", (51.3, 51.6)),
        charts.Point("base", 0.0, 51.4, "base"),
    ]
    chart = charts.forest_chart("", points, band=(51.4, 51.7), digits=1, x_label="F1", reference=51.25)
    marks = [part for part in chart.parts if isinstance(part, Mark)]
    assert [(m.x, m.y, m.interval) for m in marks] == [
        (51.5, 0, (51.2, 51.9)), (51.45, 1, (51.3, 51.6)), (51.4, 2, None),
    ]  # fmt: skip
    assert [m.colour for m in marks] == ["s0", "all", "text"] and marks[0].text == "a: 51.5"
    assert [part for part in chart.parts if isinstance(part, Band | Rule)] == [Band(51.4, 51.7), Rule("x", 51.25)]
    picture = Picture(chart)
    shown = [text for text, _ in picture.x_labels]
    assert len(set(shown)) == len(shown)
    x_of = picture.scale("x")
    dots = [x_of(float(use.get("x"))) for group in picture.groups("mark") for use in group.iter("use")]
    assert dots == pytest.approx([51.5, 51.45, 51.4], abs=0.005)
    ends = [picture.points(group)[:, 0].tolist() for group in picture.groups("whisker")]
    assert np.array(ends) == pytest.approx(np.array([[51.2, 51.9], [51.3, 51.6]]), abs=0.005)
    (band,), (rule,) = picture.groups("band"), picture.groups("rule")
    edges = picture.points(band)[:, 0]
    assert [edges.min(), edges.max()] == pytest.approx([51.4, 51.7], abs=0.005)
    assert picture.points(rule)[:, 0] == pytest.approx([51.25] * 2, abs=0.005)
    heights = [float(use.get("y")) for group in picture.groups("mark") for use in group.iter("use")]
    assert heights == sorted(heights), "from the top, in the order of the names"
    assert [text for text in picture.texts if text[0] in "ab"] == ["a", "b" * 17 + "…", "base"]


def test_a_frontier_s_points_and_line():
    points = [
        charts.Point("base", 74.8, 23.9, "base"),
        charts.Point("-8", 79.8, 27.3, "frontier"),
        charts.Point("m3po", 86.8, 8.9),
    ]
    chart = charts.frontier_chart("", points, x_label="Recall", y_label="CHAIR_i")
    (line,) = chart.lines
    assert (line.x, line.y) == ((74.8, 79.8), (23.9, 27.3))
    marks = [part for part in chart.parts if isinstance(part, Mark)]
    assert [(m.x, m.y, m.label) for m in marks] == [(74.8, 23.9, "base"), (79.8, 27.3, ""), (86.8, 8.9, "m3po")]
    assert (chart.x.label, chart.y.label) == ("Recall", "CHAIR_i")
    picture = Picture(chart)
    dots = np.concatenate([picture.points(group) for group in picture.groups("mark")])
    assert dots == pytest.approx(np.array([(p.x, p.y) for p in points]), abs=0.1)
    assert picture.points(picture.groups("line")[0]) == pytest.approx(np.array([line.x, line.y]).T, abs=0.1)
    assert {"base", "m3po"} <= set(picture.texts) and "-8" not in picture.texts


def test_names_beside_marks_do_not_cover_each_other():
    points = [charts.Point(f"system {n}", 1 + 1e-3 * n, 1.0) for n in range(12)] + [charts.Point("far", 9.0, 9.0)]
    picture = Picture(charts.frontier_chart("", points, x_label="", y_label=""))
    names = [text for text in picture.texts if text.startswith("system")]
    assert 1 <= len(names) < 12 and "far" in picture.texts
    titles = [title.text for title in picture.root.iter("title")]
    assert titles == [point.name for point in points], "the others can be read under the pointer"


def test_a_scatter_s_dots():
    x, y = np.array([0.1, 0.5, np.nan, 0.9]), np.array([-3.0, -1.0, 0.0, -2.0])
    chart = charts.scatter_chart("", [("all", x, y)], x_label="MAS", y_label="confidence")
    assert chart.parts == (Dots("all", (0.1, 0.5, 0.9), (-3.0, -1.0, -2.0), "all"),)
    picture = Picture(chart)
    drawn = picture.points(picture.groups("dots")[0])
    assert drawn[:, 0] == pytest.approx([0.1, 0.5, 0.9], abs=0.003)
    assert drawn[:, 1] == pytest.approx([-3, -1, -2], abs=0.02)
    many = charts.scatter_chart("", [("all", np.arange(5000.0), np.arange(5000.0))], x_label="", y_label="")
    assert len(many.parts[0].x) == charts.MAX_DOTS and many.parts[0].x == tuple(sorted(many.parts[0].x))


def test_a_histogram_s_bars():
    values = np.concatenate([np.full(30, 0.05), np.full(60, 0.55), np.full(10, 1.0), [0.0, np.nan]])
    chart = charts.histogram_chart("", [("all", values), ("chosen", values[:30])], x_label="", bins=10)
    everything, chosen = chart.parts
    counts, edges = np.histogram(values[:-1], 10)
    assert everything == Steps("all", tuple(edges), tuple(counts / 101), "all", outlined=False)
    assert sum(everything.heights) == pytest.approx(1.0) and chosen.heights == (1.0, *[0.0] * 9)
    assert chosen.outlined and chosen.edges == everything.edges and chart.y.percent
    picture = Picture(chart)
    outline = picture.points(picture.groups("steps")[0])
    assert sorted(set(np.round(outline[:, 0], 2))) == pytest.approx(edges.tolist(), abs=0.01)
    inner = [outline[np.abs(outline[:, 0] - edge) < 0.006][:, 1].max() for edge in edges[[0, 5, 10]]]
    assert inner == pytest.approx([30 / 101 + 1 / 101, 60 / 101, 10 / 101], abs=0.006)


def test_a_reliability_curve_s_points():
    curve = Line("mas", (0.1, 0.5, 0.9), (0.2, 0.4, 1.0), "s2")
    chart = charts.reliability_chart("", [(curve, [10, 20, 40])], x_label="", diagonal=True)
    bars, rule, line, *marks = chart.parts
    assert bars == Bars((0.1, 0.5, 0.9), (10, 20, 40)) and rule == Rule("diagonal")
    assert line == curve
    assert [(m.x, m.y, m.text) for m in marks][2] == (0.9, 1.0, "mas: 0.9, 100 % right of 40")
    assert [m.radius for m in marks] == pytest.approx([4, 2 + 4 * math.sqrt(0.5), 6])
    picture = Picture(chart)
    dots = np.concatenate([picture.points(group) for group in picture.groups("mark")])
    assert dots == pytest.approx(np.array([(0.1, 0.2), (0.5, 0.4), (0.9, 1.0)]), abs=0.005)
    tall = [np.ptp(picture.points(group)[:, 1]) for group in picture.groups("count")]
    assert tall == pytest.approx([0.125 / 4, 0.125 / 2, 0.125], abs=0.005)
    diagonal = picture.points(picture.groups("rule")[0])
    assert diagonal[:, 0] == pytest.approx(diagonal[:, 1], abs=0.01) and np.ptp(diagonal[:, 0]) > 0.9


HOSTILE = "</svg><script>$\\frac{1}{$ {{ x }} & \"q\" 'a' \x00\x1b\ud800\n猫 🐈 \u202e"


def hostile_chart() -> Chart:
    parts = (
        Line(HOSTILE, (0.0, 1.0), (0.0, 1.0), "s0"),
        Mark(0.5, 0.5, "s1", HOSTILE, label=HOSTILE[:18]),
        Rule("x", 0.5, HOSTILE),
        Rule("y", 0.5, HOSTILE),
    )
    return Chart(HOSTILE, Axis((0.0, 1.0), HOSTILE), Axis((-0.5, 0.5), HOSTILE, rows=((HOSTILE, "arm"),)), parts)


def test_texts_are_escaped_and_no_mathematics():
    svg = str(draw(hostile_chart(), "x").svg)
    assert "<script" not in svg and "</svg>" not in svg[:-6] and "\x00" not in svg and "\x1b" not in svg
    shown = (
        re.sub(r"\s+", " ", HOSTILE).replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    )
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.tag in ("text", "title")]
    assert texts.count(shown) >= 6 and root.get("aria-label") == shown, texts
    assert all(font not in svg for font in ("DejaVu", "font-family"))


def test_a_drawing_is_part_of_the_page():
    chart = hostile_chart()
    first, second = str(draw(chart, "a").svg), str(draw(replace(chart), "b").svg)
    assert str(draw(chart, "a").svg) == first, "the same bytes"
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1], "no id twice in a page"
    assert set(re.findall(r'href="#([^"]*)"', first)) == ids[0]
    for markup in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "xmlns", "xlink", "http", "matplotlib"):
        assert markup not in first
    assert first.startswith('<svg viewBox="0 0 480 240" role="img" aria-label="')
    assert set(re.findall(r"var\(--([^)]*)\)", first)) <= set(COLOURS)
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'id="[^"]*"|href="[^"]*"|url\([^)]*\)', "", first))


def test_a_reader_s_own_matplotlib_settings_change_nothing():
    chart = hostile_chart()
    svg = str(draw(chart, "a").svg)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert str(draw(chart, "a").svg) == svg
    assert matplotlib.rcParams["font.size"] != 11, "nor do ours change anybody's"


def test_systems_that_crowd_are_all_named() -> None:
    """As in the quickstart: two systems side by side in a corner, below a third."""
    points = [
        ("base", 74.8, 23.9),
        ("vcd", 79.9, 19.4),
        ("sft", 86.1, 11.1),
        ("mas_dpo", 87.4, 8.8),
        ("m3po", 86.8, 8.9),
    ]
    systems = [charts.Point(name, x, y, "base" if name == "base" else "arm") for name, x, y in points]
    chart = charts.frontier_chart("t", systems, x_label="Recall", y_label="CHAIR_i")
    assert chart is not None
    drawn = str(draw(chart, "crowd").svg)
    assert [name for name, _, _ in points if f">{name}<" not in drawn] == []
