"""Every benchmark through `m3po evaluate --answers`: rows, saved answers, items, results, intervals."""

from __future__ import annotations

import json
import sys
import types

import pytest

from m3po_jax.cli import main
from m3po_jax.config import BenchmarkConfig
from m3po_jax.evaluation.registry import METRICS

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
    "pope": (
        [{"reference": truth} for truth in ("Yes", "No", "Yes", "No")],
        ["Yes", "No, it is not", "NO", "Not at all"], "accuracy", 0.75,
    ),
    "short_answer": ([{"reference": "two cats"}] * 2, ["2 cats.", "a cat"], "accuracy", 0.5),
    "chair": (
        [{"metadata": {"objects": ["dog", "bus"]}}, {"metadata": {"objects": ["cat"]}}],
        ["A dog, two buses and a cat.", "A cat with a man."], "chair_i", 0.25,
    ),
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


def folders(folder):
    """Where results of saved answers lie, oldest first."""
    return sorted((folder / "run" / "saved-answers" / "b").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def newest(folder):
    return json.loads((folders(folder)[-1] / "results.json").read_text())


@pytest.mark.parametrize("metric", sorted(CASES))
def test_saved_answers_are_scored(tmp_path, metric, capsys):
    assert main(files(tmp_path, metric)) == 0, capsys.readouterr().err
    _, answers, key, value = CASES[metric]
    (out,) = folders(tmp_path)
    results = json.loads((out / "results.json").read_text())
    assert results["summary"][key] == pytest.approx(value, abs=0.11) and results["n"] == len(answers)
    assert results["metric"] == metric and results["intervals"]
    first = next(iter(METRICS[metric].rules))
    assert results["rule"] == {"name": first, "version": METRICS[metric].rules[first]}
    assert results["summary"]["rule"] == first
    low, high = next(iter(results["intervals"].values()))
    assert low <= high
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [item["output"] for item in items] == answers and all(item["prompt"] == "What?" for item in items)


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
    results = newest(tmp_path)
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
    results = newest(tmp_path)
    assert results["summary"]["rule"] == "official"
    assert results["summary"]["hal"] == pytest.approx(0, abs=0.1), "a cat is like a dog"
    assert results["summary"]["cover"] == 50.0, "the lawn is no noun here"
    assert results["summary"]["cog"] == 50.0 and results["summary"]["similarity"] == "en_core_web_lg"


def test_the_llava_rule_is_a_setting(tmp_path):
    assert main(files(tmp_path, "vqa", rule="llava")) == 0
    results = newest(tmp_path)
    assert results["summary"]["accuracy"] == pytest.approx(0.75) and results["summary"]["rule"] == "llava"
    assert BenchmarkConfig().rule == ""


def test_other_answers_and_other_rules_leave_results_alone(tmp_path):
    arguments = files(tmp_path, "vqa")
    assert main(arguments) == 0
    (first,) = folders(tmp_path)
    before = (first / "results.json").read_bytes()
    assert main([*arguments, "evaluate.benchmarks.b.rule=llava"]) == 0
    lines = (tmp_path / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text(lines.replace("blue", "red"))
    assert main(arguments) == 0
    accuracies = [
        json.loads((path / "results.json").read_text())["summary"]["accuracy"] for path in folders(tmp_path)
    ]
    assert accuracies == [0.5, 0.75, 0.75] and (first / "results.json").read_bytes() == before
    (tmp_path / "answers.jsonl").write_text(lines)
    assert main(arguments) == 0
    assert len(folders(tmp_path)) == 3, "the same answers by the same rule are the same result"


@pytest.mark.parametrize("metric", sorted(CASES))
def test_an_unknown_rule_is_refused_and_the_known_ones_are_listed(tmp_path, metric, capsys):
    assert main(files(tmp_path, metric, rule="nonsense")) == 2
    listed = ", ".join(METRICS[metric].rules)
    message = f"m3po: evaluate.benchmarks.b.rule: unknown rule 'nonsense'; one of {listed}\n"
    assert capsys.readouterr().err == message
    assert main(["validate", *files(tmp_path, metric, rule="nonsense")[1:3]]) == 2
    assert "unknown rule 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("pope", {"vocabulary": ["dog"]}, "b.vocabulary: pope has no such setting; it is one of chair"),
        ("vqa", {"association": "x.json"}, "b.association: vqa has no such setting; it is one of amber"),
        ("chair", {"synonyms": "none.txt"}, "none.txt: cannot be read"),
        ("chair", {"rule": "vocabulary", "synonyms": "s.txt"}, "b.synonyms: rule: vocabulary reads no synonyms file"),
        ("amber", {"rule": "official"}, "b.rule: the official rule finds nouns by nltk"),
        ("amber", {"nouns": "tags"}, "b.nouns: unknown value 'tags'"),
        ("dogs", {}, "unknown value 'dogs'"),
    ],
)
def test_settings_that_a_metric_does_not_have(tmp_path, metric, settings, message, capsys):
    arguments = files(tmp_path, metric if metric in CASES else "pope", **settings)
    assert main([*arguments, f"evaluate.benchmarks.b.metric={metric}"]) == 2
    assert message in capsys.readouterr().err


def test_chair_is_official_where_the_recipe_says_so_or_names_synonyms(tmp_path, capsys):
    arguments = files(tmp_path, "chair")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert newest(tmp_path)["rule"]["name"] == "vocabulary" and "official" not in said.out
    assert "not comparable with published CHAIR" in " ".join(said.err.split())
    # A man is a person, as soon as somebody says so.
    words = "evaluate.benchmarks.b.vocabulary=['dog','bus','cat','person, man, woman']"
    assert main([*arguments, words]) == 0
    results = newest(tmp_path)
    assert results["summary"]["chair_i"] == pytest.approx(2 / 5) and "note" not in results
    assert results["summary"]["rule"] == "vocabulary"
    assert main([*arguments, "evaluate.benchmarks.b.rule=official"]) == 0
    results = newest(tmp_path)
    assert results["rule"]["name"] == "official" and results["summary"]["chair_i"] == pytest.approx(2 / 5)
    (tmp_path / "synonyms.txt").write_text("person, man, woman\ndog, puppy\nbus\ncat\n")
    assert main([*arguments, f"evaluate.benchmarks.b.synonyms={tmp_path / 'synonyms.txt'}"]) == 0
    results = newest(tmp_path)
    assert results["rule"]["name"] == "official" and "LisaAnne/Hallucination" in results["rule"]["version"]
    assert results["summary"]["chair_i"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "q0", "text": "Yes"}\n' * 2, "the id 'q0' occurs twice"),
        (
            '{"id": "q0", "text": "Yes"}\n',
            "3 labels have no answer (first id: 'q1'); there are 1 answers and 4 labels",
        ),
        ('{"id": "q0", "text": NaN}\n', "answers.jsonl:1: a line needs 'id' and 'text'"),
        ('{"id": NaN, "text": "Yes"}\n', "answers.jsonl:1: the id nan is neither text nor a whole number"),
        ('{"id": true, "text": "Yes"}\n', "answers.jsonl:1: the id True is neither text nor a whole number"),
        ('{"text": "Yes"}\n', "answers.jsonl:1: a line needs 'id' and 'text'"),
        ("", "4 labels have no answer"),
    ],
)
def test_answers_that_do_not_fit_are_one_line(tmp_path, lines, message, capsys):
    arguments = files(tmp_path, "pope")
    (tmp_path / "answers.jsonl").write_text(lines)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "saved-answers").exists()


def test_an_id_is_the_same_as_number_and_as_text(tmp_path):
    arguments = files(tmp_path, "pope")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"id": n}) + "\n" for n, row in enumerate(rows)))
    ids = ["0", 1, 2.0, "3"]
    texts = ["Yes", "No", "", "no"]
    answers = [{"id": key, "text": text} for key, text in zip(ids, texts, strict=True)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in reversed(answers)))
    assert main(arguments) == 0
    assert newest(tmp_path)["summary"]["accuracy"] == 1 and newest(tmp_path)["summary"]["unparsed"] == 1
