"""The regression gate: a drop fails where it is beyond what is allowed and outside noise, both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.config import GateConfig
from m3po_jax.errors import UserError
from m3po_jax.evaluation import chair, pope
from m3po_jax.evaluation.gate import FAILED, PASSED, UNDECIDED, decide, read_gate, sentence
from m3po_jax.evaluation.registry import METRICS

BENCHMARKS = {"questions": pope.METRIC, "scenes": chair.METRIC, "of.mine": pope.METRIC, "mme": METRICS["mme"]}


def answered(right: Sequence[bool]) -> tuple[list[str], list[dict[str, Any]]]:
    """An image and a question with the answer yes for each."""
    items = [
        {"id": str(i), "parsed": "yes" if is_right else "no", "correct": is_right} for i, is_right in enumerate(right)
    ]
    return [item["id"] for item in items], items


def verdict(base: Sequence[bool], system: Sequence[bool], allowed: float = 1.0) -> dict[str, Any]:
    (guarded,) = read_gate({"questions.accuracy": GateConfig(allowed)}, BENCHMARKS)
    return decide(guarded, pope.METRIC, answered(base), answered(system), resamples=500, seed=0)


def test_a_drop_beyond_the_allowance_and_outside_noise_fails() -> None:
    found = verdict([True] * 100, [False] * 10 + [True] * 90)
    assert (found["base"], found["value"], found["drop"]) == (100.0, 90.0, pytest.approx(10.0))
    # Of 100 images drawn, those that became wrong are binomial: 10 plus or minus 5.9.
    assert found["low"] == pytest.approx(4.1, abs=1.2) and found["high"] == pytest.approx(15.9, abs=1.6)
    assert found["outcome"] == FAILED
    assert sentence(found, "m3po") == (
        f"m3po, questions.accuracy: failed, 100.0 to 90.0, a drop of 10.0 (paired interval {found['low']:.1f} to "
        f"{found['high']:.1f}), beyond the allowed 1"
    )


def test_a_drop_within_the_allowance_passes() -> None:
    found = verdict([True] * 100, [False] * 10 + [True] * 90, allowed=12.0)
    assert found["low"] > 0 and found["outcome"] == PASSED
    assert "within the allowed 12" in sentence(found, "m3po")


def test_a_drop_that_noise_explains_passes() -> None:
    found = verdict([True] * 11 + [False] * 9, [False] * 6 + [True] * 5 + [True] * 5 + [False] * 4, allowed=1.0)
    assert found["drop"] == pytest.approx(5.0) and found["low"] < 0 < found["high"]
    assert found["outcome"] == PASSED and sentence(found, "m3po").endswith("but not outside noise")


def test_the_difference_is_paired() -> None:
    """One image in ten became wrong, out of an accuracy that alone is uncertain by ten points."""
    base = [place % 2 == 0 for place in range(100)]
    system = [right and place % 20 != 0 for place, right in enumerate(base)]
    found = verdict(base, system)
    assert found["drop"] == pytest.approx(5.0) and found["low"] > 0 and found["outcome"] == FAILED


def test_lower_is_better_counts_the_other_way() -> None:
    (guarded,) = read_gate({"scenes.chair_i": GateConfig(1.0)}, BENCHMARKS)

    def captions(wrong: int) -> tuple[list[str], list[dict[str, Any]]]:
        row = {
            "hallucinated": ["cat"] * wrong,
            "mentions": ["dog"] * 4,
            "found": ["dog"],
            "objects": ["dog"],
            "words": 9,
        }
        items = [{"id": str(i), **row} for i in range(50)]
        return [str(i) for i in range(50)], items

    more, fewer = (
        decide(guarded, chair.METRIC, captions(before), captions(after), resamples=50, seed=0)
        for before, after in ((1, 2), (2, 1))
    )
    assert (more["drop"], more["outcome"]) == (25.0, FAILED)
    assert (fewer["drop"], fewer["outcome"]) == (-25.0, PASSED) and sentence(fewer, "x").endswith("no drop")


def test_silence_is_no_way_past_the_gate() -> None:
    """CHAIR_i of captions that name nothing is undefined."""
    (guarded,) = read_gate({"scenes.chair_i": GateConfig(1.0)}, BENCHMARKS)

    def scored(text: str) -> tuple[list[str], list[dict[str, Any]]]:
        words = chair.vocabulary({"cat": [], "dog": []})
        return ["a"], chair.chair([{"id": "a", "text": text, "objects": ["cat"]}], words)["items"]

    silent = decide(guarded, chair.METRIC, scored("a cat"), scored("nothing"), resamples=20, seed=0)
    assert silent["value"] is None and silent["outcome"] == FAILED
    assert sentence(silent, "m3po") == "m3po, scenes.chair_i: failed, it has no value (the base 0.0)"
    absent = decide(guarded, chair.METRIC, scored("nothing"), scored("a dog"), resamples=20, seed=0)
    assert absent["outcome"] == UNDECIDED and sentence(absent, "m3po").endswith("undecided, the base has no value")


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0, 50))
def test_a_system_that_answers_as_the_base_does_passes(right: list[bool], allowed: float) -> None:
    found = verdict(right, right, allowed)
    assert found["drop"] == 0 and found["outcome"] == PASSED


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.floats(0, 50))
def test_what_fails_has_dropped_by_more_than_is_allowed(pairs: list[tuple[bool, bool]], allowed: float) -> None:
    base, system = zip(*pairs, strict=True)
    found = verdict(base, system, allowed)
    drop = 100 * (np.mean(base) - np.mean(system))
    assert found["drop"] == pytest.approx(drop, abs=1e-9)
    if found["outcome"] == FAILED:
        assert drop > allowed - 1e-9 and found["low"] > 0
    more = verdict(base, system, allowed + 10)
    assert not (more["outcome"] == FAILED and found["outcome"] == PASSED)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "pope.accuracy",
            "no benchmark 'pope' (known: mme, of.mine, questions, scenes); write BENCHMARK.NUMBER",
        ),
        ("question.accuracy", "no benchmark 'question' (did you mean 'questions'?)"),
        ("accuracy", "names no benchmark"),
        ("questions.accurracy", "no number 'accurracy' (did you mean 'accuracy'?); one of accuracy, f1"),
        ("questions.yes_ratio", "neither more nor less of yes_ratio is better, so that it cannot drop"),
        ("scenes.delta_chair_i", "benchmark scenes has no number 'delta_chair_i'"),
    ],
)
def test_what_cannot_be_guarded_is_one_line(key: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        read_gate({key: GateConfig()}, BENCHMARKS)
    assert line in str(refused.value)


def test_names_with_points_and_other_units_are_read() -> None:
    gate = {"of.mine.f1": GateConfig(2.0), "mme.perception": GateConfig(20.0)}
    first, second = read_gate(gate, BENCHMARKS)
    assert (first.benchmark, first.column.key, first.allowed) == ("of.mine", "f1", 2.0)
    assert (second.benchmark, second.column.key, second.column.factor) == ("mme", "perception", 1.0)
