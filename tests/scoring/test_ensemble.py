"""Ensembles by hand, and their rules of disagreement against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_judges import prompt

from m3po_jax.errors import UserError
from m3po_jax.scoring.alignment import Backend, Judged, judge_pools
from m3po_jax.scoring.ensemble import Ensemble, kendall, spearman

pools = st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.floats(0, 1), min_size=k, max_size=k), min_size=1))


class Fixed(Backend):
    name = "fixed"

    def __init__(self, *scores):
        self.scores = [np.array(row, float) for row in scores]

    def __call__(self, prompts, pools):
        return self.scores


def ensemble(*members, **settings):
    """Scores of one pool from fixed members."""
    return Ensemble([Fixed(row) for row in members], **settings)([prompt(0)], [[""] * len(members[0])])[0]


def test_an_ensemble_ranks_by_mean_z_on_the_members_scale():
    first, second = np.array([0.9, 0.5, 0.1]), np.array([0.5, 0.4, 0.45])
    z = ((first - first.mean()) / first.std() + (second - second.mean()) / second.std()) / 2
    expected = (first.mean() + second.mean()) / 2 + (first.std() + second.std()) / 2 * z
    np.testing.assert_allclose(ensemble(first, second), expected)
    # A mean of scores would leave the ranking to the member with the larger spread.
    assert expected[2] - expected[1] > (first + second)[2] / 2 - (first + second)[1] / 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 3))
def test_equal_members_give_their_scores(scores, count):
    np.testing.assert_allclose(ensemble(*[scores] * count), scores, atol=1e-9)


@given(pools)
def test_ensembles_stay_in_range_or_abstain(members):
    found = ensemble(*members)
    assert np.isnan(found).all() or ((found >= 0) & (found <= 1)).all()


class Reasoned(Fixed):
    """A member that says why it abstains."""

    def __init__(self, scores, reasons, note=""):
        super().__init__(scores)
        self.reasons, self.note = reasons, note

    def judged(self, prompts, pools):
        return Judged(self.scores, [self.reasons], notes={"no_answer": self.note} if self.note else {})


def test_an_outage_of_one_member_is_told_before_what_stays_as_it_is():
    silent = Reasoned([np.nan, np.nan], ["no_image", "no_image"])
    down = Reasoned([0.5, np.nan], [None, "no_answer"], "status 503")
    mute = Reasoned([0.5, np.nan], [None, None])
    for members, why in (([silent, down], "no_answer"), ([down, silent], "no_answer"), ([silent], "no_image")):
        judged = Ensemble([Fixed([0.1, 0.2]), *members]).judged([prompt(0)], [["", ""]])
        assert judged.reasons == [[why, why]] and np.isnan(judged.scores[0]).all()
        assert judged.notes == ({"no_answer": "status 503"} if down in members else {})
    assert Ensemble([mute]).judged([prompt(0)], [["", ""]]).reasons == [["abstained"] * 2], (
        "a member that says nothing"
    )


def test_members_that_abstain_or_disagree_drop_the_pool():
    assert np.isnan(ensemble([0.9, 0.1], [np.nan, np.nan])).all()
    assert np.isnan(ensemble([0.9, np.nan], [0.9, 0.1])).all()
    assert np.isnan(ensemble([0.9, 0.6, 0.5], [0.1, 0.2, 0.3])).all(), "reversed ranks"
    assert np.isfinite(ensemble([0.9, 0.6, 0.5], [0.1, 0.2, 0.3], min_correlation=-1.0)).all()
    assert np.isnan(ensemble([0.9, 0.5], [0.2, 0.6])).all(), "each dislikes the other's best"
    assert np.isfinite(ensemble([0.9, 0.5], [0.5, 0.6])).all(), "the second hardly minds"
    assert np.isfinite(ensemble([0.9, 0.5], [0.2, 0.6], max_gap=0.5)).all()
    assert np.isfinite(ensemble([0.9, 0.6, 0.5], [0.1, 0.1002, 0.1004])).all(), "a flat member has no opinion"
    assert np.isfinite(ensemble([0.9, 0.9, 0.1], [0.1, 0.9, 0.1])).all(), "ties are no disagreement"


def test_pools_are_judged_one_by_one():
    first, second = Fixed([0.9, 0.5], [0.9, 0.5], []), Fixed([0.2, 0.6], [0.8, 0.6], [])
    dropped, kept, empty = Ensemble([first, second])([prompt(0)] * 3, [["", ""], ["", ""], []])
    assert np.isnan(dropped).all() and np.isfinite(kept).all() and empty.shape == (0,)
    with pytest.raises(UserError, match=r"score\.members"):
        Ensemble([])


def test_members_are_columns_and_say_why_they_abstain():
    first, second = (
        Fixed([0.9, 0.6, 0.5], [0.9, 0.6, 0.5], [np.nan] * 2),
        Fixed([0.1, 0.2, 0.3], [0.8, 0.6, 0.5], [0.1, 0.9]),
    )
    second.abstention = "unused"
    first.abstention = "no_image"
    judged = judge_pools(Ensemble([first, second]), [prompt(0)] * 3, [["a"] * 3, ["a"] * 3, ["a"] * 2])
    assert judged.reasons == [["disagreement"] * 3, [None] * 3, ["no_image"] * 2]
    assert list(judged.columns) == ["mas_fixed", "mas_fixed_2"] == list(Ensemble([first, second]).columns)
    for name, member in (("mas_fixed", first), ("mas_fixed_2", second)):
        for found, own in zip(judged.columns[name], member.scores, strict=True):
            np.testing.assert_array_equal(found, own)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=9))
def test_rank_correlations_equal_scipy(points):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array(points, float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(kendall(a, b)) and np.isnan(spearman(a, b))
    else:
        assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-9)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)


def test_the_rules_of_disagreement_are_separate():
    # Swapped neighbours in the middle: ρ = 0.8, τ = 2/3; the best candidate is the same.
    first, second = [0.9, 0.5, 0.4, 0.1], [0.9, 0.4, 0.5, 0.1]
    off = {"max_gap": 1.0, "min_correlation": -1.0}
    assert np.isfinite(ensemble(first, second, min_correlation=0.7)).all()
    assert np.isnan(ensemble(first, second, min_correlation=0.7, correlation="kendall")).all()
    assert np.isfinite(ensemble(first, second, min_correlation=0.6, correlation="kendall")).all()
    # One candidate that the first likes and the second does not, by more than a deviation each.
    first, second = [0.9, 0.8, 0.2, 0.1, 0.1], [0.9, 0.1, 0.8, 0.8, 0.8]
    assert np.isfinite(ensemble(first, second, **off)).all()
    assert np.isnan(ensemble(first, second, max_opposed_z=1.0, **off)).all()
    assert np.isfinite(ensemble(first, second, max_opposed_z=2.0, **off)).all()
    with pytest.raises(UserError, match=r"score\.ensemble\.correlation.*did you mean 'kendall'"):
        ensemble(first, second, correlation="kendal")
