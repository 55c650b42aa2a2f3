"""Every benchmark through `m3po evaluate --answers`: rows, saved answers, items, results, intervals."""

from __future__ import annotations

import json
import sys
import types

import pytest

from m3po_jax.cli import main
from m3po_jax.config import BenchmarkConfig
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.pipeline.summary import COLUMNS

OPTIONS = {"A": "a bus", "B": "a dog"}
AMBER = {"truth": ["dog", "grass"], "hallu": ["cat"]}
# metric -> (rows' further fields, answers, summary key, its value)
CASES = {
    "mme": (
        [{"reference": truth, "metadata": {"category": "count", "image": f"{i // 2}.jpg"}}
         for i, truth in enumerate(["Yes", "No"] * 6)],
        ["Yes", "No", "No", "No"] * 3, "perception", 75 + 50,
    ),
    "vqa": (
        [{"metadata": {"answers": ["red"] * 10, "category": "other"}}] * 4,
        ["red", "Red", "blue", "red"], "accuracy", 0.5,
    ),
    "mmbench": (
        [{"reference": "B", "metadata": {"options": OPTIONS, "index": i}} for i in (1, 1_000_001, 2, 1_000_002)],
        ["B", "B.", "a dog", "A"], "accuracy", 0.5,
    ),
    "amber_yes_no": (
        [{"reference": truth, "metadata": {"category": "relation"}} for truth in ("no", "no", "yes", "yes")],
        ["No", "Yes", "Yes", "yes"], "accuracy", 50.0,
    ),
    "amber": ([{"metadata": AMBER}] * 2, ["A dog and a cat.", "A dog on the lawn."], "hal", 50.0),
    "mmhal": ([{"metadata": {"category": "relation"}}] * 2, ["rating: 4", "rating: 1"], "hallucination_rate", 0.5),
    "llava_bench": ([{"metadata": {"category": "conv"}}] * 2, ["8 6", "8 2"], "score", 50.0),
}  # fmt: skip


def files(folder, metric, **settings):
    """A recipe, its rows and answers."""
    more, answers, _, _ = CASES[metric]
    rows = [{"id": f"q{i}", "instruction": "What?", "images": []} | own for i, own in enumerate(more)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps({"id": f"q{i}", "text": text}) + "\n" for i, text in enumerate(answers))
    )
    (folder / "relation.json").write_text(json.dumps({"dog": [], "cat": [], "grass": ["lawn"]}))
    benchmark = {"metric": metric, "data": {"path": str(folder / "rows.jsonl")}, **settings}
    if metric == "amber":
        benchmark |= {"association": str(folder / "relation.json")}
    recipe = {"output_dir": str(folder), "evaluate": {"benchmarks": {"b": benchmark}, "bootstrap_samples": 50}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["evaluate", "--config", str(folder / "recipe.yaml"), "--answers", str(folder / "answers.jsonl")]


@pytest.mark.parametrize("metric", sorted(CASES))
def test_saved_answers_are_scored(tmp_path, metric, capsys):
    assert main(files(tmp_path, metric)) == 0, capsys.readouterr().err
    _, answers, key, value = CASES[metric]
    out = tmp_path / "run" / "saved-answers" / "b"
    results = json.loads((out / "results.json").read_text())
    assert results["summary"][key] == pytest.approx(value, abs=0.11) and results["n"] == len(answers)
    assert results["metric"] == metric and results["intervals"]
    low, high = next(iter(results["intervals"].values()))
    assert low <= high
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [item["output"] for item in items] == answers and all(item["prompt"] == "What?" for item in items)


def test_every_metric_but_a_judge_s_has_columns():
    assert set(COLUMNS) == {name for name, metric in METRICS.items() if not metric.judged}


def test_rows_that_lack_something_are_named(tmp_path, capsys):
    arguments = files(tmp_path, "mmbench")
    (tmp_path / "rows.jsonl").write_text('{"id": "q0", "instruction": "What?", "images": [], "reference": "B"}\n')
    assert main(arguments) == 2
    assert "metadata.options is missing; mmbench: the metric needs it as a mapping" in capsys.readouterr().err


def test_reviews_are_no_benchmark_of_a_run(tmp_path, capsys):
    arguments = files(tmp_path, "mmhal")
    assert main(["run", *arguments[1:3]]) == 2
    assert "mmhal scores a judge's reviews, which a run does not write" in capsys.readouterr().err


def test_amber_s_models_are_named_or_refused(tmp_path, capsys, monkeypatch):
    arguments = files(tmp_path, "amber")
    assert main(arguments) == 0
    results = json.loads((tmp_path / "run" / "saved-answers" / "b" / "results.json").read_text())
    assert (results["summary"]["nouns"], results["summary"]["similarity"]) == ("vocabulary", "exact")
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    for setting, name in (
        ("similarity=en_core_web_lg", "spaCy's 'en_core_web_lg' cannot be loaded"),
        ("nouns=nltk", "nltk"),
    ):
        assert main([*arguments, f"evaluate.benchmarks.b.{setting}"]) == 2
        assert name in capsys.readouterr().err

    # With the libraries there, they are what finds nouns and compares words.
    class Doc(str):
        def similarity(self, other):
            return 0.9 if {str(self), str(other)} == {"cat", "dog"} else float(self == other)

    spacy = types.SimpleNamespace(load=lambda model: Doc)
    nltk = types.ModuleType("nltk")
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [
        (word, "NNS" if word.strip(".").endswith(("dog", "cat")) else "DT") for word in words
    ]
    stem = types.ModuleType("nltk.stem")
    stem.WordNetLemmatizer = lambda: types.SimpleNamespace(lemmatize=lambda word: word.strip("."))
    for name, module in (("spacy", spacy), ("nltk", nltk), ("nltk.stem", stem)):
        monkeypatch.setitem(sys.modules, name, module)
    changes = ["evaluate.benchmarks.b.similarity=en_core_web_lg", "evaluate.benchmarks.b.nouns=nltk"]
    assert main([*arguments, *changes]) == 0
    results = json.loads((tmp_path / "run" / "saved-answers" / "b" / "results.json").read_text())
    assert results["summary"]["hal"] == pytest.approx(0, abs=0.1), "a cat is like a dog"
    assert results["summary"]["cover"] == 50.0, "the lawn is no noun here"
    assert results["summary"]["cog"] == 50.0 and results["summary"]["similarity"] == "en_core_web_lg"


def test_the_llava_rule_is_a_setting(tmp_path):
    assert main(files(tmp_path, "vqa", rule="llava")) == 0
    results = json.loads((tmp_path / "run" / "saved-answers" / "b" / "results.json").read_text())
    assert results["summary"]["accuracy"] == pytest.approx(0.75) and results["summary"]["rule"] == "llava"
    assert BenchmarkConfig().rule == ""
