"""Several alignment backends as one, which abstains where they disagree (docs/judges.md)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError, nearest
from m3po_jax.scoring.alignment import Backend, Judged, Scores, judge_pools
from m3po_jax.scoring.calibration import correlation
from m3po_jax.scoring.m3p import z_scores
from m3po_jax.scoring.reasons import ABSTAINED, CUT_AT, DISAGREEMENT, OUTAGES

Values = Float[np.ndarray, " candidates"]


def spearman(first: Values, second: Values) -> float:
    """Spearman's ρ with ties at their mean rank; NaN below three values or where one is constant."""
    return correlation(stats.rankdata(first), stats.rankdata(second))


def kendall(first: Values, second: Values) -> float:
    """Kendall's τ_b (Kendall 1945); NaN below three values or where one is constant.

    Every pool asks for it: scipy's, which tests for significance too, takes sixty times as long.
    """
    a, b = np.sign(first[:, None] - first), np.sign(second[:, None] - second)
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if len(first) > 2 and scale else float("nan")


CORRELATIONS: dict[str, Callable[[Values, Values], float]] = {"spearman": spearman, "kendall": kendall}


class Ensemble(Backend):
    """Several backends as one, with equal say in the ranking; abstains where they disagree.

    The members' scores are z-scored within the pool and averaged, then put back on the members' own scale: the
    mean of their pool means plus the mean of their pool deviations times that average, clipped to [0, 1]. So one
    member (or several equal ones) gives its own scores, and absolute thresholds keep their meaning.

    A pool is NaN where a member abstains on any candidate, or where two members that both see a contrast
    (standard deviation at least `min_contrast`) disagree. They do if one of three holds: their rank correlation
    is below `min_correlation`; each holds the other's best candidate for worse than its own best by more than
    `max_gap`; a candidate's z-scores have opposite signs and both exceed `max_opposed_z`.

    Args:
        members: Each scores every pool; their columns and their own score are written beside the ensemble's.
        correlation: ``spearman`` or ``kendall``; neither says anything of fewer than three candidates.
        min_correlation: −1 switches this rule off.
        max_gap: In units of the score; 1 switches this rule off.
        max_opposed_z: In standard deviations of the pool; None switches this rule off.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Sequence[Backend],
        *,
        correlation: str = "spearman",
        min_correlation: float = 0.0,
        max_gap: float = 0.25,
        max_opposed_z: float | None = None,
        min_contrast: float = 1e-3,
    ):
        if not members:
            raise UserError("an ensemble needs members", where="score.members", remedy="name at least one backend")
        if correlation not in CORRELATIONS:
            raise UserError(
                f"unknown correlation {correlation!r}{nearest(correlation, CORRELATIONS)}",
                where="score.ensemble.correlation",
            )
        self.members, self.correlation = list(members), CORRELATIONS[correlation]
        self.min_correlation, self.max_gap, self.min_contrast = min_correlation, max_gap, min_contrast
        self.max_opposed_z = max_opposed_z
        self.columns = tuple(_distinct([f"mas_{member.name}" for member in self.members]))

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return self.judged(prompts, pools).scores

    def usages(self) -> list[dict[str, Any]]:
        return [usage for member in self.members for usage in member.usages()]

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        """The joint scores, every member's own, and why a pool has none."""
        judged = [judge_pools(member, prompts, pools) for member in self.members]
        scores: Scores = []
        reasons: list[list[str | None]] = []
        for row, pool in enumerate(pools):
            members = np.stack([member.scores[row] for member in judged]) if len(pool) else np.zeros((len(judged), 0))
            why: str | None = None
            if not np.isfinite(members).all():
                whys = [reason for member in judged for reason in member.reasons[row] if reason]
                # What may be answered when it is asked again counts before what stays as it is.
                why = next((why for why in whys if why in OUTAGES or why.startswith(CUT_AT)), [*whys, ABSTAINED][0])
            elif self._disagree(members):
                why = DISAGREEMENT
            scores.append(np.full(len(pool), np.nan) if why else self._join(members))
            reasons.append([why] * len(pool))
        columns = {name: member.scores for name, member in zip(self.columns, judged, strict=True)}
        notes = {reason: note for member in judged for reason, note in member.notes.items()}
        return Judged(scores, reasons, columns, notes)

    def _join(self, scores: Float[np.ndarray, "members candidates"]) -> Values:
        if not scores.size:
            return np.zeros(0)
        z = np.mean([z_scores(row) for row in scores], axis=0)
        return np.clip(scores.mean() + scores.std(axis=1).mean() * z, 0.0, 1.0)

    def _disagree(self, scores: Float[np.ndarray, "members candidates"]) -> bool:
        telling = [row for row in scores if row.size and row.std() >= self.min_contrast]
        for first, second in itertools.combinations(telling, 2):
            if self.correlation(first, second) < self.min_correlation:  # NaN below three candidates
                return True
            # Of several best candidates a member prefers the one that the other likes most.
            a, b = np.lexsort((second, first))[-1], np.lexsort((first, second))[-1]
            if min(first[a] - first[b], second[b] - second[a]) > self.max_gap:
                return True
            if self.max_opposed_z is not None:
                z, other = z_scores(first), z_scores(second)
                both = np.minimum(np.abs(z), np.abs(other))
                if bool(np.any((z * other < 0) & (both > self.max_opposed_z))):
                    return True
        return False


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that were there before: two dual encoders are two columns."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        distinct.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return distinct
