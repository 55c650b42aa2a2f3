"""Pair selection against a brute-force reading of the method, and properties that hold for any pool."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.config import SelectConfig
from m3po_jax.data.schema import PAIR
from m3po_jax.errors import UserError
from m3po_jax.scoring.confidence import normalised_text, text_similarity
from m3po_jax.selection import (
    RULES,
    Drop,
    Pair,
    Pool,
    Reason,
    apply_budget,
    draw_pairs,
    select_pair,
    select_pools,
)
from m3po_jax.selection_rows import select_rows

WORDS = ["red", "car", "dog", "cat", "street", "house", "tree", "blue", "two", "small"]
TEXTS = [" ".join(WORDS[i : i + n]) for n in (1, 3, 5) for i in range(6)]


def make_pool(mas, confidence=None, texts=None, *, lengths=None, candidates=None, id="p", other=None, cut=None):
    count = len(mas)
    return Pool(
        id,
        list(range(count)) if candidates is None else candidates,
        [f"answer {WORDS[i]}" for i in range(count)] if texts is None else texts,
        [10] * count if lengths is None else lengths,
        np.asarray(mas, float),
        np.full(count, np.nan) if confidence is None else np.asarray(confidence, float),
        None if other is None else np.asarray(other, float),
        cut=cut,
    )


@st.composite
def pools(draw):
    count = draw(st.integers(2, 7))
    numbers = st.lists(st.integers(0, 20), min_size=count, max_size=count)
    mas = [v / 20 for v in draw(numbers)]
    confidence = [-v / 10 for v in draw(numbers)]
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    candidates = draw(st.permutations(range(count)))
    return make_pool(
        mas,
        confidence,
        texts,
        lengths=lengths,
        candidates=candidates,
        id=draw(st.sampled_from(["a", "b", "ü"])),
    )


configs = st.builds(
    SelectConfig,
    rule=st.sampled_from(RULES),
    lambda_preferred=st.sampled_from([0.0, 0.2, 1.0]),
    lambda_dispreferred=st.sampled_from([0.0, 0.5, 1.0]),
    chosen_floor=st.sampled_from([0.0, 0.5]),
    margin=st.sampled_from([0.0, 0.1, 0.3]),
    min_rejected_z=st.sampled_from([-2.0, -1.0]),
    length_ratio=st.sampled_from([[0.5, 2.0], [0.1, 10.0]]),
    max_similarity=st.sampled_from([0.6, 0.9]),
    seed=st.integers(0, 3),
)


def z(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / std if std > 1e-12 else 0.0 for v in values]


def unit(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 1.0 for v in values]


def oracle(pool, config):
    """docs/method.md by hand: the (chosen, rejected) ranks that are right within rounding, or a reason."""
    order = sorted(range(len(pool.candidates)), key=lambda i: pool.candidates[i])
    m, c = [float(pool.mas[i]) for i in order], [float(pool.confidence[i]) for i in order]
    texts, lengths = [pool.texts[i] for i in order], [pool.lengths[i] for i in order]
    zm, zc, um, uc = z(m), z(c), unit(m), unit(c)
    every = range(len(m))
    if np.std(m) < 1e-3:
        return Reason.NO_CONTRAST
    plus, minus = config.lambda_preferred, config.lambda_dispreferred

    def combine(sign, weight):
        return [sign * zm[i] + weight * zc[i] for i in every]

    scores = {
        "m3p": (combine(1, plus), combine(-1, minus)),
        "mas_only": (m, combine(-1, 0)),
        "low_confidence": (combine(1, plus), combine(-1, -minus)),
        "product": ([um[i] * uc[i] for i in every], [(1 - um[i]) * uc[i] for i in every]),
        "lexicographic": (m, c),
        "shared": (combine(1, plus), combine(-1, -plus)),
        "extremes": (m, [-x for x in m]),
    }
    lexicographic = config.rule == "lexicographic"
    floor = max(config.chosen_floor, config.lexicographic[0]) if lexicographic else config.chosen_floor
    good = [i for i in every if m[i] >= floor or config.rule in ("vanilla", "extremes")]
    if not good:
        return Reason.BELOW_FLOOR
    if config.rule in scores:
        best = max(scores[config.rule][0][i] for i in good)
        tied = [i for i in good if scores[config.rule][0][i] >= best - 1e-9]
    else:
        tied = good

    def tests(w, j):
        different = normalised_text(texts[w]) != normalised_text(texts[j])
        if config.rule in ("vanilla", "extremes"):
            return {Reason.NO_MARGIN: m[w] > m[j], Reason.SAME_TEXT: different}
        found = {Reason.NO_MARGIN: m[w] - m[j] >= config.margin}
        if lexicographic:
            found[Reason.NOT_BAD] = m[j] < config.lexicographic[1]
        low, high = config.length_ratio
        found[Reason.GARBAGE] = zm[j] >= config.min_rejected_z - 1e-9
        found[Reason.LENGTH] = low <= lengths[j] / lengths[w] <= high
        found[Reason.SAME_TEXT] = different
        found[Reason.NEAR_DUPLICATE] = text_similarity(texts[w], texts[j]) <= config.max_similarity
        return found

    answers = set()
    for group in [[w] for w in tied] if config.rule in scores else [tied]:
        left = [(w, j) for w in group for j in every if j != w]
        reason = None
        for name in tests(0, 1):
            if left:
                left, reason = [p for p in left if tests(*p)[name]], name
        if not left:
            answers.add(reason)
            continue
        if config.rule == "inversion":
            score = {(w, j): m[w] - m[j] + minus * (c[j] - c[w]) for w, j in left}
        elif config.rule in scores:
            score = {(w, j): scores[config.rule][1][j] for w, j in left}
        else:
            score = dict.fromkeys(left, 0.0)
        top = max(score.values())
        answers |= {pair for pair, value in score.items() if value >= top - 1e-9}
    return answers if len(answers) > 1 or not isinstance(next(iter(answers)), Reason) else answers.pop()


@given(pools(), configs)
@settings(max_examples=400, deadline=None)
def test_equals_brute_force(pool, config):
    expected = oracle(pool, config)
    found = select_pair(pool, config)
    if isinstance(found, Drop):
        assert found.reason == expected or (isinstance(expected, set) and found.reason in expected)
    else:
        order = sorted(pool.candidates)
        assert isinstance(expected, set)
        assert (order.index(found.chosen), order.index(found.rejected)) in expected


@given(pools(), configs)
@settings(max_examples=200, deadline=None)
def test_a_pair_satisfies_every_constraint(pool, config):
    pair = select_pair(pool, config)
    if isinstance(pair, Drop):
        return
    w, j = list(pool.candidates).index(pair.chosen), list(pool.candidates).index(pair.rejected)
    assert w != j and pool.mas[w] > pool.mas[j] - 1e-12
    assert normalised_text(pool.texts[w]) != normalised_text(pool.texts[j])
    assert (pair.chosen_mas, pair.rejected_mas) == (pool.mas[w], pool.mas[j])
    zc = z([float(v) for v in pool.confidence])[j]
    assert pair.value == pytest.approx((pool.mas[w] - pool.mas[j]) / (1 + math.exp(-zc)))
    if config.rule in ("vanilla", "extremes"):
        return
    assert pool.mas[w] >= config.chosen_floor
    assert pool.mas[w] - pool.mas[j] >= config.margin
    assert z([float(v) for v in pool.mas])[j] >= config.min_rejected_z - 1e-9
    low, high = config.length_ratio
    assert low <= pool.lengths[j] / pool.lengths[w] <= high
    assert text_similarity(pool.texts[w], pool.texts[j]) <= config.max_similarity
    if config.rule == "lexicographic":
        assert pool.mas[w] >= config.lexicographic[0] and pool.mas[j] < config.lexicographic[1]


@given(pools(), configs, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_of_candidates_does_not_matter(pool, config, random):
    order = list(range(len(pool.candidates)))
    random.shuffle(order)
    assert select_pair(pool.take(order), config) == select_pair(pool, config)


@given(pools(), configs)
@settings(deadline=None)
def test_lambda_zero_is_mas_only(pool, config):
    zero = replace(config, rule="m3p", lambda_preferred=0.0, lambda_dispreferred=0.0)
    assert select_pair(pool, zero) == select_pair(pool, replace(zero, rule="mas_only"))


def test_m3p_takes_the_confident_mistake_and_the_others_do_not():
    #          good   good, sure  bad, sure  bad, unsure  worst
    pool = make_pool([0.9, 0.88, 0.3, 0.32, 0.2], [-2.0, -1.0, -0.5, -3.0, -2.0])
    chosen = {rule: select_pair(pool, SelectConfig(rule=rule)) for rule in RULES}
    pairs = {rule: (pair.chosen, pair.rejected) for rule, pair in chosen.items() if isinstance(pair, Pair)}
    assert pairs["m3p"] == (1, 2)
    assert pairs["mas_only"] == (0, 4)
    assert pairs["low_confidence"] == (1, 3)
    assert pairs["product"] == (1, 2)
    assert pairs["lexicographic"] == (0, 2)
    assert pairs["inversion"] == (0, 2)
    assert pairs["shared"] == (1, 4)
    assert set(pairs) == set(RULES)


def test_rejected_role_can_have_its_own_confidence():
    mas, seen, prior = [0.9, 0.3, 0.3], [-1.0, -1.0, -2.0], [-1.0, -3.0, -1.0]
    assert select_pair(make_pool(mas, seen), SelectConfig()).rejected == 1
    pair = select_pair(make_pool(mas, seen, other=prior), SelectConfig())
    assert (pair.rejected, pair.chosen_confidence, pair.rejected_confidence) == (2, -1.0, -1.0)
    # An unknown value in either role takes a candidate out.
    assert select_pair(make_pool(mas, seen, other=[-1, -3, np.nan]), SelectConfig()).rejected == 1


def test_ties_go_to_the_lower_candidate_number():
    pool = make_pool([0.2, 0.9, 0.2, 0.9], [-1.0] * 4, candidates=[7, 5, 3, 9])
    pair = select_pair(pool, SelectConfig())
    assert (pair.chosen, pair.rejected) == (5, 3)


NAN = float("nan")


@pytest.mark.parametrize(
    ("reason", "pool", "changes"),
    [
        ("too_few_candidates", make_pool([0.9], [-1]), {}),
        ("too_few_candidates", make_pool([], []), {}),
        ("cut", make_pool([0.9, 0.1, 0.5], [-1, -1, -1], cut=[True, False, True]), {}),
        ("cut", make_pool([0.9, 0.1], cut=[False, True]), {"rule": "vanilla"}),
        ("abstained", make_pool([NAN, 0.9, 0.1], [-1, -1, -1], cut=[False, False, True]), {}),
        ("abstained", make_pool([NAN, NAN], [-1, -1]), {}),
        ("abstained", make_pool([0.9, NAN, math.inf], [-1, -1, -1]), {}),
        ("no_confidence", make_pool([0.9, 0.1], [-1, NAN]), {}),
        ("no_contrast", make_pool([0.9, 0.9], [-1, -2]), {}),
        ("no_contrast", make_pool([0.9, 0.9], [-1, -2]), {"min_contrast": 0.0}),
        ("below_floor", make_pool([0.4, 0.1], [-1, -2]), {}),
        ("below_floor", make_pool([0.6, 0.1], [-1, -2]), {"rule": "lexicographic"}),
        ("no_margin", make_pool([0.9, 0.85], [-1, -2]), {}),
        ("not_bad", make_pool([0.9, 0.5], [-1, -2]), {"rule": "lexicographic"}),
        ("garbage", make_pool([0.9] * 7 + [0.0], [-1] * 8), {}),
        ("length", make_pool([0.9, 0.1], [-1, -2], lengths=[10, 21]), {}),
        ("length", make_pool([0.9, 0.1], [-1, -2], lengths=[10, 4]), {}),
        ("same_text", make_pool([0.9, 0.1], [-1, -2], texts=["A dog.", "dog"]), {}),
        ("same_text", make_pool([0.9, 0.1], texts=["A dog.", "dog"]), {"rule": "vanilla"}),
        (
            "near_duplicate",
            make_pool([0.9, 0.1], [-1, -2], texts=["one two", "one two two"]),
            {"max_similarity": 0.7},
        ),
        # Of two constraints that each remove one candidate, the later one is blamed.
        ("length", make_pool([0.9, 0.85, 0.1], [-1, -1, -1], lengths=[10, 10, 40]), {}),
        ("length", make_pool([0.9, 0.85, 0.1], [-1, -1, -1], lengths=[10, 10, 40]), {"rule": "random"}),
    ],
)
def test_reasons(reason, pool, changes):
    assert select_pair(pool, replace(SelectConfig(), **changes)) == Drop("p", Reason(reason))


def test_constraints_hold_at_their_limits():
    # One bad answer among five has z = −2, whatever the numbers.
    for good, bad in ((0.9, 0.1), (0.7, 0.3), (0.61, 0.17)):
        assert isinstance(select_pair(make_pool([good] * 4 + [bad], [-1] * 5), SelectConfig()), Pair)
    # 0.75 − 0.5 is exact; a ratio of 2 and a floor of 0.75 are allowed.
    pool = make_pool([0.75, 0.5], [-1, -2], lengths=[4, 8])
    assert isinstance(select_pair(pool, SelectConfig(margin=0.25, chosen_floor=0.75)), Pair)
    # An answer of EOS alone is a length of 1.
    assert isinstance(select_pair(make_pool([0.9, 0.1], [-1, -2], lengths=[2, 1]), SelectConfig()), Pair)


@given(pools(), configs, st.data())
@settings(deadline=None)
def test_cut_answers_are_as_if_they_had_never_been_drawn(pool, config, data):
    flags = data.draw(st.lists(st.booleans(), min_size=len(pool.candidates), max_size=len(pool.candidates)))
    marked = replace(pool, cut=flags)
    whole = [i for i, cut in enumerate(flags) if not cut]
    if len(whole) >= 2:
        assert select_pair(marked, config) == select_pair(pool.take(whole), config)
    else:
        assert select_pair(marked, config) == Drop(pool.id, Reason.CUT)
    assert select_pair(marked, replace(config, cut="keep")) == select_pair(pool, config)


def test_rows_say_by_their_finish_reason_which_answers_were_cut():
    def row(candidate, mas, **more):
        return {"id": "a", "candidate": candidate, "text": f"answer {WORDS[candidate]}", "mas": mas, **more}

    rows = [
        row(0, 0.9, finish_reason="length"),
        row(1, 0.8, finish_reason="stop"),
        row(2, 0.1, finish_reason="stop_string"),
        row(3, 0.0, finish_reason="length"),
    ]
    config = SelectConfig(rule="mas_only", min_rejected_z=-9.0)
    (pair,), _, _ = select_rows(rows, config)
    assert (pair["chosen_candidate"], pair["rejected_candidate"]) == (1, 2)
    (pair,), _, _ = select_rows(rows, replace(config, cut="keep"))
    assert (pair["chosen_candidate"], pair["rejected_candidate"]) == (0, 3)
    # Rows of other programs say nothing of how their answers ended.
    (pair,), _, _ = select_rows([row(0, 0.9), row(1, 0.1)], config)
    assert (pair["chosen_candidate"], pair["rejected_candidate"]) == (0, 1)
    _, drops, summary = select_rows([rows[0], rows[1], rows[3]], config)
    assert [drop["reason"] for drop in drops] == ["cut"]
    assert any("1 of 1 prompts" in line and "select.cut=keep" in line for line in summary["warnings"])
    with pytest.raises(UserError, match=r"select.cut"):
        select_rows(rows, replace(config, cut="kep"))


def test_rules_without_confidence_need_none():
    for rule in ("mas_only", "random", "vanilla"):
        pair = select_pair(make_pool([0.9, 0.1]), SelectConfig(rule=rule))
        assert (pair.chosen, pair.rejected) == (0, 1)
        assert math.isnan(pair.chosen_confidence)
        assert pair.value == pytest.approx(0.8 / 2)  # unknown confidence counts as average


def test_random_rules_depend_on_seed_and_id_alone_and_reach_every_pair():
    mas = [0.9, 0.7, 0.3, 0.1]
    for rule, reachable in (("random", 4 + 1), ("vanilla", 6)):
        config = SelectConfig(rule=rule)
        prompts = [make_pool(mas, id=f"p{i}") for i in range(120)]
        forwards = {pair.id: (pair.chosen, pair.rejected) for pair in select_pools(prompts, config).pairs}
        backwards = select_pools(prompts[::-1], config).pairs
        assert forwards == {pair.id: (pair.chosen, pair.rejected) for pair in backwards}
        assert len(set(forwards.values())) == reachable
        assert all(chosen < rejected for chosen, rejected in forwards.values())
        other = select_pools(prompts, replace(config, seed=1)).pairs
        assert forwards != {pair.id: (pair.chosen, pair.rejected) for pair in other}


def test_several_pairs_of_a_prompt_are_different_valid_and_drawn_by_seed_and_id():
    pool = make_pool([0.9, 0.7, 0.3, 0.1], [-1] * 4)
    for rule, reachable in (("random", 5), ("vanilla", 6)):
        config = SelectConfig(rule=rule)
        every = draw_pairs(pool, config, 100)
        assert len({(pair.chosen, pair.rejected) for pair in every}) == len(every) == reachable
        some = [draw_pairs(pool, replace(config, seed=seed), 2) for seed in range(40)]
        assert all(len(drawn) == 2 and drawn[0] != drawn[1] and set(drawn) <= set(every) for drawn in some)
        assert {pair for drawn in some for pair in drawn} == set(every)
        assert draw_pairs(pool.take([3, 1, 0, 2]), config, 2) == draw_pairs(pool, config, 2)
    assert draw_pairs(make_pool([0.5, 0.5]), SelectConfig(rule="vanilla"), 3).reason == "no_contrast"
    with pytest.raises(UserError, match="makes one pair of a prompt"):
        draw_pairs(pool, SelectConfig(rule="mas_only"), 2)
    found = select_pools([pool, make_pool([0.9, 0.1], [-1] * 2, id="q"), make_pool([0.5], id="r")], config, 4)
    assert [pair.id for pair in found.pairs] == ["p"] * 4 + ["q"]
    assert found.summary["pairs"] == 5 and found.summary["dropped"] == {"too_few_candidates": 1}


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=12), st.sampled_from([0.1, 0.25, 0.5, 1 / 3, 1.0]))
def test_budget_keeps_the_most_valuable_share(values, budget):
    pairs = [Pair(f"p{i}", 0, 1, 0.9, 0.1, -1.0, -1.0, value) for i, value in enumerate(values)]
    kept, dropped = apply_budget(pairs, SelectConfig(budget=budget))
    assert len(kept) == math.ceil(round(len(pairs) * budget, 9)) and len(kept) + len(dropped) == len(pairs)
    assert kept == [pair for pair in pairs if pair in kept]
    lost = [pair.value for pair in pairs if pair not in kept]
    assert not lost or not kept or min(p.value for p in kept) >= max(lost)
    assert {pair.id for pair in apply_budget(pairs[::-1], SelectConfig(budget=budget))[0]} == {
        pair.id for pair in kept
    }
    assert all(drop.reason is Reason.OVER_BUDGET for drop in dropped)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.1, 0.2, 0.9, 1.0])), min_size=1, max_size=24),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)
def test_a_budget_within_groups_keeps_the_best_share_of_each(rows, budget):
    pairs = [Pair(f"p{i}", 0, 1, 0.9, 0.1, -1.0, -1.0, value) for i, (_, value) in enumerate(rows)]
    groups = {f"p{i}": group for i, (group, _) in enumerate(rows)}
    config = SelectConfig(budget=budget)
    kept, dropped = apply_budget(pairs, config, groups)
    assert len(kept) == math.ceil(round(len(pairs) * budget, 9))
    assert sorted(p.id for p in kept + [Pair(d.id, 0, 1, 0, 0, 0, 0, 0) for d in dropped]) == sorted(groups)
    for group in "ab":
        own = [pair for pair in pairs if groups[pair.id] == group]
        chosen = [pair for pair in own if pair in kept]
        assert abs(len(chosen) - len(own) * len(kept) / len(pairs)) <= 1, "every group keeps its share"
        lost = [pair.value for pair in own if pair not in kept]
        assert not lost or not chosen or min(p.value for p in chosen) >= max(lost)
    one = apply_budget(pairs, config, dict.fromkeys(groups, "a"))[0]
    assert one == apply_budget(pairs, config)[0], "one group is none"


def test_rows_name_the_group_by_a_key_of_their_metadata():
    def rows(prompt, kind, gap):
        made = [(0.9, -0.1), (0.9 - gap, -0.2)]
        return [
            {"id": prompt, "candidate": i, "text": f"answer {i} " * (i + 1), "mas": mas, "confidence": confidence}
            | {"token_ids": [1, 2], "token_logprobs": [-0.1, -0.1], "metadata": {"kind": kind}}
            for i, (mas, confidence) in enumerate(made)
        ]

    given = [row for i in range(4) for row in rows(f"q{i}", "yesno", 0.9) + rows(f"c{i}", "caption", 0.2 + i / 100)]
    config = SelectConfig(budget=0.5, min_rejected_z=-9.0, max_similarity=1.0)
    assert {pair["id"][0] for pair in select_rows(given, config)[0]} == {"q"}
    found = select_rows(given, replace(config, budget_within="kind"))[0]
    assert sorted(pair["id"] for pair in found) == ["c2", "c3", "q0", "q1"]
    with pytest.raises(UserError, match=r"has no 'kinds'.*did you mean 'kind'"):
        select_rows(given, replace(config, budget_within="kinds"))


def test_a_random_budget_takes_the_same_prompts_whatever_made_the_pairs():
    def pairs(values):
        return [Pair(f"p{i}", 0, 1, 0.9, 0.1, -1.0, -1.0, value) for i, value in enumerate(values)]

    config = SelectConfig(budget_by="random", budget=0.5, seed=3)
    first, second = (apply_budget(pairs(v), config)[0] for v in (np.linspace(0, 1, 40), np.linspace(1, 0, 40)))
    assert len(first) == 20 and [p.id for p in first] == [p.id for p in second]
    smaller = apply_budget(pairs(np.zeros(40)), replace(config, max_pairs=7))[0]
    assert len(smaller) == 7 and {p.id for p in smaller} < {p.id for p in first}
    other = apply_budget(pairs(np.zeros(40)), replace(config, seed=4))[0]
    assert {p.id for p in other} != {p.id for p in first}
    # A prompt's place does not depend on the other prompts: a rule that drops some keeps the order of the rest.
    some = apply_budget(pairs(np.zeros(40))[::2], replace(config, budget=1.0, max_pairs=7))[0]
    ranking = [p.id for n in range(1, 21) for p in apply_budget(pairs(np.zeros(40)), replace(config, max_pairs=n))[0]]
    order = list(dict.fromkeys(ranking))
    even = [key for key in order if int(key[1:]) % 2 == 0][:7]
    assert {p.id for p in some} >= set(even)


def test_fewer_candidates_are_the_first_ones():
    rows = [
        {"id": "p", "candidate": k, "text": f"answer {WORDS[k]}", "mas": mas, "confidence": -1.0}
        for k, mas in enumerate([0.6, 0.1, 0.9, 0.2])
    ]
    whole, part = (select_rows(rows, SelectConfig(candidates=k, max_similarity=1.0))[0][0] for k in (None, 2))
    assert whole["chosen_candidate"] == 2 and part["chosen_candidate"] == 0 and part["rejected_candidate"] == 1
    with pytest.raises(UserError, match=r"must be in \[2, 4096\]"):
        select_rows(rows, SelectConfig(candidates=1))
    with pytest.raises(UserError, match=r"select\.max_pairs"):
        select_rows(rows, SelectConfig(max_pairs=0))
    with pytest.raises(UserError, match=r"budget_by: unknown value 'valeu' \(did you mean 'value'"):
        select_rows(rows, SelectConfig(budget_by="valeu"))


def test_summary():
    prompts = [
        make_pool([0.9, 0.5, 0.1], [-1.0, -2.0, -3.0], lengths=[10, 8, 6], id="agree"),
        make_pool([0.9, 0.1, 0.1], [-1.0, -2.0, -1.5], lengths=[10, 10, 10], id="agree too"),
        make_pool([0.2, 0.1], [-1.0, -2.0], id="bad"),
    ]
    selection = select_pools(prompts, SelectConfig(lambda_dispreferred=0.0))
    summary = selection.summary
    assert summary["prompts"] == 3 and summary["pairs"] == 2 and summary["kept_rate"] == pytest.approx(2 / 3)
    assert summary["dropped"] == {"below_floor": 1}
    assert summary["correlation"] == pytest.approx((1 + np.corrcoef([9, 1, 1], [-1, -2, -1.5])[0, 1]) / 2)
    assert summary["length_difference"] == pytest.approx(2.0)
    assert summary["mas_gap"] == pytest.approx(0.8)
    assert (summary["chosen_mas"], summary["rejected_mas"]) == pytest.approx((0.9, 0.1))
    assert summary["value"] == pytest.approx(np.mean([pair.value for pair in selection.pairs]))
    assert any("correlate" in line for line in summary["warnings"])
    empty = select_pools(prompts[2:], SelectConfig()).summary
    assert empty["mas_gap"] is None and empty["correlation"] is None
    assert any("below_floor" in line for line in empty["warnings"])
    assert select_pools([], SelectConfig()).summary["kept_rate"] == 0


def test_no_warning_where_confidence_is_independent():
    pool = make_pool([0.9, 0.5, 0.1, 0.5], [-1.0, -3.0, -1.0, 1.0])
    assert select_pools([pool], SelectConfig()).summary["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "m3po"}, "did you mean 'm3p'"),
        ({"length_ratio": [2.0, 0.5]}, "length_ratio"),
        ({"length_ratio": [1.0]}, "length_ratio"),
        ({"lexicographic": [0.4, 0.7]}, "lexicographic"),
        ({"budget": 0.0}, "budget"),
        ({"margin": -0.1}, "margin"),
        ({"margin": NAN}, "margin"),
        ({"lambda_preferred": NAN}, "lambda_preferred"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(UserError, match=message):
        select_pair(make_pool([0.9, 0.1], [-1, -2]), replace(SelectConfig(), **changes))


def rows_of(id="p", **changes):
    rows = [
        {
            "id": id,
            "candidate": number,
            "text": text,
            "token_ids": [5, 6, 2],
            "token_logprobs": [-0.5, -1.0, confidence * 3 + 1.5],
            "finish_reason": "stop",
            "mas": mas,
            "mas_claims": mas,
            "confidence": confidence,
            "confidence_mean": confidence,
        }
        for number, (text, mas, confidence) in enumerate([("a dog", 0.9, -1.0), ("a cat", 0.1, -1.5)])
    ]
    rows[1] |= changes
    return rows


def test_rows_to_pair_rows():
    rows = [row | {"instruction": "What is it?", "images": [{"path": "a.png"}]} for row in rows_of()]
    pairs, drops, summary = select_rows(rows, SelectConfig())
    assert drops == [] and summary["pairs"] == 1
    (pair,) = pairs
    assert list(pair) == PAIR.names and json.loads(json.dumps(pair)) == pair
    assert pair["prompt"][0]["content"] == [
        {"type": "image", "text": None},
        {"type": "text", "text": "What is it?"},
    ]
    assert pair["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]
    assert pair["rejected"][0]["content"][0]["text"] == "a cat"
    assert (pair["chosen_candidate"], pair["rejected_candidate"]) == (0, 1)
    assert pair["chosen_token_ids"] == [5, 6, 2]
    assert pair["reference_rejected_logprobs"] == rows[1]["token_logprobs"]
    assert (pair["chosen_mas"], pair["rejected_confidence"]) == (0.9, -1.5)
    metadata = {"history": [["Hello.", "Hi."]], "system": "Be brief."}
    ((talk,), _, _) = select_rows([row | {"metadata": metadata} for row in rows], SelectConfig())
    assert [message["role"] for message in talk["prompt"]] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in talk["prompt"][1]["content"]] == ["image", "text"]


def test_rows_may_be_shuffled_and_dropped_with_reason():
    rows = [*rows_of("x"), *rows_of("y", mas=0.88), *rows_of("z", mas=None)]
    pairs, drops, summary = select_rows(rows[::2] + rows[1::2], SelectConfig())
    assert [pair["id"] for pair in pairs] == ["x"]
    assert drops == [
        {"id": "y", "reason": "no_margin", "candidates": 2},
        {"id": "z", "reason": "abstained", "candidates": 2},
    ]
    assert summary["dropped"] == {"abstained": 1, "no_margin": 1}


def test_minimal_rows_need_no_tokens():
    rows = [{k: row[k] for k in ("id", "candidate", "text", "mas", "confidence")} for row in rows_of()]
    rows[1]["text"] = "a b c d e f"  # 7 tokens with EOS against 3
    assert select_rows(rows, SelectConfig())[1][0]["reason"] == "length"
    rows[1]["text"] = "a b"
    pair = select_rows(rows, SelectConfig())[0][0]
    assert pair["chosen_token_ids"] is None and "prompt" not in pair


def test_columns_of_confidence():
    rows = [row | {"confidence_prior": -1.0} for row in rows_of()]
    config = SelectConfig(confidence="prior")
    assert select_rows(rows, config)[0][0]["rejected_confidence"] == -1.0
    mixed = select_rows(rows, SelectConfig(), dispreferred_confidence="prior")[0][0]
    assert (mixed["chosen_confidence"], mixed["rejected_confidence"]) == (-1.0, -1.0)
    with pytest.raises(UserError, match="confidence_visual"):
        select_rows(rows, SelectConfig(confidence="visual"))
    with pytest.raises(UserError, match="did you mean 'prior'"):
        select_rows(rows, SelectConfig(confidence="priro"))
    # A rule that needs no confidence takes rows without, and uses it for the value where it is there.
    bare = [{k: v for k, v in row.items() if not k.startswith("confidence")} for row in rows_of()]
    assert select_rows(bare, SelectConfig(rule="mas_only"))[0][0]["chosen_confidence"] is None
    assert select_rows(rows_of(), SelectConfig(rule="mas_only"))[0][0]["chosen_confidence"] == -1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate": 0}, "id 'p': candidate 0 occurs twice"),
        ({"candidate": "1"}, "f.jsonl:2: candidate must be an integer"),
        ({"candidate": True}, "candidate must be an integer"),
        ({"id": None}, "id must be a string"),
        ({"text": None}, "text must be a string"),
        ({"mas": "high"}, r"f.jsonl:2 \(id 'p'\): mas is not a number"),
        ({"mas": True}, "mas is not a number"),
        ({"mas": 10**400}, "mas is not a number"),
        ({"token_ids": [1]}, "1 token_ids but 3 token_logprobs"),
    ],
)
def test_malformed_rows_are_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        select_rows(rows_of(**changes), SelectConfig(), where="f.jsonl")


def test_missing_columns_and_non_objects_are_user_errors():
    rows = rows_of()
    del rows[1]["mas"]
    with pytest.raises(UserError, match="no column 'mas'"):
        select_rows(rows, SelectConfig())
    with pytest.raises(UserError, match="not an object"):
        select_rows(["text"], SelectConfig())
    with pytest.raises(UserError, match="different lengths"):
        Pool("p", [0, 1], ["a"], [1, 2], np.zeros(2), np.zeros(2))


@pytest.mark.parametrize("value", [None, NAN])
def test_null_confidence_takes_a_candidate_out(value):
    rows = rows_of(confidence_mean=value)
    assert select_rows(rows, SelectConfig())[1] == [{"id": "p", "reason": "no_confidence", "candidates": 2}]
    pair = select_rows(rows, SelectConfig(rule="mas_only"))[0][0]
    assert pair["rejected_confidence"] is None


def test_hostile_text_and_ids():
    rows = rows_of("\ud800", text="\u202e\x00 \ud83d")
    assert len(select_rows(rows, SelectConfig(rule="random"))[0]) == 1


@pytest.mark.parametrize("order", ["value", "random"])
def test_max_pairs_counts_pairs_and_not_prompts(order):
    """Several pairs of one prompt (`draw_pairs`) are ranked one by one, also where its id is no valid Unicode."""
    pairs = [Pair("p\ud800", number, 3, 1.0, 0.0, 0.0, 0.0, value) for number, value in enumerate((0.1, 0.3, 0.2))]
    kept, dropped = apply_budget(pairs, SelectConfig(max_pairs=1, budget_by=order))
    assert len(kept) == 1 and len(dropped) == 2
    if order == "value":
        assert kept == [pairs[1]]
    assert apply_budget(pairs[::-1], SelectConfig(max_pairs=1, budget_by=order))[0] == kept
