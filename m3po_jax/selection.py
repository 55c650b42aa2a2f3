"""Preference pairs from scored candidates (docs/method.md): one pair, or the reason for none, per prompt.

`select_pair` is the rule on arrays; `select_pools` applies it to every prompt and adds the budget and the
diagnostics (`selection_rows` reads and writes rows). Everything is deterministic: ties go to the lower candidate
number, and the random rules draw from a stream that depends on (seed, prompt id) alone, so that the order of prompts
and candidates does not matter.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from m3po_jax.config import SelectConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values
from m3po_jax.scoring.calibration import correlation
from m3po_jax.scoring.confidence import normalised_text, text_similarity
from m3po_jax.scoring.m3p import m3p_scores, z_scores

_TWO_STEP = (
    "m3p",
    "mas_only",
    "low_confidence",
    "product",
    "lexicographic",
    "shared",
    "extremes",
)  # chosen, then rejected
_JOINT = ("inversion", "random", "vanilla")  # both at once
_UNCONSTRAINED = ("vanilla", "extremes")  # any two answers of different text and MAS
RANDOM_RULES = ("random", "vanilla")  # any pair that satisfies their constraints
RULES = (*_TWO_STEP, *_JOINT)
BUDGET_ORDERS = ("value", "random")
CUT_RULES = ("drop", "keep")
CORRELATION_LIMIT = 0.4  # above it confidence says little that MAS does not (docs/method.md)


class Reason(enum.StrEnum):
    """Why a prompt gave no pair. Constraints thin out the candidates in turn: the one that took the last."""

    TOO_FEW_CANDIDATES = "too_few_candidates"
    CUT = "cut"  # answers cut at the token limit left out, fewer than two are left
    ABSTAINED = "abstained"  # MAS absent, so that fewer than two candidates are left
    NO_CONFIDENCE = "no_confidence"  # likewise confidence, under a rule that uses it
    NO_CONTRAST = "no_contrast"  # MAS hardly varies within the pool
    BELOW_FLOOR = "below_floor"  # no candidate is good enough to be chosen
    NO_MARGIN = "no_margin"  # none is clearly worse than the chosen one
    NOT_BAD = "not_bad"  # lexicographic: none is below τ₋
    GARBAGE = "garbage"  # those left lie below the hardness band
    LENGTH = "length"  # those left are much shorter or longer than the chosen one
    SAME_TEXT = "same_text"  # those left say the same as the chosen one
    NEAR_DUPLICATE = "near_duplicate"  # those left are too similar to the chosen one
    OVER_BUDGET = "over_budget"  # a valid pair that the budget leaves out


@dataclass(frozen=True)
class Pool:
    """The scored candidates of one prompt, all sequences of one length, in any order.

    Attributes:
        id: The prompt's.
        candidates: Candidate numbers, unique.
        texts: The answers.
        lengths: Their response tokens, EOS included.
        mas: Alignment scores; not finite: the scorer abstained.
        confidence: Any variant; not finite: unknown.
        dispreferred_confidence: The variant for the rejected role, where it is another (arm `m3po_prior`).
        group: Of prompts whose pairs' values can be compared, for the budget.
        cut: Whether an answer was cut at the token limit, so that it has no end; None: no answer was.
    """

    id: str
    candidates: Sequence[int]
    texts: Sequence[str]
    lengths: Sequence[int]
    mas: Float[np.ndarray, " candidates"]
    confidence: Float[np.ndarray, " candidates"]
    dispreferred_confidence: Float[np.ndarray, " candidates"] | None = None
    group: str = ""
    cut: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        columns: list[Any] = [self.texts, self.lengths, self.mas, self.confidence]
        columns += [column for column in (self.dispreferred_confidence, self.cut) if column is not None]
        if any(len(column) != len(self.candidates) for column in columns):
            raise UserError("columns of different lengths", where=f"id {self.id!r}")
        repeated = [number for number, count in Counter(self.candidates).items() if count > 1]
        if repeated:
            raise UserError(f"candidate {repeated[0]} occurs twice", where=f"id {self.id!r}")

    @property
    def rejected_confidence(self) -> Float[np.ndarray, " candidates"]:
        return self.confidence if self.dispreferred_confidence is None else self.dispreferred_confidence

    def take(self, index: Sequence[int]) -> Pool:
        """The candidates at these positions, in this order."""
        index = list(index)
        other = self.dispreferred_confidence
        return Pool(
            self.id,
            [self.candidates[i] for i in index],
            [self.texts[i] for i in index],
            [self.lengths[i] for i in index],
            np.asarray(self.mas, np.float64)[index],
            np.asarray(self.confidence, np.float64)[index],
            None if other is None else np.asarray(other, np.float64)[index],
            self.group,
            None if self.cut is None else [self.cut[i] for i in index],
        )


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected candidate of one prompt; `chosen` and `rejected` are candidate numbers.

    Attributes:
        chosen_confidence: NaN where unknown; so is the rejected one's (of the variant that judged its role).
        value: (m_w − m_l)·σ(z(c_l)): what the pair teaches, how confident the mistake is. Ranks pairs.
    """

    id: str
    chosen: int
    rejected: int
    chosen_mas: float
    rejected_mas: float
    chosen_confidence: float
    rejected_confidence: float
    value: float


@dataclass(frozen=True)
class Drop:
    """A prompt without a pair."""

    id: str
    reason: Reason


def check_config(config: SelectConfig) -> None:
    """Raises UserError where a setting cannot be meant."""
    check_values(config, "select")
    low, high = config.length_ratio
    if low > high:
        raise UserError(f"expected two ascending numbers, not {[low, high]}", where="select.length_ratio")
    chosen, rejected = config.lexicographic
    if chosen < rejected:
        raise UserError(
            f"expected the chosen and a lower rejected threshold, not {[chosen, rejected]}",
            where="select.lexicographic",
        )


def uses_confidence(config: SelectConfig) -> bool:
    """Whether the rule needs a confidence for every candidate."""
    if config.rule == "m3p":
        return bool(config.lambda_preferred or config.lambda_dispreferred)
    return config.rule not in {"mas_only", "random", "vanilla", "extremes"}


def _stream(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _usable(pool: Pool, config: SelectConfig) -> Pool | Drop:
    """The candidates that have every score the rule needs, by candidate number."""
    if len(pool.candidates) < 2:
        return Drop(pool.id, Reason.TOO_FEW_CANDIDATES)
    order = sorted(range(len(pool.candidates)), key=lambda i: pool.candidates[i])
    if config.cut == "drop" and pool.cut is not None:
        # An answer without its end would teach the model to stop nowhere, whichever role it played.
        order = [i for i in order if not pool.cut[i]]
        if len(order) < 2:
            return Drop(pool.id, Reason.CUT)
    order = [i for i in order if np.isfinite(pool.mas[i])]
    if len(order) < 2:
        return Drop(pool.id, Reason.ABSTAINED)
    if uses_confidence(config):
        order = [i for i in order if np.isfinite(pool.confidence[i]) and np.isfinite(pool.rejected_confidence[i])]
        if len(order) < 2:
            return Drop(pool.id, Reason.NO_CONFIDENCE)
    return pool.take(order)


def _unit(values: np.ndarray) -> np.ndarray:
    """Min-max to [0, 1]; ones where all are equal, so that a constant leaves a product's order alone."""
    span = np.ptp(values)
    return (values - values.min()) / span if span > 0 else np.ones_like(values)


def _role_scores(pool: Pool, config: SelectConfig) -> tuple[np.ndarray, np.ndarray]:
    """What the rules with two independent argmaxes maximise: (preferred, dispreferred), each [candidates]."""
    mas, chosen, rejected = pool.mas, pool.confidence, pool.rejected_confidence
    plus, minus = config.lambda_preferred, config.lambda_dispreferred
    if config.rule in ("mas_only", "extremes"):
        return m3p_scores(mas, chosen, 0, 0)
    if config.rule == "low_confidence":
        minus = -minus
    if config.rule == "shared":
        preferred = m3p_scores(mas, chosen, plus, 0)[0]
        return preferred, -preferred
    if config.rule == "product":
        quality = _unit(mas)
        return quality * _unit(chosen), (1 - quality) * _unit(rejected)
    if config.rule == "lexicographic":
        return mas, rejected
    return m3p_scores(mas, chosen, plus, 0)[0], m3p_scores(mas, rejected, 0, minus)[1]


Index = tuple[int, int]  # positions of (chosen, rejected) in the pool


def _constraints(pool: Pool, config: SelectConfig) -> list[tuple[Reason, Callable[[Index], bool]]]:
    """Tests of a pair, in the order in which they are blamed; the cheap ones first."""
    mas, lengths, texts = pool.mas, pool.lengths, pool.texts
    plain = functools.cache(lambda i: normalised_text(texts[i]))
    if config.rule in _UNCONSTRAINED:
        return [
            (Reason.NO_MARGIN, lambda p: bool(mas[p[0]] > mas[p[1]])),
            (Reason.SAME_TEXT, lambda p: plain(p[0]) != plain(p[1])),
        ]
    # One outlier among five has z = −2 exactly: rounding must not decide whether the band holds it.
    z = z_scores(mas) + 1e-9
    low, high = config.length_ratio
    tests: list[tuple[Reason, Callable[[Index], bool]]] = [
        (Reason.NO_MARGIN, lambda p: bool(mas[p[0]] - mas[p[1]] >= config.margin)),
        (Reason.GARBAGE, lambda p: bool(z[p[1]] >= config.min_rejected_z)),
        (Reason.LENGTH, lambda p: low * lengths[p[0]] <= lengths[p[1]] <= high * lengths[p[0]]),
        (Reason.SAME_TEXT, lambda p: plain(p[0]) != plain(p[1])),
        (
            Reason.NEAR_DUPLICATE,
            lambda p: text_similarity(texts[p[0]], texts[p[1]]) <= config.max_similarity,
        ),
    ]
    if config.rule == "lexicographic":
        tests.insert(1, (Reason.NOT_BAD, lambda p: bool(mas[p[1]] < config.lexicographic[1])))
    return tests


def _argmax(scores: np.ndarray, index: Iterable[int]) -> int:
    """The best position; candidates are in number order, so the first of equals has the lowest number."""
    return max(index, key=lambda i: (scores[i], -i))


def select_pair(pool: Pool, config: SelectConfig) -> Pair | Drop:
    """The pair that `config.rule` makes of a prompt's candidates, or why there is none.

    Candidates without a score that the rule needs do not take part. Then: the pool must have contrast; the
    chosen answer must reach the floor; the rejected one must keep the margin, the hardness band, the length
    ratio, and differ in text. m3p, mas_only, low_confidence, product, lexicographic and shared choose the
    best answer first and then its rejected partner; ``inversion`` takes the valid pair with the largest
    (m_w − m_l) + λ₋(c_l − c_w), ``random`` any valid pair. ``vanilla`` is the plain DPO baseline: any two
    candidates of different text and different MAS, ordered by MAS, without floor, margin or band; ``extremes``
    the best and the worst of them.

    Raises:
        UserError: a setting that cannot be meant (`check_config`).
    """
    check_config(config)
    return _select_pair(pool, config)


def _select_pair(pool: Pool, config: SelectConfig) -> Pair | Drop:
    """`select_pair` under settings that are checked: of many pools, once for all."""
    valid = _valid_pairs(pool, config)
    if isinstance(valid, Drop):
        return valid
    pool, pairs = valid
    if config.rule == "inversion":
        mas, confidence = pool.mas, pool.confidence
        gain = [mas[w] - mas[j] + config.lambda_dispreferred * (confidence[j] - confidence[w]) for w, j in pairs]
        chosen, rejected = pairs[int(np.argmax(gain))]
    elif config.rule in _JOINT:
        chosen, rejected = pairs[int(_stream(config.seed, pool.id).integers(len(pairs)))]
    else:  # all of them have the chosen answer in common
        chosen = pairs[0][0]
        rejected = _argmax(_role_scores(pool, config)[1], (j for _, j in pairs))
    return _pair(pool, chosen, rejected)


def draw_pairs(pool: Pool, config: SelectConfig, count: int) -> list[Pair] | Drop:
    """At most `count` different valid pairs of a prompt, drawn without replacement; the rule is a random one.

    For a judge that learns from pairs: several of a prompt teach it more than one. Pairs to train a policy on are
    `select_pair`'s.

    Raises:
        UserError: a setting that cannot be meant, or a rule that says which pair it wants.
    """
    check_config(config)
    if config.rule not in RANDOM_RULES:
        raise UserError(
            f"the rule {config.rule!r} makes one pair of a prompt",
            where="reward.pairs_per_prompt",
            remedy=f"1, or one of the rules {', '.join(RANDOM_RULES)}",
        )
    valid = _valid_pairs(pool, config)
    if isinstance(valid, Drop):
        return valid
    pool, pairs = valid
    drawn = _stream(config.seed, pool.id).permutation(len(pairs))[:count]
    return [_pair(pool, *pairs[number]) for number in sorted(drawn)]


def _valid_pairs(pool: Pool, config: SelectConfig) -> tuple[Pool, list[Index]] | Drop:
    """The usable candidates of a pool, and the (chosen, rejected) positions that pass every constraint."""
    usable = _usable(pool, config)
    if isinstance(usable, Drop):
        return usable
    pool = usable
    positions = range(len(pool.candidates))
    if np.std(pool.mas) < config.min_contrast or np.ptp(pool.mas) == 0:
        return Drop(pool.id, Reason.NO_CONTRAST)

    floor = config.chosen_floor
    if config.rule == "lexicographic":
        floor = max(floor, config.lexicographic[0])
    good = [i for i in positions if config.rule in _UNCONSTRAINED or pool.mas[i] >= floor]
    if not good:
        return Drop(pool.id, Reason.BELOW_FLOOR)
    if config.rule not in _JOINT:
        good = [_argmax(_role_scores(pool, config)[0], good)]
    pairs = [(w, j) for w in good for j in positions if j != w]
    for reason, holds in _constraints(pool, config):
        pairs = [pair for pair in pairs if holds(pair)]
        if not pairs:
            return Drop(pool.id, reason)
    return pool, pairs


def _pair(pool: Pool, chosen: int, rejected: int) -> Pair:
    gap = float(pool.mas[chosen] - pool.mas[rejected])
    z = float(z_scores(pool.rejected_confidence)[rejected])
    sureness = 1 / (1 + math.exp(-z)) if math.isfinite(z) else 0.5  # unknown confidence counts as average
    return Pair(
        pool.id,
        int(pool.candidates[chosen]),
        int(pool.candidates[rejected]),
        float(pool.mas[chosen]),
        float(pool.mas[rejected]),
        float(pool.confidence[chosen]),
        float(pool.rejected_confidence[rejected]),
        gap * sureness,
    )


_Key = tuple[str, int, int]


def _key(pair: Pair) -> _Key:
    """What tells a pair from all others, those of its own prompt included (`draw_pairs`)."""
    return pair.id, pair.chosen, pair.rejected


def apply_budget(
    pairs: Sequence[Pair], config: SelectConfig, groups: Mapping[str, str] | None = None
) -> tuple[list[Pair], list[Drop]]:
    """The pairs that `config.budget` (rounded up) and `config.max_pairs` leave, in order; the rest as drops.

    ``budget_by: value`` keeps the most valuable ones, equal values by prompt id, so that the order of prompts does
    not matter. ``random`` ranks prompts by a hash of (seed, prompt id): whatever the rule that made the pairs, the
    same prompts come first, so that subsets of different rules and sizes overlap as far as they can.

    Args:
        groups: Group of a prompt id. With several, a pair's rank is the share of its own group's pairs that come
            before it: MAS gaps of unlike prompts (captions, yes/no questions) do not compare, so that every group
            keeps its share of the pairs, up to rounding.
    """
    groups = groups or {}
    count = math.ceil(len(pairs) * config.budget - 1e-9)
    if config.max_pairs is not None:
        count = min(count, config.max_pairs)

    def rank(pair: Pair) -> tuple[float | bytes, *_Key]:
        if config.budget_by == "random":
            name = f"budget\0{config.seed}\0{pair.id}".encode("utf-8", "surrogatepass")
            return hashlib.sha256(name).digest(), *_key(pair)
        return -pair.value, *_key(pair)

    members: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=rank):
        members.setdefault(groups.get(pair.id, ""), []).append(pair)
    # Middles of equal parts of [0, 1]; those of one group alone are in its order.
    places = [
        ((number + 0.5) / len(group), *rank(pair)) for group in members.values() for number, pair in enumerate(group)
    ]
    kept = {tuple(key) for _, _, *key in sorted(places)[:count]}
    return (
        [pair for pair in pairs if _key(pair) in kept],
        [Drop(pair.id, Reason.OVER_BUDGET) for pair in pairs if _key(pair) not in kept],
    )


@dataclass(frozen=True)
class SelectedPools:
    """Pairs and drops of a whole data set, and what the report shows of them."""

    pairs: list[Pair]
    drops: list[Drop]
    summary: dict[str, Any] = field(default_factory=dict)


def select_pools(pools: Sequence[Pool], config: SelectConfig, pairs_per_prompt: int = 1) -> SelectedPools:
    """`select_pair` on every prompt, then the budget over all pairs; `draw_pairs` where a prompt may give several.

    The summary has: ``prompts``, ``pairs``, ``kept_rate``, ``dropped`` (count by reason), ``correlation``
    (mean within-prompt Pearson r of MAS and the confidence of the rejected role), ``length_difference``
    (chosen − rejected tokens), ``mas_gap``, ``chosen_mas``, ``rejected_mas``, ``value`` (means over pairs;
    None without any), and ``warnings`` (lines of text).
    """
    check_config(config)
    pairs: list[Pair] = []
    drops: list[Drop] = []
    for pool in pools:
        outcome = _select_pair(pool, config) if pairs_per_prompt == 1 else draw_pairs(pool, config, pairs_per_prompt)
        if isinstance(outcome, Drop):
            drops.append(outcome)
        else:
            pairs += [outcome] if isinstance(outcome, Pair) else outcome
    pairs, over = apply_budget(pairs, config, {pool.id: pool.group for pool in pools})
    drops += over

    correlations = [correlation(pool.mas, pool.rejected_confidence) for pool in pools]
    correlations = [value for value in correlations if not math.isnan(value)]
    by_id = {pool.id: pool for pool in pools}

    def length(pair: Pair, candidate: int) -> int:
        pool = by_id[pair.id]
        return pool.lengths[list(pool.candidates).index(candidate)]

    def mean(values: Iterable[float]) -> float | None:
        values = list(values)
        return float(np.mean(values)) if values else None

    counts = Counter(str(drop.reason) for drop in drops)
    summary: dict[str, Any] = {
        "prompts": len(pools),
        "pairs": len(pairs),
        "kept_rate": len(pairs) / len(pools) if pools else 0.0,
        "dropped": {reason: counts[reason] for reason in map(str, Reason) if counts[reason]},
        "correlation": mean(correlations),
        "length_difference": mean(length(p, p.chosen) - length(p, p.rejected) for p in pairs),
        "mas_gap": mean(p.chosen_mas - p.rejected_mas for p in pairs),
        "chosen_mas": mean(p.chosen_mas for p in pairs),
        "rejected_mas": mean(p.rejected_mas for p in pairs),
        "value": mean(p.value for p in pairs),
    }
    summary["warnings"] = _warnings(summary)
    return SelectedPools(pairs, drops, summary)


def _warnings(summary: dict[str, Any]) -> list[str]:
    lines = []
    if summary["correlation"] is not None and summary["correlation"] > CORRELATION_LIMIT:
        lines.append(
            f"MAS and confidence correlate at {summary['correlation']:.2f} within prompts (above "
            f"{CORRELATION_LIMIT}): confidence adds little to MAS here, so expect m3p to tie with mas_only; "
            "the prior or visual confidence overlaps less"
        )
    if summary["prompts"] and not summary["pairs"]:
        reason, count = max(summary["dropped"].items(), key=lambda item: item[1])
        lines.append(f"no prompt gave a pair; most often because of {reason} ({count} prompts)")
    if cut := summary["dropped"].get(Reason.CUT, 0):
        lines.append(
            f"{cut} of {summary['prompts']} prompts have fewer than two answers that were not cut at "
            "generate.max_new_tokens: raise it, or pair cut answers too (select.cut=keep)"
        )
    return lines
