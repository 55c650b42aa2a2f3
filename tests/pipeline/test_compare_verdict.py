"""The verdict claims what both intervals allow, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m3po_jax.config import CompareConfig, EvaluateConfig, GateConfig, Recipe
from m3po_jax.pipeline.compare import collect, statistics
from m3po_jax.pipeline.compare.verdict import gate, verdict
from m3po_jax.pipeline.run import Run


def over_seeds(values, width=0.001):
    return statistics.summarise([np.array([v, v - width, v + width]) for v in values])


def results(delta, against, *, accuracy=(0.8, 0.8, 0.8), beyond=False, seeds=3, correlation=0.2, shift=0.1):
    difference = over_seeds(against[:seeds])
    difference |= {"better": "lower", "outcome": statistics.outcome(difference, "lower")}
    question = over_seeds([0.0] * seeds)
    question |= {"better": "higher", "outcome": statistics.outcome(question, "higher")}
    answered = {"accuracy": over_seeds(accuracy[:seeds]), "yes_ratio": over_seeds([0.5] * seeds)}
    return {
        "seeds": list(range(seeds)),
        "planned_seeds": [0, 1, 2],
        "gate": [],
        "signals": {
            "correlation/confidence_mean": correlation,
            "auroc/mas": 0.9,
            "auroc/confidence_prior": 0.6,
            "auroc_within/mas": 0.8,
            "auroc_within/confidence_prior": 0.4,
        },
        "training": {"m3po": {"delta_logps/chosen": shift}},
        "benchmarks": {
            "scenes": {
                "metric": "chair",
                "systems": {
                    "base": {"metrics": {}},
                    "m3po": {"metrics": {"delta_chair_i": over_seeds(delta[:seeds])}, "beyond_frontier": beyond},
                },
                "differences": {"mas_dpo": {"m3po": {"delta_chair_i": difference}}},
            },
            "questions": {
                "metric": "pope",
                "systems": {name: {"metrics": answered, "beyond_frontier": False} for name in ("base", "m3po")},
                "differences": {"mas_dpo": {"m3po": {"accuracy": question}}},
            },
        },
    }


@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (results([-0.1, -0.11, -0.1], [-0.02, -0.021, -0.02]), ["does better than the base's", "m3po beats mas_dpo"]),
        (
            results([0.1, 0.11, 0.1], [0.02, 0.021, 0.02]),
            ["does worse than", "m3po is worse than mas_dpo"],
        ),
        (results([-0.1, 0.2, -0.1], [-0.02, 0.03, 0.0]), ["not shown to do better", "are not told apart"]),
        (results([-0.1, -0.1, -0.1], [-0.02] * 3, beyond=True), ["at most: its recall lies beyond"]),
        (results([np.nan] * 3, [-0.02] * 3), ["recall lies below the base's stop-bias frontier"]),
        (results([-0.1] * 3, [-0.02] * 3, seeds=2), ["2 of 3 seeds are done", "nothing is claimed", "too few seeds"]),
        (results([-0.1] * 3, [-0.02] * 3, accuracy=(0.5,) * 3), ["the base answers 50% right, near chance"]),
        (results([-0.1] * 3, [-0.02] * 3, correlation=0.5), ["correlate at 0.50 (above 0.4)"]),
        (results([-0.1] * 3, [-0.02] * 3, shift=-0.2), ["likelihood displacement"]),
    ],
)
def test_lines(made, lines):
    text = "\n".join(verdict(made, CompareConfig()))
    for line in lines:
        assert line in text
    claims = ("does better than", "beats mas_dpo")
    if made["seeds"] != [0, 1, 2]:
        assert not any(claim in text for claim in claims)
    assert ("displacement" in text) == (made["training"]["m3po"]["delta_logps/chosen"] < 0)


def test_auroc_among_one_prompts_answers_stands_before_that_among_all():
    told = [line for line in verdict(results([-0.1] * 3, [-0.02] * 3), CompareConfig()) if "AUROC" in line]
    assert told == [
        "AUROC for a right answer among one prompt's answers: mas 0.80, prior 0.40 (0.5 is chance).",
        "AUROC for a right answer among all answers: mas 0.90, prior 0.60 (0.5 is chance).",
    ]


def test_signals_of_a_run_are_read_from_its_calibration(tmp_path: Path):
    run = Run(Recipe(name="run", output_dir=str(tmp_path)))
    known = {
        "mas": {"auroc": 0.9, "within": {"auroc": 0.8}},
        "confidence": {"variant": "mean", "auroc": 0.7, "within": {"auroc": None}},
        "confidence_prior": {"auroc": 0.6, "within": None},
        "correlation_mas_confidence": {"confidence_mean": 0.3},
    }
    run.directory.cell(1).scores.save_calibration(known)
    assert collect.signals(run) == {
        "auroc/mas": 0.9,
        "auroc_within/mas": 0.8,
        "auroc/confidence_mean": 0.7,
        "auroc/confidence_prior": 0.6,
        "correlation/confidence_mean": 0.3,
    }


@pytest.mark.parametrize(
    ("accuracy", "seeds", "allowed", "outcome", "words"),
    [
        ((-0.03, -0.031, -0.03), 3, 1.0, "failed", "beyond the allowed drop of 1"),
        ((-0.03, -0.031, -0.03), 3, 4.0, "passed", "within the allowed drop of 4"),
        ((-0.09, 0.02, -0.03), 3, 1.0, "passed", "beyond the allowed drop of 1, but not outside noise"),
        ((0.03, 0.031, 0.03), 3, 0.0, "passed", "within"),
        ((-0.03, -0.031, -0.03), 2, 1.0, "undecided", "too few seeds"),
    ],
)
def test_the_gate_wants_both_intervals(accuracy, seeds, allowed, outcome, words):
    made = results([-0.1] * 3, [-0.02] * 3, seeds=seeds)
    against_base = over_seeds(list(accuracy[:seeds]))
    against_base |= {"better": "higher", "outcome": statistics.outcome(against_base, "higher")}
    made["benchmarks"]["questions"]["differences"]["base"] = {"m3po": {"accuracy": against_base}}
    (entry,) = gate(made, EvaluateConfig(gate={"questions.accuracy": GateConfig(allowed)}), "m3po")
    assert entry["outcome"] == outcome and words in entry["text"]
    lines = verdict(made | {"gate": [entry]}, CompareConfig())
    assert f"Gate: {entry['text']}." in lines
    if outcome != "undecided":
        assert entry["drop"] == pytest.approx(-100 * np.mean(accuracy))
