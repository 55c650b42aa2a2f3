"""Published benchmarks from their own files, through the command that a user types."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from m3po_jax.cli import main
from m3po_jax.config import DataConfig
from m3po_jax.data.sources import read_prompts
from m3po_jax.evaluation.chair import coco_vocabulary
from m3po_jax.evaluation.metric import image_of
from m3po_jax.evaluation.published import PUBLISHED
from m3po_jax.evaluation.registry import METRICS

DATA = Path(os.environ.get("M3PO_SHARED", Path(__file__).parents[2] / "../shared")).resolve() / "data"
needs_data = pytest.mark.skipif(not (DATA / "pope").is_dir(), reason="the shared data are not here")
QUESTIONS = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {
        "question_id": 2,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "Is there a cat in the image?",
        "label": "no",
    },
    {
        "question_id": 3,
        "image": "COCO_val2014_000000000073.jpg",
        "text": "Is there a bus in the image?",
        "label": "yes",
    },
    {
        "question_id": 4,
        "image": "COCO_val2014_000000000073.jpg",
        "text": "Is there a cup in the image?",
        "label": "no",
    },
]
TEXTS = ["Yes, there is.", "There is no cat", "no", "Yes"]  # right, right, wrong, wrong


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def array(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def results(output: str = "out") -> dict[str, Any]:
    return json.loads(Path(output, "results.json").read_text(encoding="utf-8"))


def evaluate(benchmark: str, answers: Path, *references: Path, **options: str) -> int:
    more = [word for name, value in {"output": "out", **options}.items() for word in (f"--{name}", value)]
    given = ["--references", *map(str, references)] if references else []
    return main(["evaluate", "--benchmark", benchmark, "--answers", str(answers), *given, *more])


@pytest.mark.parametrize("write", [lines, array])
@pytest.mark.parametrize(
    "answers",
    [
        [{"question": row["text"], "answer": text} for row, text in zip(QUESTIONS, TEXTS, strict=True)],
        [{"question_id": 4 - k, "prompt": "x", "text": TEXTS[3 - k], "model_id": "m"} for k in range(4)],
        [{"id": str(k + 1), "text": TEXTS[k]} for k in range(4)],
    ],
    ids=["of POPE, in order", "of LLaVA, in another order", "ours"],
)
def test_pope_takes_its_own_files(tmp_path: Path, write: Any, answers: list[dict[str, Any]], capsys: Any) -> None:
    questions = write(tmp_path / "coco_pope_random.json", QUESTIONS)
    assert evaluate("pope", write(tmp_path / "answers.json", answers), questions) == 0
    summary = results()["summary"]
    assert (summary["accuracy"], summary["tp"], summary["fp"], summary["tn"], summary["fn"]) == (0.5, 1, 1, 1, 1)
    assert list(results()["categories"]) == ["random"] and results()["rule"]["name"] == "official"
    shown = capsys.readouterr().out
    assert "| Acc " in shown and "50.0" in shown and "rule official: evaluate.py of RUCAIBox/POPE" in shown
    items = [json.loads(line) for line in Path("out/items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [item["correct"] for item in items] == [True, True, False, False]


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (
            [{"question": row["text"], "answer": "yes"} for row in QUESTIONS[:3]],
            "3 answers without ids to 4 questions",
        ),
        (
            [{"question": row["text"], "answer": "yes"} for row in (QUESTIONS[1], QUESTIONS[0], *QUESTIONS[2:])],
            "jsonl:1: answers 'Is there a cat in the image?', and the question in its place is 'Is there a dog",
        ),
        ([{"question_id": k, "text": "yes"} for k in (1, 2, 3, 5)], "1 labels have no answer (first id: '4')"),
        ([{"question_id": k, "text": "yes"} for k in (1, 2, 3, 3)], "the id '3' occurs twice"),
        ([{"question_id": 1, "text": "yes"}, {"text": "no"}], "answers.jsonl:2: some answers have an id and others"),
        ([{"question_id": k, "text": 1} for k in (1, 2, 3, 4)], "answers.jsonl:1: the answer must be text, not int"),
        (QUESTIONS, "answers.jsonl: holds questions with their labels, not answers"),
        ([{"question_id": 1}], "answers.jsonl:1: a record needs 'answer' or 'text'"),
    ],
)
def test_answers_that_do_not_fit_are_one_line(tmp_path: Path, answers: Any, line: str, capsys: Any) -> None:
    questions = lines(tmp_path / "questions.json", QUESTIONS)
    assert evaluate("pope", lines(tmp_path / "answers.jsonl", answers), questions) == 2
    assert line in capsys.readouterr().err and not Path("out").exists()


def test_unknown_names_list_what_exists(tmp_path: Path, capsys: Any) -> None:
    questions = lines(tmp_path / "questions.json", QUESTIONS)
    answers = lines(tmp_path / "answers.jsonl", [{"question_id": k + 1, "text": TEXTS[k]} for k in range(4)])
    assert evaluate("pope", answers, questions, rule="nonsense") == 2
    assert "--rule: pope has no rule 'nonsense'; one of official" in capsys.readouterr().err
    assert evaluate("popes", answers, questions) == 2
    assert "--benchmark: unknown benchmark 'popes' (did you mean 'pope'?)" in capsys.readouterr().err
    assert evaluate("pope", answers) == 2
    assert "--references: pope needs them" in capsys.readouterr().err
    assert evaluate("pope", answers, tmp_path / "absent.json") == 2
    assert "absent.json: no such file" in capsys.readouterr().err
    assert main(["evaluate", "--references", str(questions)]) == 2
    assert "--references: goes with saved answers" in capsys.readouterr().err


def test_a_recipe_of_overrides_alone_stays_a_recipe(tmp_path: Path, capsys: Any) -> None:
    rows = [{"id": row["question_id"], "question": row["text"], "reference": row["label"]} for row in QUESTIONS]
    answers = lines(tmp_path / "a.jsonl", [{"id": k + 1, "text": TEXTS[k]} for k in range(4)])
    path = lines(tmp_path / "rows.jsonl", rows)
    command = [
        "evaluate",
        "--answers",
        str(answers),
        f"evaluate.benchmarks.mine={{metric: pope, data: {{path: {path}}}}}",
    ]
    assert main(command) == 0
    assert '"accuracy": 0.5' in capsys.readouterr().out
    assert main([*command, "--rule", "official"]) == 2
    assert "published files need no recipe" in capsys.readouterr().err


def test_other_results_stay(tmp_path: Path, capsys: Any) -> None:
    questions = lines(tmp_path / "questions.json", QUESTIONS)
    first = lines(tmp_path / "a.jsonl", [{"question_id": k + 1, "text": TEXTS[k]} for k in range(4)])
    second = lines(tmp_path / "b.jsonl", [{"question_id": k + 1, "text": "yes"} for k in range(4)])
    assert evaluate("pope", first, questions) == evaluate("pope", first, questions) == 0
    before = results()
    assert evaluate("pope", second, questions) == 2
    assert "out: holds other results, which stay" in capsys.readouterr().err and results() == before
    command = ["evaluate", "--benchmark", "pope", "--references", str(questions), "--answers"]
    assert main([*command, str(first)]) == main([*command, str(second)]) == 0
    assert len(list(Path("evaluations").iterdir())) == 2
    assert set(before["files"]) == {str(first), str(questions)} and all(
        len(h) == 64 for h in before["files"].values()
    )


COCO = {
    "images": [{"id": 42}, {"id": 73}, {"id": 99}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 67, "name": "dining table"}],
    "annotations": [{"image_id": 42, "category_id": 18}, {"image_id": 42, "category_id": 67}],
}
REFERENCE_CAPTIONS = {
    "images": [{"id": 42}, {"id": 73}],
    "annotations": [{"image_id": 42, "caption": "A puppy near a cup."}, {"image_id": 73, "caption": "Two buses."}],
}


@pytest.mark.parametrize(
    "captions",
    [
        [{"image_id": 42, "caption": "A dog and a cat at a desk."}, {"image_id": 73, "caption": "Nothing."}],
        [
            {"image": "COCO_val2014_000000000042.jpg", "text": "A dog and a cat at a desk."},
            {"image": "COCO_val2014_000000000073.jpg", "text": "Nothing."},
        ],
    ],
)
def test_chair_reads_coco_with_its_words(tmp_path: Path, captions: Any, capsys: Any) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    array(folder / "instances_val2014.json", COCO)
    answers = lines(tmp_path / "captions.jsonl", captions)
    assert evaluate("chair", answers, folder, output="instances") == 0
    assert "published CHAIR adds those that the reference captions name" in capsys.readouterr().out
    array(folder / "captions_val2014.json", REFERENCE_CAPTIONS)
    assert evaluate("chair", answers, folder) == 0
    assert "Note: objects" not in capsys.readouterr().out
    summary = results()["summary"]
    # dog, cat and dining table (a desk) are named; cat is wrong; of dog, table, cup and bus two are named.
    assert (summary["mentions"], summary["hallucinated_mentions"], summary["rule"]) == (3, 1, "official")
    assert summary["recall"] == pytest.approx(2 / 4)
    assert results("instances")["summary"]["recall"] == pytest.approx(2 / 2)
    assert evaluate("chair", answers, folder, rule="vocabulary", output="plain") == 0
    assert "not comparable with published CHAIR" in capsys.readouterr().out
    absent = lines(tmp_path / "more.jsonl", [*captions, {"image_id": 5, "caption": "A dog."}])
    assert evaluate("chair", absent, folder, output="more") == 2
    assert "more.jsonl:3: 1 captions are of images that the references lack" in capsys.readouterr().err


def test_the_words_of_coco_ship() -> None:
    words = coco_vocabulary()
    assert len(words.objects) == 80
    assert words.mentions("A puppy on a sofa, two men, a motorbike and a bus; buses.") == [
        *("dog", "couch", "person", "motorcycle", "bus")
    ]


@needs_data
def test_the_words_of_coco_are_the_authors() -> None:
    lines_of_theirs = (DATA / "coco/synonyms.txt").read_text(encoding="utf-8").splitlines()
    assert coco_vocabulary().terms == coco_vocabulary(lines_of_theirs).terms


@needs_data
@pytest.mark.parametrize("name", ["llava_i1_short", "llava_i2_brief", "mplug_owl_i1_short", "mplug_owl_i2_brief"])
def test_chair_reproduces_the_published_table(name: str, tmp_path: Path) -> None:
    """Table 1 of POPE's paper (arXiv:2305.10355), to the printed digit."""
    captions = DATA / "pope/captions"
    assert evaluate("chair", captions / f"{name}.jsonl", DATA / "coco/objects_2014.json.gz") == 0
    published = json.loads((captions / "expected.json").read_text(encoding="utf-8"))["files"][f"{name}.jsonl"]
    for key in ("chair_i", "chair_s"):
        assert round(100 * results()["summary"][key], 1) == published["paper"][key]


@needs_data
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_reads_the_released_questions(split: str, tmp_path: Path) -> None:
    questions = DATA / "pope" / f"coco_pope_{split}.json"
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    answers = [{"question": row["text"], "answer": "Yes"} for row in rows]
    assert evaluate("pope", lines(tmp_path / "yes.jsonl", answers), questions) == 0
    assert results()["summary"]["accuracy"] == 0.5 and list(results()["categories"]) == [split]


def test_vqa_takes_annotations_and_results(tmp_path: Path, capsys: Any) -> None:
    people = [{"answer": text, "answer_id": k} for k, text in enumerate(["2"] * 6 + ["two"] * 2 + ["3"] * 2)]
    annotation = {
        "question_id": 7,
        "image_id": 42,
        "answers": people,
        "question_type": "how many",
        "answer_type": "number",
    }
    annotations = array(tmp_path / "v2_annotations.json", {"annotations": [annotation]})
    questions = array(tmp_path / "v2_questions.json", {"questions": [{"question_id": 7, "question": "How many?"}]})
    answers = array(tmp_path / "results.json", [{"question_id": 7, "answer": "3"}])
    assert evaluate("vqav2", answers, annotations, questions) == 0
    # Two of ten said 3: leave-one-out means of min(1, others / 3) are 1/3 twice and 2/3 eight times.
    assert results()["summary"]["accuracy"] == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert results()["categories"]["number"]["n"] == 1
    assert evaluate("vqav2", answers, questions) == 2
    assert "no annotations of VQA" in capsys.readouterr().err


def write_mme(folder: Path, rows: list[str]) -> Path:
    folder.mkdir()
    (folder / "existence.txt").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return folder


def test_mme_takes_its_result_folder(tmp_path: Path, capsys: Any) -> None:
    asked = ["Is there a dog? Please answer yes or no.", "Is there a cat? Please answer yes or no."]
    rows = [f"a.jpg\t{asked[0]}\tYes\tYes", f"a.jpg\t{asked[1]}\tNo\tno.", f"b.jpg\t{asked[0]}\tYes\tno"]
    answers = write_mme(tmp_path / "results", [*rows, f"b.jpg\t{asked[1]}\tNo\tNo"])
    assert evaluate("mme", answers) == 0
    assert results()["summary"]["perception"] == pytest.approx(75 + 50)
    released = tmp_path / "MME_Benchmark_release_version" / "existence"
    released.mkdir(parents=True)
    for image in ("a", "b"):
        (released / f"{image}.txt").write_text(f"{asked[0]}\tYes\n{asked[1]}\tNo\n", encoding="utf-8")
    assert evaluate("mme", answers, released.parent, output="checked") == 0
    (released / "b.txt").write_text(f"{asked[0]}\tNo\n{asked[1]}\tNo\n", encoding="utf-8")
    assert evaluate("mme", answers, released.parent, output="other") == 2
    assert "existence.txt:3: says that Yes is right, and MME that no is" in capsys.readouterr().err
    broken = write_mme(tmp_path / "broken", ["a.jpg\tIs it?\tYes"])
    assert evaluate("mme", broken, output="broken-out") == 2
    assert "existence.txt:1: 3 columns between tabs, not 4" in capsys.readouterr().err


def test_amber_takes_its_folder_and_one_file_of_responses(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    array(
        folder / "annotations.json",
        [
            {"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["cat"]},
            {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
            {"id": 1006, "type": "discriminative-hallucination", "truth": "no"},
        ],
    )
    array(folder / "relation.json", {"dog": ["puppy"], "cat": [], "grass": []})
    (folder / "safe_words.txt").write_text("image\n", encoding="utf-8")
    responses = [
        {"id": 1, "response": "A dog and a cat."},
        {"id": 1005, "response": "Yes"},
        {"id": 1006, "response": "No"},
    ]
    answers = array(tmp_path / "responses.json", responses)
    assert evaluate("amber", answers, folder) == 0
    summary = results()["summary"]
    assert (summary["n"], summary["hal"], summary["nouns"], summary["rule"]) == (
        1,
        100.0,
        "vocabulary",
        "approximate",
    )
    assert evaluate("amber_yes_no", answers, folder, output="questions") == 0
    assert results("questions")["summary"]["accuracy"] == 100.0


def test_mmbench_takes_its_table(tmp_path: Path) -> None:
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"
    row = "241\tWhat is it?\tnan\ta dog\ta cat\tnan\t\tB\tobject\tiVBORw0KGgo="
    table = tmp_path / "MMBench.tsv"
    table.write_text(f"{head}\n{row}\n", encoding="utf-8")
    answers = lines(tmp_path / "answers.jsonl", [{"index": 241, "prediction": "B. a cat"}])
    assert evaluate("mmbench", answers, table) == 0
    assert results()["summary"]["accuracy"] == 1.0
    assert evaluate("mmbench", answers, table, rule="vlmevalkit", output="theirs") == 0
    assert "VLMEvalKit" in results("theirs")["rule"]["version"]


def test_the_list_names_files_and_rules(capsys: Any) -> None:
    assert main(["evaluate", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, published in PUBLISHED.items():
        assert f"{name}\n  --references  {published.references}\n" in shown and published.source in shown
        assert all(f"{rule}: {whose}" in shown for rule, whose in METRICS[published.metric].rules.items())


def test_pope_questions_are_prompt_sources_as_they_are(tmp_path: Path) -> None:
    path = lines(tmp_path / "coco_pope_random.json", QUESTIONS)
    rows = list(read_prompts(DataConfig(path=str(path))))
    assert [row.reference for row in rows] == ["yes", "no", "yes", "no"] and rows[0].id == "1"
    assert rows[0].instruction == QUESTIONS[0]["text"]
    assert [image_of(row) for row in rows] == [row["image"] for row in QUESTIONS]
    words = lines(tmp_path / "words.json", [{"question_id": 1, "text": "What?", "label": "dog"}])
    assert [row.reference for row in read_prompts(DataConfig(path=str(words)))] == [None]
