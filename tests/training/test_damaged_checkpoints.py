"""Checkpoints that are not what was written: the one before is taken, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_training_loop import leaves
from training_tools import base_config, tiny_model, tiny_pairs

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.training.checkpoint import UNSUMMED, checkpoint_sums
from m3po_jax.training.loop import TrainResult, load_trained, train
from m3po_jax.workspace.layout import CHECKSUMS

CONFIG = base_config(max_steps=4, save_steps=2)


def run(path: Path, mesh: Any, config: TrainConfig = CONFIG, **more: Any) -> TrainResult:
    return train(tiny_model(config), tiny_pairs(config), config, output_dir=path, mesh=mesh, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_device: Any) -> TrainResult:
    return run(tmp_path_factory.mktemp("whole") / "stage", one_device, made_from={"model": "a"})


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def every(folder: Path, change: Callable[[Path], Any]) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        change(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda step: biggest(step).write_bytes(biggest(step).read_bytes()[:99]),
    "flipped_bit": lambda step: flip(biggest(step)),
    "flipped_bit_at_the_start": lambda step: flip(biggest(step), 0.0),
    "deleted_file": lambda step: biggest(step).unlink(),
    "deleted_state": lambda step: shutil.rmtree(step / "state"),
    "empty_progress": lambda step: every(step / "progress", lambda path: path.write_bytes(b"")),
    "deleted_progress": lambda step: shutil.rmtree(step / "progress"),
    "other_counters": lambda step: every(step / "progress", flip),
    "garbled_checksums": lambda step: (step / CHECKSUMS).write_text("{"),
    "without_checksums": lambda step: ((step / CHECKSUMS).unlink(), shutil.rmtree(step / "state")),
    "empty_folder": lambda step: every(step, Path.unlink),
}


@pytest.mark.parametrize(
    ("damage", "finished"), [*((name, False) for name in DAMAGE), ("truncated", True), ("flipped_bit", True)]
)
def test_the_checkpoint_before_is_taken(
    whole: TrainResult,
    tmp_path: Path,
    one_device: Any,
    caplog: pytest.LogCaptureFixture,
    damage: str,
    finished: bool,
) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(whole.metrics_path.parent, stage)
    if not finished:
        (stage / "done.json").unlink()
    DAMAGE[damage](stage / "checkpoints" / "4")
    if finished:
        with pytest.raises(UserError, match=r"step 4 is damaged .*goes on from the checkpoint before it"):
            load_trained(tiny_model(CONFIG), CONFIG, output_dir=stage, mesh=one_device)
    result = run(stage, one_device, made_from={"model": "a"})
    assert "checkpoints/4" in caplog.text and "the checkpoint before it is taken" in caplog.text
    for name, value in leaves(result.model).items():
        assert value.tobytes() == leaves(whole.model)[name].tobytes(), name
    assert result.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == ["2", "4"]
    assert (stage / "set-aside" / "damaged" / "checkpoint-4").is_dir(), "nothing is deleted"
    done = [json.loads((path / "done.json").read_text()) for path in (stage, whole.metrics_path.parent)]
    assert done[0]["metrics"] == done[1]["metrics"]


def test_no_whole_checkpoint_is_one_line(whole: TrainResult, tmp_path: Path, one_device: Any) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(whole.metrics_path.parent, stage)
    for step in ("2", "4"):
        flip(biggest(stage / "checkpoints" / step))
    with pytest.raises(UserError, match=r"no checkpoint there is whole \(step 4 is damaged .*remove the folder"):
        run(stage, one_device, made_from={"model": "a"})
    shutil.rmtree(stage / "checkpoints")
    again = run(stage, one_device, made_from={"model": "a"})
    assert again.metrics_path.read_bytes() == whole.metrics_path.read_bytes()


def test_another_trainings_checkpoint_is_not_taken(whole: TrainResult, tmp_path: Path, one_device: Any) -> None:
    """Of the same data and settings, but from other weights; alone it is refused, after an own one set aside."""
    stage, other = tmp_path / "stage", tmp_path / "other"
    shutil.copytree(whole.metrics_path.parent, stage)
    (stage / "done.json").unlink()
    run(other, one_device, made_from={"model": "b"})
    with pytest.raises(UserError, match="made with other data or settings"):
        run(stage, one_device, made_from={"model": "b"})
    shutil.rmtree(stage / "checkpoints" / "4")
    shutil.copytree(other / "checkpoints" / "4", stage / "checkpoints" / "4")
    again = run(stage, one_device, made_from={"model": "a"})
    assert again.metrics_path.read_bytes() == whole.metrics_path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"steps": "4"}', b'{"steps": 4}'])
def test_a_garbled_mark_is_made_again(whole: TrainResult, tmp_path: Path, one_device: Any, content: bytes) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(whole.metrics_path.parent, stage)
    before = json.loads((stage / "done.json").read_text())
    (stage / "done.json").write_bytes(content)
    result = run(stage, one_device, made_from={"model": "a"})
    after = json.loads((stage / "done.json").read_text())
    assert after["metrics"] == before["metrics"] == result.metrics and after["steps"] == 4
    assert after["steps_in_this_process"] == 0


def test_every_checkpoint_carries_its_checksums(whole: TrainResult) -> None:
    for step in ("2", "4"):
        folder = whole.metrics_path.parent / "checkpoints" / step
        sums = checkpoint_sums(folder)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert sums is not None and set(sums) == files - UNSUMMED
