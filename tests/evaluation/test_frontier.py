"""Recall-matched CHAIR."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.evaluation.frontier import frontier, matched

BASE = [
    {"recall": 0.7, "chair_i": 0.30},
    {"recall": 0.8, "chair_i": 0.40},
    {"recall": 0.6, "chair_i": 0.28},
]


def test_interpolates_between_points():
    result = matched({"recall": 0.75, "chair_i": 0.31}, BASE)
    assert result["frontier_chair_i"] == pytest.approx(0.35)
    assert result["delta_chair_i"] == pytest.approx(-0.04)
    assert result["reason"] is None


@pytest.mark.parametrize("recall", [0.5, 0.81])
def test_nothing_is_extrapolated(recall):
    result = matched({"recall": recall, "chair_i": 0.3}, BASE)
    assert result["delta_chair_i"] is None and "outside" in result["reason"]


def test_undefined_values():
    assert matched({"recall": None, "chair_i": 0.3}, BASE)["delta_chair_i"] is None
    assert "no points" in matched({"recall": 0.5, "chair_i": 0.3}, [{"recall": 0.5, "chair_i": None}])["reason"]


def test_dominated_points_are_lifted():
    points = [*BASE, {"recall": 0.65, "chair_i": 0.5}, {"recall": 0.7, "chair_i": 0.33}]
    assert frontier(points) == [(0.6, 0.28), (0.65, 0.30), (0.7, 0.30), (0.8, 0.40)]


rates = st.floats(0, 1)
point_lists = st.lists(st.fixed_dictionaries({"recall": rates, "chair_i": rates}), min_size=1, max_size=8)


@given(point_lists)
def test_frontier_rises_and_no_base_point_beats_it(points):
    curve = frontier(points)
    assert curve == sorted(curve) and [rate for _, rate in curve] == sorted(rate for _, rate in curve)
    for point in points:
        assert matched(point, points)["delta_chair_i"] >= -1e-12
