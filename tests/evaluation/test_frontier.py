"""Recall-matched CHAIR."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.evaluation.frontier import matched

BASE = [(0.7, 0.30), (0.8, 0.40), (0.6, 0.28)]  # (recall, chair_i) at three stop biases


def delta(recall, rate, points):
    """(ΔC, whether it is a bound) of one system."""
    gains, costs = np.array(points, float).T
    found = matched(np.array([recall]), np.array([rate]), gains[None], costs[None])
    return float(found.delta[0]), bool(found.beyond[0])


def curve(points):
    """The frontier by its definition: at each recall the lowest rate of any point with at least that recall."""
    return sorted({(recall, min(rate for other, rate in points if other >= recall)) for recall, _ in points})


def test_interpolates_between_points():
    assert delta(0.75, 0.31, BASE) == (pytest.approx(-0.04), False)


def test_nothing_is_known_below_the_frontier_and_a_bound_above():
    assert np.isnan(delta(0.5, 0.3, BASE)[0])
    assert delta(0.81, 0.3, BASE) == (pytest.approx(0.3 - 0.4), True)


def test_undefined_values():
    assert np.isnan(delta(np.nan, 0.3, BASE)[0]) and np.isnan(delta(0.7, np.nan, BASE)[0])
    assert np.isnan(delta(0.5, 0.3, [(0.5, np.nan), (np.nan, 0.2)])[0])
    assert delta(0.75, 0.31, [*BASE, (np.nan, 0.1), (0.9, np.nan)]) == (pytest.approx(-0.04), False)


def test_dominated_points_are_lifted():
    points = [*BASE, (0.65, 0.5), (0.7, 0.33)]
    assert curve(points) == [(0.6, 0.28), (0.65, 0.30), (0.7, 0.30), (0.8, 0.40)]
    assert delta(0.65, 0.3, points)[0] == pytest.approx(0)
    assert delta(0.625, 0.29, points)[0] == pytest.approx(0)


rates = st.floats(0, 1)
point_lists = st.lists(st.tuples(rates, rates), min_size=1, max_size=8)


@given(point_lists)
def test_no_base_point_beats_the_frontier(points):
    for recall, rate in points:
        assert delta(recall, rate, points)[0] >= -1e-12


@settings(max_examples=200, deadline=None)
@given(point_lists, rates, rates)
def test_it_is_linear_between_the_points_of_its_definition(points, recall, rate):
    recalls, costs = zip(*curve(points), strict=True)
    found, beyond = delta(recall, rate, points)
    assert beyond == (recall > recalls[-1])
    if recall < recalls[0]:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(rate - np.interp(recall, recalls, costs), abs=1e-6)
