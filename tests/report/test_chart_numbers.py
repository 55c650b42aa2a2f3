"""Charts show the right numbers: what is drawn is read back through the labels of the axes alone."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from m3po_jax.report import svg
from m3po_jax.report.figures import CURVES, training_curves

TICK = re.compile(r'<text class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(end|middle)">([^<]*)</text>')


def number(label: str) -> float:
    value = float(label.replace("−", "-").replace(",", "").removesuffix(" %"))
    return value / 100 if label.endswith(" %") else value


def labels(chart: str, axis: str) -> list[str]:
    anchor = "middle" if axis == "x" else "end"
    return [label for _, _, which, label in TICK.findall(chart) if which == anchor and re.match(r"[−\d]", label)]


def scale(chart: str, axis: str):
    """The map from a coordinate to the value that the axis' labels give it; None with less than two labels."""
    anchor = "middle" if axis == "x" else "end"
    ticks = [
        (float(x if axis == "x" else y) - (0 if axis == "x" else 3.5), number(label))
        for x, y, which, label in TICK.findall(chart)
        if which == anchor and re.match(r"[−\d]", label)
    ]
    if len(ticks) < 2:
        return None
    (a, low), *_, (b, high) = ticks
    for at, value in ticks:  # evenly spaced values stand evenly spaced
        assert low + (at - a) * (high - low) / (b - a) == pytest.approx(value, abs=abs(high - low) * 0.01)
    return lambda at: low + (at - a) * (high - low) / (b - a)


def path(chart: str, css: str) -> np.ndarray:
    found = re.search(rf'<path class="{css}" d="M([^"]*?)(?:h0)?Z?"', chart)
    assert found is not None
    return np.array([[float(x) for x in point.split()] for point in found.group(1).split("L")])


ranges = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))


@settings(max_examples=200, deadline=None)
@example((0.99991, 2e-5), True)
@example((10_000.1, 0.8), False)
@example((-1e-9, 2e-9), False)
@given(ranges, st.booleans())
def test_a_line_is_where_its_axes_say(limits, percent):
    low, span = limits
    assume(span > 1e-7 * abs(low))  # below that a line is flat
    y = low + span * np.array([0.0, 0.7, 0.2, 1.0])
    drawn = svg.line_chart("", [svg.Series("a", [0, 10, 20, 40], y.tolist())], x_label="", percent=percent)
    assert drawn is not None
    chart, data = drawn
    for axis in "xy":
        shown = labels(chart, axis)
        assert len(set(shown)) == len(shown) >= 2, shown
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    points = path(chart, "line s0")
    assert [x_of(x) for x in points[:, 0]] == pytest.approx([0, 10, 20, 40], abs=0.2)
    assert [y_of(v) for v in points[:, 1]] == pytest.approx(y.tolist(), abs=0.01 * span)
    assert data["series"][0]["y"] == pytest.approx(y.tolist(), abs=0.01 * span), "the crosshair's numbers"
    left = min(float(x) - svg.CHARACTER * len(label) for x, _, which, label in TICK.findall(chart) if which == "end")
    assert left > 0, "labels stay inside"


@pytest.mark.parametrize("last", [1, 2, 3, 4, 7, 25, 60, 1000, 12_345, 2_000_000])
def test_steps_are_whole(last):
    chart, _ = svg.line_chart(
        "", [svg.Series("a", list(range(1, last + 1))[:5000], [0.5] * min(last, 5000))], x_label=""
    )
    shown = labels(chart, "x")
    assert len(set(shown)) == len(shown) >= 1
    assert all(number(label).is_integer() for label in shown), shown


def test_rounds_and_single_steps_are_whole():
    for x in ([0, 1], [0, 1, 2], [3], [1]):
        chart, _ = svg.line_chart("", [svg.Series("a", x, [0.1 * v for v in x])], x_label="round")
        assert {number(label) for label in labels(chart, "x")} == set(map(float, x))


@given(st.floats(-1e6, 1e6), st.floats(0.01, 1e6))
def test_whole_ticks_are_whole_and_even(low, span):
    marks = svg.ticks(low, low + span, 6, whole=True)
    assert all(mark.is_integer() for mark in marks) or marks == [low]
    if len(marks) > 2:
        assert len(set(np.diff(marks))) == 1


def test_a_curve_s_steps_run_on_over_rounds(tmp_path):
    from types import SimpleNamespace as Of

    def made(number, losses):
        return Of(number=number, metrics=[{"step": n + 1, "loss": loss} for n, loss in enumerate(losses)])

    rounds = [made(1, [0.7, 0.6, 0.5]), made(2, [0.65, 0.4])]
    run = Of(rounds=rounds, arms={"mas_dpo": [made(1, [0.7, 0.69])]}, setting=lambda key, default=None: default)
    (figure,) = training_curves(run, [curve for curve in CURVES if curve.key == "loss"])
    chart = str(figure.svg)
    assert labels(chart, "x") == ["1", "2", "3", "4", "5"]
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    points = path(chart, "line s0 bold")
    assert [x_of(x) for x in points[:, 0]] == pytest.approx([1, 2, 3, 4, 5], abs=0.02)
    assert [y_of(y) for y in points[:, 1]] == pytest.approx([0.7, 0.6, 0.5, 0.65, 0.4], abs=0.003)
    broken = float(re.search(r'<path class="break" d="M([\d.]+)', chart).group(1))
    assert x_of(broken) == pytest.approx(3, abs=0.02), "the second round starts where the first one ended"


def test_a_forest_s_marks_and_whiskers():
    points = [svg.Point("a", 0.0, 51.5, "arm", (51.2, 51.9)), svg.Point("b", 0.0, 51.45, "arm", (51.3, 51.6))]
    chart = svg.forest_chart("", points, band=(51.4, 51.7), digits=1, x_label="", reference=51.25)
    x_of = scale(chart, "x")
    shown = labels(chart, "x")
    assert len(set(shown)) == len(shown)
    circles = [x_of(float(x)) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert circles == pytest.approx([51.5, 51.45], abs=0.005)
    whiskers = re.findall(r'class="whisker" d="M([\d.]+) [\d.]+H([\d.]+)"', chart)
    spans = [[x_of(float(end)) for end in ends] for ends in whiskers]
    assert np.array(spans) == pytest.approx(np.array([[51.2, 51.9], [51.3, 51.6]]), abs=0.005)
    x, width = map(float, re.search(r'<rect class="band" x="([\d.]+)" y="12" width="([\d.]+)"', chart).groups())
    assert [x_of(x), x_of(x + width)] == pytest.approx([51.4, 51.7], abs=0.005)
    assert x_of(float(re.search(r'class="reference" d="M([\d.]+)', chart).group(1))) == pytest.approx(
        51.25, abs=0.005
    )


def test_a_frontier_s_points_and_line():
    points = [
        svg.Point("base", 74.8, 23.9, "base"),
        svg.Point("-8", 79.8, 27.3, "frontier"),
        svg.Point("m3po", 86.8, 8.9),
    ]
    chart = svg.frontier_chart("", points, x_label="", y_label="")
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    circles = [(x_of(float(x)), y_of(float(y))) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert np.array(circles) == pytest.approx(np.array([(p.x, p.y) for p in points]), abs=0.1)
    line = [(x_of(x), y_of(y)) for x, y in path(chart, "frontier")]
    assert np.array(line) == pytest.approx(np.array([(74.8, 23.9), (79.8, 27.3)]), abs=0.1)


def test_a_scatter_s_dots():
    x, y = np.array([0.1, 0.5, 0.9]), np.array([-3.0, -1.0, -2.0])
    chart = svg.scatter_chart("", [("all", x, y)], x_label="", y_label="")
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    dots = re.findall(r"M([\d.]+) ([\d.]+)h0", re.search(r'class="dots all" d="([^"]*)"', chart).group(1))
    assert [x_of(float(a)) for a, _ in dots] == pytest.approx(x.tolist(), abs=0.003)
    assert [y_of(float(b)) for _, b in dots] == pytest.approx(y.tolist(), abs=0.02)


def test_a_histogram_s_bars():
    values = np.concatenate([np.full(30, 0.05), np.full(60, 0.55), np.full(10, 1.0), [0.0]])
    chart = svg.histogram_chart("", [("all", values)], x_label="", bins=10)
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    outline = path(chart, "hist all")
    counts, edges = np.histogram(values, 10)
    assert [x_of(x) for x in outline[1::2, 0]] == pytest.approx(edges.tolist(), abs=0.005)
    heights = [y_of(y) for y in outline[1:-1:2, 1]]
    assert heights == pytest.approx((counts / len(values)).tolist(), abs=0.005)


def test_a_reliability_curve_s_points():
    curve = svg.BinCurve("mas", [0.1, 0.5, 0.9], [0.2, 0.4, 1.0], [10, 20, 40])
    chart = svg.reliability_chart("", [curve], x_label="", diagonal=True)
    x_of, y_of = scale(chart, "x"), scale(chart, "y")
    circles = [(x_of(float(x)), y_of(float(y))) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert np.array(circles) == pytest.approx(np.array([(0.1, 0.2), (0.5, 0.4), (0.9, 1.0)]), abs=0.005)
    bars = [float(height) for height in re.findall(r'class="count"[^>]*height="([\d.]+)"', chart)]
    assert np.array(bars) / max(bars) == pytest.approx(np.array([0.25, 0.5, 1.0]), abs=0.01)
    assert not math.isnan(bars[0])
