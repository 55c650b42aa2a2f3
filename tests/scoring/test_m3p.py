import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.scoring.m3p import m3p_scores, z_scores

values = st.lists(st.floats(-50, 50).map(lambda v: round(v, 3)), min_size=2, max_size=10)


def test_by_hand():
    # m: mean .5, std .4; c: mean -2, std 1
    preferred, dispreferred = m3p_scores([0.1, 0.9], [-1.0, -3.0], 0.2, 1.0)
    np.testing.assert_allclose(preferred, [-1 + 0.2, 1 - 0.2])
    np.testing.assert_allclose(dispreferred, [1 + 1, -1 - 1])


@given(values)
def test_z_scores_have_mean_zero_and_unit_std(pool):
    z = z_scores(pool)
    assert np.mean(z) == pytest.approx(0, abs=1e-9)
    assert np.std(z) == pytest.approx(0 if len(set(pool)) == 1 else 1)


@given(values, st.floats(0.01, 100), st.floats(-100, 100))
def test_z_scores_ignore_scale_and_shift(pool, scale, shift):
    np.testing.assert_allclose(z_scores(np.array(pool) * scale + shift), z_scores(pool), atol=1e-6)


def test_constant_confidence_moves_nothing():
    # 0.1 * 3 is not 0.3: equal up to rounding is equal.
    np.testing.assert_array_equal(z_scores([0.3, 0.1 * 3, 0.3]), 0)
    preferred, dispreferred = m3p_scores([0.1, 0.5, 0.9], [-2.0, -2.0, -2.0], 0.2, 1.0)
    np.testing.assert_array_equal(preferred, z_scores([0.1, 0.5, 0.9]))
    np.testing.assert_array_equal(dispreferred, -preferred)


def test_absent_values_stay_absent_and_do_not_count():
    np.testing.assert_allclose(z_scores([1.0, np.nan, 3.0, -np.inf]), [-1, np.nan, 1, np.nan])
    assert np.isnan(z_scores([np.nan, np.nan])).all()
    preferred, dispreferred = m3p_scores([0.1, 0.9], [np.nan, -1.0], 0.0, 1.0)
    np.testing.assert_allclose(preferred, [-1, 1])
    assert np.isnan(dispreferred[0])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        m3p_scores([0.1, 0.2], [1.0], 0.2, 1.0)
