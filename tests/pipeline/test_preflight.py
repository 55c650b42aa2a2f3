"""What would fail after hours is told by `m3po validate`, and by a run before its first stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mini_run import write_data, write_recipe

from m3po_jax.cli import main

sys.path.append(str(Path(__file__).parents[1] / "models"))
import hf_gemma3
import hf_idefics3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    return write_recipe(folder, write_data(folder / "data"))


def told(capsys: pytest.CaptureFixture[str], recipe: Path, *overrides: str) -> list[str]:
    """The problems that validate prints."""
    capsys.readouterr()
    assert main(["validate", "--config", str(recipe), *overrides]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3po: ")]
    assert "in all" in lines[-1] or len(lines) == 1
    return lines[:-1] if len(lines) > 1 else lines


LATE = [
    (["score.backend=judge", "score.model="], "score.grades: grade 1 is not one token"),
    (["score.model=builtin:quickstart-base"], "not a dual encoder"),
    (["score.backend=judge", "score.model=builtin:quickstart-scorer"], "not a vision-language model"),
    (["score.backend=ensemble", "score.members=[claims]"], "at least two members"),
    (["score.backend=reward", "score.model=/no/reward"], "no trained reward model"),
    (["score.backend=claims", "score.model=", "score.judge_template=what"], "no {claim}"),
    (["train.lora.target_modules=[q_porj]"], "no layer is named q_porj"),
    (["train.lora.lora_rank=0", "train.freeze=[decodr]"], "did you mean 'decoder'"),
    (["generate.suppress_tokens=[999999]"], "the model has 192 tokens, no 999999"),
    (["evaluate.stop_words=[elephants walk]"], "is 2 tokens, not one"),
    (["generate.num_candidates=4096", "generate.batch_size=1000000"], "generate.batch_size: the weights and 1000000"),
    (["train.lora.lora_rank=65536", "train.keep_checkpoints=1000000"], "checkpoints may take"),
    (["mesh.data=-1", "mesh.fsdp=-1"], "at most one of them may be -1"),
    (["train.weights=ema"], "no moving average is kept"),
    (["train.gradient_accumulation_steps=3"], "does not divide into 3 parts"),
    (["output_dir="], "output_dir: no folder for runs"),
    (["output_dir=/proc/none"], "/proc: cannot be written"),
    (["reward.pairs=/no/pairs", "arms={rm_dpo: {}}"], "/no/pairs"),
    (["evaluate.benchmarks.v={metric: vqa}"], "evaluate.benchmarks.v.data.path: no questions"),
    (["arms={sft: {train.max_answer_tokens: 20}}", "train.max_answer_tokens=20", "train.data=[]"], None),
]


@pytest.mark.parametrize(("overrides", "line"), LATE, ids=[str(overrides[0]) for overrides, _ in LATE])
def test_late_failures_are_found_first(recipe, capsys, overrides, line):
    if line is None:
        assert main(["validate", "--config", str(recipe), *overrides]) == 0
        return
    problems = told(capsys, recipe, *overrides)
    assert len(problems) == 1 and line in problems[0], problems


def test_an_output_directory_that_is_a_file(recipe, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (problem,) = told(capsys, recipe, f"output_dir={tmp_path / 'file'}")
    assert "a file, not a folder" in problem
    assert "output_dir: has no value" in told(capsys, recipe, "output_dir=null")[0]


def edited(tmp_path: Path, number: int, **changes: object) -> Path:
    """The mini recipe on data whose row `number` is changed; None takes a field away."""
    data = write_data(tmp_path / "data")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for name, value in changes.items():
        lines[number][name] = value
        if value is None:
            del lines[number][name]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_recipe(tmp_path, data, evaluate={"benchmarks": {}})


@pytest.mark.parametrize(
    ("value", "line"), [(None, "the row has no reference answer"), (" ", "the reference answer is empty")]
)
@pytest.mark.parametrize("way", ["train.objective=sft", "arms={sft: {}}"])
def test_references_of_sft(tmp_path, capsys, value, line, way):
    recipe = edited(tmp_path, 2, reference=value)
    (problem,) = told(capsys, recipe, way)
    assert line in problem and "prompts.jsonl:3" in problem
    if way == "train.objective=sft":
        assert main(["train", "--config", str(recipe), way]) == 2
        assert line in capsys.readouterr().err


def test_answers_beyond_the_limit_of_training(recipe, capsys):
    problems = told(capsys, recipe, "train.objective=sft", "train.max_answer_tokens=3", "arms={}")
    assert len(problems) == 12 and all("more than train.max_answer_tokens = 3" in line for line in problems)


@pytest.mark.parametrize("objects", [3, "cat", [1, 2], [{"name": "cat"}], {"cat": 1}])
def test_objects_of_another_shape(tmp_path, capsys, objects):
    """Where they count they are refused by row; where they only calibrate, other programs' `objects` do no harm."""
    recipe = edited(tmp_path, 2, metadata={"objects": objects, "kind": "caption"})
    (problem,) = told(capsys, recipe, "score.backend=reference")
    assert "prompts.jsonl:3" in problem and "metadata.objects is not a list of texts" in problem
    assert main(["validate", "--config", str(recipe)]) == 0
    capsys.readouterr()
    chair = f"evaluate.benchmarks.c={{metric: chair, kind: caption, data: {{path: {tmp_path}/data/prompts.jsonl}}}}"
    assert told(capsys, recipe, chair)


def test_questions_of_benchmarks_are_read_as_the_model_will(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    questions = tmp_path / "questions.jsonl"
    row = {"id": "x", "images": ["broken.png"], "instruction": "Is there a dog?", "reference": "yes"}
    questions.write_text(json.dumps(row))
    (tmp_path / "broken.png").write_bytes(b"no image")
    benchmark = f"evaluate.benchmarks={{b: {{metric: pope, data: {{path: {questions}}}}}}}"
    (problem,) = told(capsys, write_recipe(tmp_path, data), benchmark)
    assert "questions.jsonl:1 (id 'x')" in problem


def test_a_run_stops_before_its_first_stage(recipe, capsys):
    assert main(["run", "--config", str(recipe), "name=late", "train.lora.target_modules=[q_porj]"]) == 2
    assert "no layer is named q_porj" in capsys.readouterr().err
    assert not (recipe.parent / "runs" / "late").exists()


def test_a_judge_of_another_family_is_checked_as_it_is_asked(recipe, tmp_path, capsys):
    """Crops are of the policy's family alone, and so is its template."""
    hf_gemma3.saved(tmp_path / "gemma")
    hf_idefics3.saved("smolvlm", tmp_path / "smolvlm")
    model = [f"model.path={tmp_path / 'gemma'}", "model.template=chat", "model.pan_and_scan=true", "arms={}"]
    judge = ["score.backend=claims", f"score.model={tmp_path / 'smolvlm'}", "score.aggregate=mean"]
    assert main(["validate", "--config", str(recipe), *model, *judge]) == 0, capsys.readouterr().err
