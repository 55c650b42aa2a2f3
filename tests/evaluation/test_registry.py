"""Every metric by its description: columns in its scores, intervals that hold them, and the page that lists it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.evaluation.registry import METRICS, intervals, score

DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = {"A": "a bus", "B": "a dog"}
AMBER = {"truth": ["dog", "grass"], "hallu": ["cat"]}
# metric -> (answers to draw from, what row n of image n // 2 has)
ROWS = {
    "pope": (["Yes", "No"], lambda n: {"reference": "Yes" if n % 2 else "No"}),
    "chair": (
        ["a dog", "a cat", "a dog and a bus", ""],
        lambda n: {"metadata": {"objects": ["dog", "bus"] if n % 4 else ["cat"]}},
    ),
    "short_answer": (["red", "blue"], lambda n: {"reference": "red"}),
    "mme": (
        ["yes", "no"],
        lambda n: {
            "reference": "Yes" if n % 2 else "No",
            "metadata": {"category": "count" if n % 4 < 2 else "code_reasoning"},
        },
    ),
    "vqa": (["red", "blue"], lambda n: {"metadata": {"answers": ["red", "blue", "red", "red"]}}),
    "mmbench": (
        ["A", "B"],
        lambda n: {"reference": "B", "metadata": {"options": OPTIONS, "index": n // 2 + n % 2 * 10**6}},
    ),
    "amber": (["A dog", "A cat on the lawn", "A cat"], lambda n: {"metadata": AMBER}),
    "amber_yes_no": (["Yes", "No"], lambda n: {"reference": "no", "metadata": {"category": "relation"}}),
    "mmhal": (["rating: 4", "rating: 1"], lambda n: {"metadata": {"category": "relation"}}),
    "llava_bench": (["8 6", "8 2"], lambda n: {"metadata": {"category": "conv"}}),
}


def scored(metric, folder, count=120):
    """(results, images) of answers drawn to `count` rows."""
    said, row = ROWS[metric]
    rng = np.random.default_rng(0)
    prompts = []
    for n in range(count):
        fields = row(n)
        metadata = {"image": f"{n // 2}.jpg"} | fields.get("metadata", {})
        prompts.append(Prompt(f"q{n}", "What?", (), reference=fields.get("reference"), metadata=metadata))
    answers = [{"id": p.id, "text": str(rng.choice(said)), "tokens": int(rng.integers(5))} for p in prompts]
    (folder / "relation.json").write_text('{"dog": [], "cat": [], "grass": ["lawn"]}')
    association = str(folder / "relation.json") if metric == "amber" else ""
    results = score(prompts, answers, BenchmarkConfig(metric=metric, association=association))
    return results, [str(prompt.metadata["image"]) for prompt in prompts]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_columns_are_in_the_summary_and_their_intervals_hold_them(name, tmp_path):
    metric = METRICS[name]
    results, images = scored(name, tmp_path)
    spans = intervals(metric, results["items"], images, 300, 0)
    assert list(spans) == [column.key for column in metric.drawn]
    for column in metric.drawn:
        low, high = spans[column.key]
        assert low < results["summary"][column.key] < high, column.key
        again = metric.values(results["items"])[column.key]
        assert again == pytest.approx(results["summary"][column.key], abs=0.06), "AMBER's summary is rounded"
    assert results["summary"]["rule"] in metric.rules and results["rule"]["version"]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_descriptions_are_complete(name):
    metric = METRICS[name]
    keys = [column.key for column in metric.columns]
    assert len(set(keys)) == len(keys) and set(metric.deciding) <= set(keys) and metric.deciding
    assert all(metric.column(key).better in ("higher", "lower") for key in metric.deciding)
    assert all(column.meaning for column in metric.columns)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_nothing_is_scored_without_a_crash(name, tmp_path):
    results, _ = scored(name, tmp_path, 0)
    assert results["items"] == [] and results["summary"]["degenerate"]
    assert intervals(METRICS[name], [], [], 10, 0) == {}


def test_the_documentation_lists_what_there_is():
    spec = importlib.util.spec_from_file_location("make_metrics", DOCS / "make_metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "evaluation.md").read_text(encoding="utf-8") == module.page(), "run python docs/make_metrics.py"
