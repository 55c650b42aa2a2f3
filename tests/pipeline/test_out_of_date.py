"""What a stage made is tied to what it was made from: a change redoes what depends on it, and damage is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mini_run import rows, same_run, write_data, write_recipe
from test_bad_input import edit, refused

from m3po_jax.cli import main
from m3po_jax.data import tables
from m3po_jax.models.registry import resolve_directory
from m3po_jax.pipeline.preview import preview
from m3po_jax.recipes import load_recipe
from m3po_jax.scoring.m3p import m3p_scores
from m3po_jax.workspace.records import DONE, OUT_OF_DATE, TO_DO, Record

ROUND, ARM = "round-1", "arms/mas_dpo/round-1"
STAGES = {
    "candidates": f"{ROUND}/candidates/*.parquet",
    "scores": f"{ROUND}/scores/*.parquet",
    "pairs": f"{ROUND}/pairs/*.parquet",
    "training": f"{ROUND}/done.json",
    "arm_training": f"{ARM}/done.json",
    "evaluation": f"{ROUND}/evaluation/*/results.json",
    "base": "round-0/evaluation/*/results.json",
}
ALL = set(STAGES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, its model and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_data(folder / "data", 9)
    model = shutil.copytree(resolve_directory("builtin:quickstart-base"), folder / "model")
    questions = {"metric": "pope", "kind": "yesno", "data": {"source": "jsonl", "path": str(data)}}
    recipe = write_recipe(
        folder,
        data,
        train={"max_steps": 3},
        evaluate={"stop_bias": [], "contrast_alpha": [], "benchmarks": {"questions": questions}},
    )
    recipe.write_text(recipe.read_text().replace("builtin:quickstart-base", str(model)))
    assert main(["run", "--config", str(recipe)]) == 0
    return folder


class Copy:
    """A copy of the finished run, its data and model, to change."""

    def __init__(self, finished: Path, folder: Path):
        shutil.copytree(finished, folder)
        self.folder, self.run = folder, folder / "runs" / "mini"
        for path in (folder / "mini.yaml", self.run / "config.yaml"):
            path.write_text(path.read_text().replace(str(finished), str(folder)))
        self.before = self.stamps()

    def stamps(self) -> dict[str, dict[str, int]]:
        return {
            stage: {str(path): path.stat().st_mtime_ns for path in self.run.glob(pattern)}
            for stage, pattern in STAGES.items()
        }

    def redone(self) -> set[str]:
        """The stages whose files are others than at the start."""
        return {stage for stage, stamps in self.stamps().items() if stamps != self.before[stage]}

    def arguments(self, *more: str, verb: str = "run") -> list[str]:
        return [verb, "--config", str(self.folder / "mini.yaml"), *more]

    def again(self, *more: str) -> None:
        assert main(self.arguments(*more)) == 0

    def aside(self) -> list[Path]:
        return [path for path in self.run.rglob("set-aside/**/*") if path.is_file()]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Copy:
    return Copy(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("train.beta=0.5", {"training", "arm_training", "evaluation"}),
        ("select.rule=random", {"pairs", "training", "evaluation"}),
        ("arms.mas_dpo={select.rule: random}", {"arm_training"}),
        ("select.min_rejected_z=-1.9", {"pairs"}),  # of the same content
        ("train.save_steps=1", set()),
        ("train.log_steps=3", set()),
        ("generate.batch_size=3", set()),
        ("evaluate.bootstrap_samples=60", {"evaluation", "base"}),
        ("score.aggregate=mean", {"scores", "pairs", "training", "arm_training", "evaluation"}),
    ],
)
def test_a_changed_recipe_redoes_what_depends_on_it(
    copied: Copy, capsys: pytest.CaptureFixture[str], change: str, stages: set[str]
) -> None:
    assert main(copied.arguments("--dry-run", change)) == 0
    listed = capsys.readouterr().out
    assert copied.redone() == set() and copied.aside() == [], "a dry run touches nothing"
    first = [line for line in listed.splitlines() if "out of date" in line]
    key = change.partition("=")[0] if "{" not in change else "select.rule"
    assert not stages or (key in first[0] and "->" in first[0])
    copied.again(change)
    assert copied.redone() == stages
    assert bool(copied.aside()) == bool(stages), "what is replaced is set aside"
    assert change.partition("=")[0].rpartition(".")[2] in (copied.run / "config.yaml").read_text()
    capsys.readouterr()
    assert main(copied.arguments("--dry-run", change)) == 0
    assert {line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()} == {"done"}


OWN, OTHER, TRAINED = "round 1", "round 1 of mas_dpo", ("m3po", "mas_dpo")
SELECTIONS = {(OWN, "select"), (OTHER, "select")}
TRAININGS = {(OWN, "train"), (OTHER, "train")}
EVALUATIONS = {(name, "evaluate questions") for name in TRAINED}
SCORES = {(OWN, "score"), *SELECTIONS, *TRAININGS, *EVALUATIONS}
ALL_STAGES = {(OWN, "generate"), *SCORES, ("base", "evaluate questions")}
MORE = "{metric: pope, kind: yesno, data: {source: jsonl, path: DATA/prompts.jsonl}}"


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("select.margin=0.01", {*SELECTIONS, *TRAININGS, *EVALUATIONS}),
        ("select.cut=keep", {*SELECTIONS, *TRAININGS, *EVALUATIONS}),
        ("train.beta=0.5", {*TRAININGS, *EVALUATIONS}),
        ("train.lora.lora_alpha=4", {*TRAININGS, *EVALUATIONS}),
        ("model.param_dtype=bfloat16", ALL_STAGES),
        ("score.aggregate=mean", SCORES),
        ("score.confidence=[mean]", SCORES),
        ("generate.temperature=0.5", {(OWN, "generate"), *SCORES}),
        ("generate.max_new_tokens=10", {(OWN, "generate"), *SCORES}),
        ("generate.num_candidates=3", {(OWN, "generate"), *SCORES}),
        ("seed=1", ALL_STAGES),
        ("evaluate.max_new_tokens=10", {*EVALUATIONS, ("base", "evaluate questions")}),
        ("evaluate.benchmarks.more=" + MORE, {(name, "evaluate more") for name in ("base", *TRAINED)}),
        (
            "arms.random={select.rule: random}",
            {("round 1 of random", "select"), ("round 1 of random", "train"), ("random", "evaluate questions")},
        ),
        ("arms.mas_dpo={train.beta: 0.5}", {(OTHER, "train"), ("mas_dpo", "evaluate questions")}),
        # How a stage runs, what it shows and where it keeps things changes nothing that it computes.
        *(
            (change, set())
            for change in (
                *("train.report_to=[tensorboard]", "train.log_steps=7", "train.keep_checkpoints=9"),
                *("cache.vision_features=auto", "cache.reference=auto"),
                *("generate.batch_size=2", "score.batch_size=2", "evaluate.batch_size=2"),
            )
        ),
    ],
)
def test_the_preview_lists_what_depends_on_a_key(finished: Path, change: str, stages: set[tuple[str, str]]) -> None:
    """Records are compared with what stages would get, and nothing runs (forced, since a run refuses other seeds)."""
    recipe = load_recipe(finished / "mini.yaml", [change.replace("DATA", str(finished / "data"))])
    listed = {(planned.where, planned.stage): planned.status for planned in preview(recipe, force=True)}
    assert {stage for stage, status in listed.items() if status.state != DONE} == stages
    assert listed.keys() >= ALL_STAGES
    added = change.startswith(("arms.random", "evaluate.benchmarks"))
    states = {listed[stage].state for stage in stages}
    assert states == ({TO_DO} if added else {OUT_OF_DATE} if stages else set())
    if stages and not added:
        key = change.partition("=")[0]
        first = next(iter(status for status in listed.values() if status.state != DONE)).reason
        names = {"model.param_dtype": "model", "evaluate.max_new_tokens": "decoding.max_new_tokens"}
        names |= {"arms.mas_dpo": "train.beta"}
        assert first.startswith(f"{names.get(key, key)} ") and " -> " in first


def test_what_is_replaced_lies_under_its_own_hash(copied: Copy) -> None:
    before = {
        folder: Record.parsed(json.loads((copied.run / folder / "record.json").read_text()))
        for folder in (f"{ROUND}/pairs", f"{ARM}/pairs")
    }
    copied.again("select.rule=random", "train.max_steps=2")
    changed = before[f"{ROUND}/pairs"]
    assert changed is not None
    assert (copied.run / ROUND / "set-aside" / changed.hash / "pairs" / "record.json").exists()
    assert not (copied.run / ARM / "set-aside" / before[f"{ARM}/pairs"].hash).exists(), "that arm has its own rule"
    trained = json.loads((copied.run / ROUND / "training.json").read_text())
    (kept,) = [path.parent for path in (copied.run / ROUND / "set-aside").rglob("training.json")]
    old = Record.parsed(json.loads((kept / "training.json").read_text()))
    assert old is not None and kept.name == old.hash != Record.parsed(trained).hash


def test_lambda_chooses_columns_and_asks_no_judge(
    copied: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(copied.run / ROUND / "scores")
    monkeypatch.setattr("m3po_jax.pipeline.score.judge_pools", lambda *_: pytest.fail("the judge was asked"))
    copied.again("select.lambda_dispreferred=0.25", "select.lambda_preferred=0.5")
    after = rows(copied.run / ROUND / "scores")
    for key in {row["id"] for row in before}:
        old, new = ([row for row in table if row["id"] == key] for table in (before, after))
        for name in ("mas", "confidence", "mas_similarity", "confidence_prior", "candidate"):
            assert [row[name] for row in old] == [row[name] for row in new]
        want = m3p_scores(*(np.array([row[name] for row in new]) for name in ("mas", "confidence")), 0.5, 0.25)
        for name, values in zip(("m3p_preferred", "m3p_dispreferred"), want, strict=True):
            np.testing.assert_array_equal([row[name] for row in new], values)
    assert "candidates" not in copied.redone()


def same_training(one: Path, other: Path) -> bool:
    return (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def fresh(copied: Copy, *more: str) -> Path:
    """The run that the same recipe makes from nothing."""
    assert main(copied.arguments("name=fresh", *more)) == 0
    return copied.run.parent / "fresh"


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def test_edited_data_is_trained_on(copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copied.folder / "data" / "prompts.jsonl", lambda lines: lines.pop(2))
    copied.again()
    assert copied.redone() == ALL
    said = capsys.readouterr().err
    assert "data: has changed since this run began" in said and "the training is out of date (" in said
    want = fresh(copied)
    assert same_training(copied.run / ROUND, want / ROUND) and same_training(copied.run / ARM, want / ARM)
    for stage in ("candidates", "scores", "pairs"):
        assert rows(copied.run / ROUND / stage) == rows(want / ROUND / stage)
    assert manifest(copied.run)["data"] == manifest(want)["data"]
    assert any(path.name == "done.json" for path in copied.aside())


def test_other_weights_under_the_same_path_are_trained(copied: Copy) -> None:
    from safetensors.numpy import load_file, save_file

    path = copied.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lm_head.weight") or "embed_tokens" in name)
    tensors[name] = (tensors[name] * 1.5).astype(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    copied.again()
    assert copied.redone() == ALL
    want = fresh(copied)
    assert same_training(copied.run / ROUND, want / ROUND)
    assert manifest(copied.run)["model"] == manifest(want)["model"]


@pytest.mark.parametrize("change", ["seed=1", "data.limit=5", "model.dtype=bfloat16"])
def test_what_would_make_everything_anew_is_refused(
    copied: Copy, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    line = refused(capsys, *copied.arguments(change))
    assert "holds a run of another recipe (it has" in line and "add --force" in line
    assert copied.redone() == set() and copied.aside() == []
    assert "seed: 0\n" in (copied.run / "config.yaml").read_text()
    assert refused(capsys, *copied.arguments(change), "--dry-run") == line
    assert main(["run", *copied.arguments(change)[1:], "--dry-run", "--force"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(": out of date (" in stage for stage in listed) and copied.aside() == []


def test_force_sets_everything_aside(copied: Copy) -> None:
    made = [path for path in (copied.run / ROUND).rglob("*.parquet") if path.name != "prompts.parquet"]
    old = {path.read_bytes() for path in made}  # prompts.parquet shows the data, and no stage reads it
    copied.again("seed=1", "--force")
    assert copied.redone() == ALL
    assert old <= {path.read_bytes() for path in copied.aside()}
    assert same_training(copied.run / ROUND, fresh(copied, "seed=1") / ROUND)
    assert manifest(copied.run)["seed"] == 1


@pytest.mark.parametrize("content", [None, b"\x80\x81\x00garbage", b"- a\n- list\n", b"", b"a: [1"])
@pytest.mark.parametrize("more", [[], ["seed=1"]])
def test_nothing_continues_without_the_saved_recipe(
    copied: Copy, capsys: pytest.CaptureFixture[str], content: bytes | None, more: list[str]
) -> None:
    saved = copied.run / "config.yaml"
    whole = saved.read_bytes()
    saved.unlink() if content is None else saved.write_bytes(content)
    line = refused(capsys, *copied.arguments(*more))
    assert str(saved) in line and "put it back" in line
    assert copied.redone() == set()
    saved.write_bytes(whole)
    if not more:
        copied.again()
        assert copied.redone() == set()


def exchange(path: Path) -> None:
    """Swaps the scores of two candidates, in a file that reads well."""
    table = pq.read_table(path)
    values = table.column("mas").to_pylist()
    values.reverse()
    index = table.schema.get_field_index("mas")
    pq.write_table(table.set_column(index, table.schema.field(index), [values]), path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_folder(path: Path, other: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(other, path)


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        (f"{ROUND}/candidates/00001-*.parquet", flip),
        (f"{ROUND}/candidates/00001-*.parquet", truncate),
        (f"{ROUND}/scores/00000-*.parquet", exchange),
        (f"{ROUND}/scores/00000-*.parquet", truncate),
        (f"{ROUND}/pairs/00000-*.parquet", flip),
        (f"{ROUND}/pairs/00000-*.parquet", truncate),
        (f"{ROUND}/pairs/summary.json", lambda path: path.write_text("[]")),
        (f"{ROUND}/prompts.parquet", flip),
        (f"{ROUND}/prompts.parquet", Path.unlink),
        (f"{ROUND}/checkpoints/3", shutil.rmtree),
        (f"{ROUND}/evaluation", lambda path: replace_folder(path, path.parents[1] / ARM / "evaluation")),
        (f"{ROUND}/evaluation/questions/record.json", Path.unlink),
        (f"{ROUND}/pairs/record.json", lambda path: path.write_text("[1]")),
        (f"{ROUND}/scores/record.json", lambda path: path.write_bytes(b"\xff\x00")),
        (f"{ROUND}/candidates/record.json", lambda path: path.write_text('{"inputs": 3}')),
        (f"{ROUND}/done.json", lambda path: path.write_text("garbage")),
        (f"{ROUND}/checkpoints/3", lambda path: flip(biggest(path))),
        (f"{ROUND}/checkpoints/3/state", shutil.rmtree),
        (f"{ROUND}/metrics.jsonl", lambda path: path.write_text(path.read_text() + '{"step": 4, "lo')),
        (f"{ROUND}/evaluation/questions/results.json", lambda path: path.write_text('["of another shape"]')),
        (f"{ROUND}/evaluation/questions/items.jsonl", truncate),
        ("manifest.json", lambda path: path.write_text('{"stages": "none"}')),
        ("manifest.json", lambda path: path.write_text('{"stages": [{"stage": 3}]}')),
        ("manifest.json", lambda path: path.write_bytes(b"\xff{")),
        ("manifest.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"stages": []}))),
    ],
)
def test_damage_is_noticed_and_mended(
    finished: Path, copied: Copy, place: str, damage: Callable[[Path], Any]
) -> None:
    """The run ends as it was, to the bit; a shard of candidates is drawn beside others, and so to the last digits."""
    [path] = copied.run.glob(place)
    damage(path)
    copied.again()
    whole = finished / "runs" / "mini"
    if "candidates/0" in place:
        same_run(whole, copied.run, tolerance=1e-5)
        return
    for stage in ("candidates", "scores", "pairs"):
        assert rows(copied.run / ROUND / stage) == rows(whole / ROUND / stage)
    if "metrics" not in place:
        assert same_training(copied.run / ROUND, whole / ROUND) and same_training(copied.run / ARM, whole / ARM)
    for name in ("evaluation.json", f"{ROUND}/evaluation/questions/items.jsonl", f"{ROUND}/prompts.parquet"):
        assert (copied.run / name).read_bytes() == (whole / name).read_bytes()
    stages = [{(s["stage"], s["round"], s["arm"]) for s in manifest(run)["stages"]} for run in (copied.run, whole)]
    assert stages[0] == stages[1]
    assert json.loads((copied.run / ROUND / "pairs" / "summary.json").read_text())["pairs"]


@pytest.mark.parametrize(
    ("verb", "place", "line"),
    [
        ("score", f"{ROUND}/candidates/00000-*.parquet", "`m3po generate` makes it again"),
        ("select", f"{ROUND}/scores/00000-*.parquet", "`m3po score` makes it again"),
        ("train", f"{ROUND}/pairs/00000-*.parquet", "`m3po select` makes it again"),
        ("evaluate", f"{ROUND}/pairs/00000-*.parquet", "`m3po select` makes it again"),
    ],
)
def test_a_stage_by_itself_names_the_stage_that_mends(
    copied: Copy, capsys: pytest.CaptureFixture[str], verb: str, place: str, line: str
) -> None:
    [path] = copied.run.glob(place)
    flip(path)
    assert line in refused(capsys, *copied.arguments(verb=verb))
    assert main(copied.arguments(verb=line.split()[1].rstrip("`"))) == 0
    assert main(copied.arguments(verb=verb)) == 0


def test_another_arms_checkpoint_is_not_taken(
    finished: Path, copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = (copied.run / place / "checkpoints" for place in (ROUND, ARM))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    assert "is not what was written" in refused(capsys, *copied.arguments(verb="export"))
    line = refused(capsys, *copied.arguments())
    assert "made with other data or settings" in line and str(mine) in line
    shutil.rmtree(mine)  # the remedy of the line
    copied.again()
    assert same_training(copied.run / ROUND, finished / "runs" / "mini" / ROUND)


def test_another_arms_whole_training_is_not_taken(finished: Path, copied: Copy) -> None:
    for name in ("checkpoints", "done.json", "training.json", "metrics.jsonl"):
        mine, other = copied.run / ROUND / name, copied.run / ARM / name
        replace_folder(mine, other) if mine.is_dir() else shutil.copy2(other, mine)
    copied.again()
    assert same_training(copied.run / ROUND, finished / "runs" / "mini" / ROUND)


@pytest.mark.parametrize("stage", ["candidates", "scores"])
def test_exchanged_shards_are_made_again(finished: Path, copied: Copy, stage: str) -> None:
    """Two files of a stage that are what was written, each in the other's place."""
    one, two = sorted((copied.run / ROUND / stage).glob("*.parquet"))[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    copied.again()
    same_run(finished / "runs" / "mini", copied.run, tolerance=1e-5)


def test_an_image_replaced_by_one_of_its_size_and_time_is_noticed(
    copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied.folder / "data" / "001.png"
    status, other = path.stat(), (copied.folder / "data" / "002.png").read_bytes()
    path.write_bytes(other[: status.st_size].ljust(status.st_size, b"\0"))  # readable where it is the longer
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    copied.again()
    assert copied.redone() == ALL and "data: has changed since this run began" in capsys.readouterr().err


def test_an_unfinished_training_of_something_else_is_refused(
    copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copied.run / ROUND / "training.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"finished": None, "outputs": {}}))
    (copied.run / ROUND / "done.json").unlink()
    line = refused(capsys, *copied.arguments("train.beta=0.5"))
    assert "the unfinished training there was made from something else (train.beta 0.1 -> 0.5)" in line
    copied.again("train.beta=0.5", "--force")
    assert same_training(copied.run / ROUND, fresh(copied, "train.beta=0.5") / ROUND)


@pytest.mark.parametrize("content", [None, "{", '{"inputs": {}, "outputs": 3}'])
def test_a_training_without_its_record_is_not_trusted(
    copied: Copy, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    record = copied.run / ROUND / "training.json"
    whole = record.read_text()
    record.unlink() if content is None else record.write_text(content)
    line = refused(capsys, *copied.arguments())
    assert "nothing readable tells what the training there was made from" in line and "put it back" in line
    record.write_text(whole)
    copied.again()
    assert copied.redone() == set()


def test_evaluate_and_export_want_a_training_of_this_recipe(
    copied: Copy, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for verb, more in (("evaluate", []), ("export", ["--output", str(tmp_path / "out")])):
        line = refused(capsys, *copied.arguments("train.beta=0.5", *more, verb=verb))
        assert "the training there is out of date (train.beta 0.1 -> 0.5)" in line


def test_a_stage_killed_before_it_was_noted_stands_in_the_manifest(copied: Copy) -> None:
    path = copied.run / "manifest.json"
    content = manifest(copied.run)
    whole = sorted(content["stages"], key=str)
    content["stages"] = [stage for stage in whole if stage["stage"] != "select"]
    path.write_text(json.dumps(content))
    copied.again()
    assert sorted(manifest(copied.run)["stages"], key=str) == whole
    assert copied.redone() == set()


def test_records_tell_what_was_made_from_what(finished: Path) -> None:
    run = finished / "runs" / "mini"
    for place in ("candidates", "scores", "pairs"):
        folder = run / ROUND / place
        record = json.loads((folder / "record.json").read_text())
        assert record["finished"] and record["inputs"]
        for name, value in record["outputs"].items():
            assert tables.file_hash(folder / name) == value
        assert {path.name for path in folder.glob("*.parquet")} <= set(record["outputs"])
    training = json.loads((run / ROUND / "training.json").read_text())
    assert training["inputs"]["train.beta"] == 0.1 and training["inputs"]["seed"] == 0
    assert "done.json" in training["outputs"] and any(
        name.startswith("checkpoints/3/") for name in training["outputs"]
    )
