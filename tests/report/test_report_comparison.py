"""The report of a comparison: what it shows of `compare`'s results, and what of files that are older or broken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from m3po_jax.report import build_report, tables


def value(mean: float) -> dict[str, Any]:
    return {"mean": mean, "sd": 0.01, "low": mean - 0.02, "high": mean + 0.02}


def system(kind: str, chair: float, recall: float) -> dict[str, Any]:
    metrics = {"chair_i": value(chair), "recall": value(recall)}
    return {"kind": kind, "metrics": metrics, "beyond_frontier": False}


DIFFERENCE = {"mean": -0.1, "low": -0.12, "high": -0.08, "t_low": -0.15, "t_high": -0.05, "outcome": "better"}
RESULTS = {
    "seeds": [0, 1],
    "planned_seeds": [0, 1],
    "rounds": 1,
    "candidates": 8,
    "temperature": 1.0,
    "lambda": [0.0, 1.0],
    "beta": 0.1,
    "verdict": ["scenes: m3po beats <base>."],
    "efficiency": [],
    "benchmark_order": ["scenes"],
    "order": ["m3po"],
    "benchmarks": {
        "scenes": {
            "metric": "chair",
            "questions": 12,
            "images": 12,
            "order": ["base", "base, stop bias +2", "m3po"],
            "systems": {
                "base": system("base", 0.3, 0.7),
                "base, stop bias +2": system("frontier", 0.2, 0.6),
                "m3po": system("arm", 0.1, 0.7),
            },
            "differences": {"base": {"m3po": {"chair_i": DIFFERENCE}}},
            "rounds": {},
        }
    },
    "compute": {
        "m3po": {"pairs": 4, "generated_tokens": 100, "judge_calls": 8, "optimizer_steps": 3, "batch_size": 4},
    },
}


def page(folder: Path, results: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return build_report(folder).read_text(encoding="utf-8")


def test_columns_say_which_way_is_better_and_what_they_mean(tmp_path: Path) -> None:
    text = page(tmp_path / "run", RESULTS)
    assert 'CHAIR_i <abbr title="lower is better">↓</abbr>' in text
    assert 'Recall <abbr title="higher is better">↑</abbr>' in text
    assert "<b>CHAIR_i</b>: share of the named objects that the image lacks (%)." in text
    assert "<b>Yes</b>" not in text, "no table has that column"
    assert 'title="better than the reference, outside both intervals"' in text
    assert "m3po beats &lt;base&gt;." in text and "No warnings." in text


def test_costs_that_an_older_version_did_not_count_are_dashes(tmp_path: Path) -> None:
    """`trained_tokens` joined the results later; without it everything else is shown."""
    text = page(tmp_path / "run", RESULTS)
    cost = text[text.index("<h3>Cost</h3>") :]
    row = cost[cost.index("<tbody>") : cost.index("</tbody>")]
    assert '<td class="num ">100</td>' in row and '<td class="num ">–</td>' in row


@pytest.mark.parametrize("part", ["seeds", "benchmarks", "compute"])
def test_a_comparison_that_cannot_be_read_is_named(tmp_path: Path, part: str) -> None:
    results = copy.deepcopy(RESULTS)
    del results[part]
    text = page(tmp_path / "run", results)
    assert 'id="comparison"' not in text and "No warnings." not in text
    assert "results.json" in text and "not what `m3po compare` writes" in text


@pytest.mark.parametrize(
    ("labels", "terms"),
    [
        (["questions Acc", "easy_vqa Acc"], ["Acc"]),
        (["CHAIR_i", "ΔC"], ["CHAIR_i", "ΔC"]),
        (["BLEU", "factual"], []),
        ([], []),
    ],
)
def test_meanings_are_those_of_the_columns_at_hand(labels: list[str], terms: list[str]) -> None:
    assert [term for term, _ in tables.meanings(labels)] == terms
