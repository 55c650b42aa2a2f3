"""What a user can get wrong is one line that names the place and the remedy, with exit status 2."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mini_run import write_data, write_recipe
from PIL import Image

from m3po_jax.cli import main
from m3po_jax.data import tables

Lines = list[dict]


def edit(path: Path, change: Callable[[Lines], object]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3po: ")]
    assert len(lines) == 1
    return lines[0]


def run_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Lines], object] | None, *more: str
) -> str:
    data = write_data(tmp_path / "data", 12)
    if change is not None:
        edit(data, change)
    return refused(capsys, "generate", "--config", str(write_recipe(tmp_path, data)), *more)


def test_missing_image(tmp_path, capsys):
    line = run_with(tmp_path, capsys, lambda rows: rows[9].update(images=["nowhere.png"]))
    assert "prompts.jsonl:10 (id 'q6')" in line and "nowhere.png" in line


def test_path_outside_the_image_root(tmp_path, capsys):
    line = run_with(tmp_path, capsys, lambda rows: rows[2].update(images=["../../etc/passwd"]))
    assert "prompts.jsonl:3" in line and "outside" in line


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n truncated"])
def test_broken_image_keeps_finished_shards(tmp_path, capsys, content):
    data = write_data(tmp_path / "data", 12)
    (tmp_path / "data" / "010.png").write_bytes(content)
    line = refused(capsys, "generate", "--config", str(write_recipe(tmp_path, data)))
    assert "prompts.jsonl:15 (id 's10')" in line
    done = tables.shards(tmp_path / "runs" / "mini" / "round-1" / "candidates")
    assert [path.name[:5] for path in done] == ["00000", "00001", "00002"]


def test_truncated_image(tmp_path, capsys):
    data = write_data(tmp_path / "data", 12)
    path = tmp_path / "data" / "001.png"
    path.write_bytes(path.read_bytes()[:2000])
    line = refused(capsys, "generate", "--config", str(write_recipe(tmp_path, data)))
    assert "(id 's1')" in line and "damaged" in line


def test_oversized_image_is_refused_before_it_is_decoded(tmp_path, capsys):
    data = write_data(tmp_path / "data", 12)
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    (tmp_path / "data" / "002.png").write_bytes(buffer.getvalue())
    line = refused(capsys, "generate", "--config", str(write_recipe(tmp_path, data)))
    assert "(id 's2')" in line and "9000 x 9000" in line


def test_empty_instruction(tmp_path, capsys):
    line = run_with(tmp_path, capsys, lambda rows: rows[4].update(instruction="  "))
    assert "prompts.jsonl:5 (id 's3')" in line and "instruction" in line


def test_row_without_an_image(tmp_path, capsys):
    line = run_with(tmp_path, capsys, lambda rows: rows[1].pop("images"))
    assert "prompts.jsonl:2 (id 'q0')" in line and "image" in line


def test_over_long_prompt_is_not_truncated(tmp_path, capsys):
    change = lambda rows: rows[5].update(instruction="dog " * 2000)  # noqa: E731
    line = run_with(tmp_path, capsys, change)
    assert "prompts.jsonl:6" in line and "model.max_prompt_tokens = 1024" in line


def test_malformed_line(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    data.write_text(data.read_text() + '{"id": "x", \n')
    line = refused(capsys, "generate", "--config", str(write_recipe(tmp_path, data)))
    assert "prompts.jsonl:17" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lerning_rate=1", "'train.lerning_rate' (did you mean 'learning_rate'?)"),
        ("trian.beta=1", "'trian' (did you mean 'train'?)"),
        ("train.beta=much", "train.beta"),
        ("select.rule=best", "select.rule"),
        ("train.loss_type=sigmod", "sigmoid"),
        ("model.path=/no/such/model", "/no/such/model"),
        ("data.path=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("score.backend=magic", "magic"),
        ("mesh.fsdp=3", "mesh"),
        ("generate.top_p=0", "generate.top_p"),
        ("rounds=0", "rounds"),
        ("train.beta=", "train.beta: '' is not a number; it takes a number in (0, 1e+09]"),
        ("train.beta=[1", "'train.beta=[1': the value is not valid YAML; quote it"),
        ("train=3", "train: '3' is not a section; set keys of it, like train.objective"),
        ("compare.seeds=3", "compare.seeds: '3' is not a list; write [a, b]"),
        ("name=../other", "name: '../other' is not a folder's name"),
        ("output_dir=/proc/none", "/proc/none/mini: cannot write to the run directory (No such file"),
    ],
)
def test_bad_settings(tmp_path, capsys, override, expected):
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data"))
    assert expected in refused(capsys, "generate", "--config", str(recipe), override)


def test_missing_recipe_and_bad_yaml(tmp_path, capsys):
    assert "no such recipe" in refused(capsys, "run", "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("train: [1,")
    assert "not valid YAML" in refused(capsys, "run", "--config", str(tmp_path / "bad.yaml"))


def test_a_folder_or_a_list_is_no_recipe(tmp_path, capsys):
    assert "a folder, not a recipe" in refused(capsys, "run", "--config", str(tmp_path))
    (tmp_path / "list.yaml").write_text("- train")
    assert "a mapping of keys to values" in refused(capsys, "run", "--config", str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(
    ("verb", "number", "remedy"),
    [("generate", "0", "at least 1"), ("evaluate", "-1", "at least 0"), ("export", "0", "at least 1")],
)
def test_rounds_begin_with_one(tmp_path, capsys, verb, number, remedy):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    assert f"--round: no round {number}; {remedy}" in refused(capsys, verb, "--config", recipe, "--round", number)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--round", "2"], "round 2: no finished training; run `m3po train` first"),
        (["--round", "1", "--arm", "sft"], "no finished training; run `m3po train` first"),
        (["--benchmark", "scenes"], "--benchmark: says which benchmark --answers belongs to; give --answers FILE"),
    ],
)
def test_the_base_is_not_evaluated_in_place_of_a_system_that_is_named(tmp_path, capsys, words, expected):
    data = write_data(tmp_path / "data")
    recipe = str(write_recipe(tmp_path, data))
    keys = [
        "arms.sft={train.objective: sft}",
        f"evaluate.benchmarks.scenes={{metric: short_answer, data: {{path: {data}}}}}",
    ]
    assert expected in refused(capsys, "evaluate", "--config", recipe, *words, *keys)


def test_select_wants_rows(tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    files = ["--input", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]
    assert "none.jsonl: no row; one scored candidate a line" in refused(capsys, "select", *files)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_saved_answers_belong_to_one_benchmark(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    (tmp_path / "a.jsonl").write_text("")
    line = refused(capsys, "evaluate", "--config", recipe, "--answers", str(tmp_path / "a.jsonl"))
    assert "--benchmark: which benchmark do they answer? (known: questions, scenes)" in line


def test_stages_out_of_order(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    assert "run `m3po generate` first" in refused(capsys, "score", "--config", recipe)
    assert "run `m3po score` first" in refused(capsys, "select", "--config", recipe)
    assert "run `m3po select` first" in refused(capsys, "train", "--config", recipe)
    assert "run `m3po train` first" in refused(capsys, "export", "--config", recipe)


def test_unknown_arm(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    assert "mas_dpo" in refused(capsys, "select", "--config", recipe, "--arm", "mas_dop")


def test_saved_answers_must_match_the_questions(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "q0", "text": "Yes"}\n')
    arguments = ["evaluate", "--config", recipe, "--answers", str(answers), "--benchmark", "questions"]
    assert "q3" in refused(capsys, *arguments)
    answers.write_text("".join(json.dumps({"id": f"q{i}", "text": "Yes"}) + "\n" for i in (0, 3, 6, 9)))
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


def test_help_of_every_verb_reads_without_heavy_imports(capsys):
    from m3po_jax.cli import VERBS

    for verb in set(VERBS) - {"recipes"}:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "--config" in text and "dotted.key=value" in text


def test_overrides_may_stand_anywhere(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data")))
    line = refused(capsys, "generate", "rounds=1", "--config", recipe, "--mock", "train.bta=1")
    assert "'train.bta'" in line
    with pytest.raises(SystemExit):
        main(["generate", "--config", recipe, "--round", "1", "--nonsense"])
