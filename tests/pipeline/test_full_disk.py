"""A disk that fills up: one line with the place and the space, nothing damaged, and the same command goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mini_run import same_run, write_data, write_recipe
from test_bad_input import refused

from m3po_jax.cli import main
from m3po_jax.errors import UserError
from m3po_jax.scoring.answer_cache import AnswerCache

# Every kind of file that a run writes, by a part of its path.
KINDS = (
    *("mini/config.yaml", "mini/manifest.json", "candidates/record.json", "candidates/00000", "scores/record.json"),
    *("scores/00001", "pairs/00000", "pairs/drops.jsonl", "prompts.parquet", "pairs/summary.json", "training.json"),
    *("checkpoints/2", "done.json", "evaluation/questions/items.jsonl", "evaluation/questions/results.json"),
    *("mini/evaluation.json", "mini/evaluation.md", "mini/report.html", "cache/reference", "cache/vision"),
)


def recipe_of(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_data(folder / "data", 9)
    questions = {"metric": "pope", "kind": "yesno", "data": {"source": "jsonl", "path": str(data)}}
    return write_recipe(
        folder,
        data,
        train={"max_steps": 3, "reference": "computed"},
        cache={"reference": "auto", "vision_features": "auto"},
        evaluate={"stop_bias": [], "contrast_alpha": [], "benchmarks": {"questions": questions}},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run is finished."""
    recipe = recipe_of(tmp_path_factory.mktemp("whole"))
    assert main(["run", "--config", str(recipe)]) == 0
    return recipe


def test_every_kind_of_file_may_meet_a_full_disk(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, left = recipe_of(tmp_path), list(KINDS)
    written = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}").replace("/.", "/")  # a temporary is called .NAME.RANDOM.tmp
        for kind in left:
            if kind in path:
                left.remove(kind)
                number = (errno.ENOSPC, errno.EDQUOT)[len(left) % 2]
                raise OSError(number, os.strerror(number))
        written(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in KINDS:
        before = list(left)
        line = refused(capsys, "run", "--config", str(recipe))
        [kind] = set(before) - set(left)
        reason = "the disk quota is used up" if len(left) % 2 else "the disk is full"
        assert kind.partition("/")[0] in line and re.search(
            rf": {reason} \(at least [0-9.]+ .B are needed, [0-9.]+ MB are free\); make room there", line
        ), line
    assert not left and main(["run", "--config", str(recipe)]) == 0
    same_run(whole.parent / "runs" / "mini", tmp_path / "runs" / "mini", tolerance=1e-5)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or "checkpoint-tmp" in path.name]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses what makes a file larger, also to libraries in C++."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    assert main(["run", "--config", str(recipe), "train.max_steps=1"]) == 0
    with largest_file(60_000):
        line = refused(capsys, "train", "--config", str(recipe))
    assert "round-1/checkpoints: a file is too large (at least" in line
    assert main(["run", "--config", str(recipe)]) == 0
    same_run(whole.parent / "runs" / "mini", tmp_path / "runs" / "mini", tolerance=1e-5)


@pytest.mark.parametrize("form", ["huggingface", "peft"])
def test_an_export_that_does_not_fit(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    out = tmp_path / "out"
    command = ["export", "--config", str(whole), "--format", form, "--output", str(out)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with largest_file(60_000):
        assert f"{out}: a file is too large (at least" in refused(capsys, *command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_may_not_be_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)

    def mkstemp(**options: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(options["dir"]))

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    line = refused(capsys, "run", "--config", str(recipe))
    assert line.startswith(f"m3po: {tmp_path}/runs/") and "cannot be read or written (Read-only file system)" in line
    monkeypatch.setattr(tempfile, "mkdtemp", mkstemp)
    out = tmp_path / "out"
    assert f"{out}: cannot be read or written" in refused(
        capsys, "export", "--config", str(whole), "--output", str(out)
    )


def test_an_answer_that_is_cut_spoils_no_other(tmp_path: Path) -> None:
    cost = {"prompt_tokens": 3, "completion_tokens": 1, "cost": 0.5}
    cache = AnswerCache(tmp_path, "run")
    cache.put("a", "one", **cost)
    size = cache.path.stat().st_size
    with largest_file(size + 20), pytest.raises(UserError, match=r"jsonl: the disk is full"):
        cache.put("b", "two", **cost)
    assert cache.path.stat().st_size == size and cache.spent["requests"] == 1
    cache.put("c", "three", **cost)
    again = AnswerCache(tmp_path, "run")
    assert (again.get("a"), again.get("b"), again.get("c"), again.spent["cost"]) == ("one", None, "three", 1.0)
