"""`m3po validate` finds everything at once, and loads nothing heavy."""

from __future__ import annotations

import json

from mini_run import write_data, write_recipe

from m3po_jax.cli import main


def test_a_good_recipe_passes(tmp_path, capsys):
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data"))
    assert main(["validate", "--config", str(recipe)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no problems" in said and "16 rows" in said and "4 questions of questions" in said


def test_every_problem_is_named(tmp_path, capsys):
    data = write_data(tmp_path / "data", 12)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[2]["instruction"] = ""
    lines[4]["images"] = ["nowhere.png"]
    lines[6]["instruction"] = "dog " * 2000
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "data" / "007.png").write_bytes(b"broken")
    recipe = write_recipe(
        tmp_path, data, select={"confidence": "tail"}, score={"model": "/no/judge"}, evaluate={"benchmarks": {}}
    )
    assert main(["validate", "--config", str(recipe)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3po: ")]
    wanted = ["prompts.jsonl:3", "nowhere.png", "max_prompt_tokens", "(id 's7')", "/no/judge", "'tail'"]
    for text in wanted:
        assert sum(text in line for line in said) == 1, (text, said)
    assert f"{len(wanted)} problems in all" in said[-1]


def test_rows_of_sft_and_contrastive_training(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    (tmp_path / "data" / "003.png").write_bytes(b"broken")
    for changes in ({"objective": "sft"}, {"objective": "contrastive"}):
        model = {"path": "builtin:quickstart-scorer"} if changes["objective"] == "contrastive" else {}
        recipe = write_recipe(tmp_path, data, train=changes, model=model, arms={})
        assert main(["validate", "--config", str(recipe)]) == 2
        assert "(id 's3')" in capsys.readouterr().err
