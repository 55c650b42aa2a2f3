"""The loop end to end on a tiny model: resumption, guards, what is and is not trained."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from training_tools import EOS_ID, TinyProcessor, base_config, pair_rows, tiny_model, tiny_pairs

from m3po_jax.data.batches import pair_batches
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.models.layers import LoRAParam
from m3po_jax.training.checkpoint import restore_trainable
from m3po_jax.training.loop import TrainResult, train
from m3po_jax.training.stage import Stage
from m3po_jax.training.step import split_model
from m3po_jax.workspace.metrics_log import read_metrics


def leaves(model: Any) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def run(path: Path, mesh: Any, stop_at: set[int] = frozenset(), **changes: Any) -> TrainResult:
    """Trains, sending itself SIGTERM after the steps in `stop_at` and starting again each time."""
    config = base_config(**changes)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(len(stop_at) + 1):
        try:
            return train(tiny_model(config), tiny_pairs(config), config, output_dir=path, mesh=mesh, on_step=on_step)
        except Interrupted:
            continue
    raise AssertionError("interrupted more often than asked for")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: Any, one_device: Any) -> TrainResult:
    return run(tmp_path_factory.mktemp("whole"), one_device)


def test_learns(uninterrupted: TrainResult) -> None:
    metrics = read_metrics(uninterrupted.metrics_path)
    assert [line["step"] for line in metrics] == list(range(1, 7))
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert metrics[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize(("stops", "save_steps"), [({1}, 1), ({2, 4}, 50), ({3}, 2)])
def test_resume_is_bit_equal(
    uninterrupted: TrainResult, tmp_path: Path, one_device: Any, stops: set[int], save_steps: int
) -> None:
    resumed = run(tmp_path, one_device, stop_at=stops, save_steps=save_steps)
    expected, actual = leaves(uninterrupted.model), leaves(resumed.model)
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], actual[name], err_msg=name)
    assert resumed.metrics_path.read_bytes() == uninterrupted.metrics_path.read_bytes()


def test_crash_between_checkpoints(uninterrupted: TrainResult, tmp_path: Path, one_device: Any) -> None:
    """After a kill, the lines and steps beyond the last checkpoint are done again, to the same bytes."""
    config = base_config(save_steps=4)

    class Killed(BaseException):
        pass

    def die(step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_model(config), tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device, on_step=die)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line cut short
    resumed = run(tmp_path, one_device, save_steps=4)
    assert resumed.metrics_path.read_bytes() == uninterrupted.metrics_path.read_bytes()


def test_numbers_are_read_while_the_next_step_is_under_way(
    tmp_path: Path, one_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's numbers come in one transfer, one step late; the first and the saved ones at once."""
    seen: list[str] = []
    dispatch, read, get = Stage.dispatch, Stage.read, jax.device_get

    def dispatched(self: Stage, state: Any, batch: Any, step: int) -> Any:
        seen.append(f"dispatch {step}")
        return dispatch(self, state, batch, step)

    def counted(tree: Any) -> Any:
        seen.append("transfer")
        return get(tree)

    def was_read(self: Stage, output: Any, batch: Any, step: int) -> Any:
        seen.append(f"read {step}")
        monkeypatch.setattr(jax, "device_get", counted)
        result = read(self, output, batch, step)
        monkeypatch.setattr(jax, "device_get", get)
        return result

    monkeypatch.setattr(Stage, "dispatch", dispatched)
    monkeypatch.setattr(Stage, "read", was_read)
    run(tmp_path, one_device, save_steps=4)
    order = ["dispatch 1", "read 1", "dispatch 2", "dispatch 3", "read 2", "dispatch 4", "read 3", "read 4"]
    order += ["dispatch 5", "dispatch 6", "read 5", "read 6"]
    assert [word for word in seen if word != "transfer"] == order
    assert seen.count("transfer") == 6


def test_a_step_behind_one_that_is_not_finite_changes_nothing(tmp_path: Path, one_device: Any) -> None:
    """It was dispatched before anybody knew; what is saved is the state before the broken step, bit by bit."""

    class Killed(BaseException):
        pass

    class Poisoned(TinyProcessor):
        def pixel_values(self, prompt: Any) -> np.ndarray:
            pixels = super().pixel_values(prompt)
            return pixels * np.nan if prompt.id == poisoned else pixels

    config = base_config(save_steps=1)
    batches = pair_batches(pair_rows(7), TinyProcessor(), batch_size=config.batch_size, seed=3)
    taken = [batches.row_ids(next(steps).row_index) for steps in [iter(batches)] for _ in range(2)]
    poisoned = next(name for name in taken[1] if name not in taken[0])

    def die(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise Killed

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with pytest.raises(Killed):
        train(tiny_model(config), batches, config, output_dir=whole, mesh=one_device, on_step=die)
    pairs = pair_batches(pair_rows(7), Poisoned(), batch_size=config.batch_size, seed=3)
    late = replace(config, save_steps=50)  # so that step 3 is under way when 2 is read
    with pytest.raises(UserError, match=rf"not finite at step 2, rows .*{poisoned}"):
        train(tiny_model(late), pairs, late, output_dir=broken, mesh=one_device)
    trained = [split_model(tiny_model(config), config)[1] for _ in range(2)]
    states = [restore_trainable(folder / "checkpoints", trained[i]) for i, folder in enumerate((whole, broken))]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    assert [line["step"] for line in read_metrics(broken / "metrics.jsonl")] == [1]


def test_answers_without_an_end_are_told_of(tmp_path: Path, one_device: Any) -> None:
    rows = pair_rows(7)
    for row in rows[:3]:
        row |= {"chosen_token_ids": [9, 10, 11], "rejected_token_ids": [9, 12, EOS_ID]}
    config = base_config(max_steps=1)
    pairs = pair_batches(rows, TinyProcessor(), batch_size=config.batch_size, seed=3)
    train(tiny_model(config), pairs, config, output_dir=tmp_path, mesh=one_device)
    (line,) = [line for line in read_metrics(tmp_path / "warnings.jsonl") if line["kind"] == "cut"]
    assert line["step"] == 1 and line["message"].startswith("3 of 7 answers to learn from have no end token")


def test_finished_stage_is_not_repeated(uninterrupted: TrainResult, one_device: Any) -> None:
    folder = uninterrupted.metrics_path.parent
    marker = (folder / "done.json").stat().st_mtime_ns
    again = run(folder, one_device)
    assert again.compilations == 0 and again.metrics == uninterrupted.metrics
    assert (folder / "done.json").stat().st_mtime_ns == marker
    for name, value in leaves(uninterrupted.model).items():
        np.testing.assert_array_equal(value, leaves(again.model)[name])


def test_other_settings_are_refused(uninterrupted: TrainResult, one_device: Any) -> None:
    with pytest.raises(UserError, match="other data or settings"):
        run(uninterrupted.metrics_path.parent, one_device, beta=0.2)


def test_frozen_leaves_are_untouched(uninterrupted: TrainResult) -> None:
    before, after = leaves(tiny_model(base_config())), leaves(uninterrupted.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    adapters = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(uninterrupted.model, LoRAParam))}
    assert changed == adapters


@pytest.mark.parametrize("projector", [False, True])
def test_what_is_trained(tmp_path: Path, one_device: Any, projector: bool) -> None:
    config = base_config(max_steps=1)
    rank = 2 if projector else 0
    config = replace(config, lora=replace(config.lora, lora_rank=rank, train_projector=projector))
    model = tiny_model(config)
    before = leaves(model)
    after = leaves(train(model, tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device).model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "projector"}
    assert ("decoder.lm_head.kernel" in changed) is not projector
    # The model that was given is left as it was.
    for name, value in leaves(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_non_finite_loss_names_the_rows(tmp_path: Path, one_device: Any) -> None:
    config = base_config()

    class Poisoned(TinyProcessor):
        def pixel_values(self, prompt: Any) -> np.ndarray:
            pixels = super().pixel_values(prompt)
            return pixels * np.nan if prompt.id == "row-5" else pixels

    pairs = pair_batches(pair_rows(7), Poisoned(), batch_size=config.batch_size, seed=3)
    with pytest.raises(UserError, match=r"not finite at step .*row-5") as caught:
        train(tiny_model(config), pairs, config, output_dir=tmp_path, mesh=one_device)
    assert "row-4" not in str(caught.value)
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    step = int(str(caught.value).split("at step ")[1].split(",")[0])
    assert (str(step - 1) in saved) == (step > 1) and str(step) not in saved


def test_foreign_reference_is_refused(tmp_path: Path, one_device: Any) -> None:
    config = base_config(reference="recorded")
    rows = [
        row
        | {
            "chosen_token_ids": [5, 2],
            "rejected_token_ids": [6, 2],
            "reference_chosen_logprobs": [-9.0, -9.0],
            "reference_rejected_logprobs": [-1.0, -1.0],
        }
        for row in pair_rows(7)
    ]
    pairs = pair_batches(rows, TinyProcessor(), batch_size=config.batch_size, seed=3)
    unchecked = replace(config, reference_check_rows=0)
    with pytest.raises(UserError, match="not ln 2"):
        train(tiny_model(config), pairs, unchecked, output_dir=tmp_path, mesh=one_device)
    with pytest.raises(UserError, match=r"row-2.*recorded log-prob of its rejected answer is -2\.000"):
        train(tiny_model(config), pairs, config, output_dir=tmp_path, mesh=one_device)


def test_no_gradient_is_refused(tmp_path: Path, one_device: Any) -> None:
    config = base_config()
    model = tiny_model(config)
    nnx.update(model, jax.tree.map(np.zeros_like, nnx.state(model, LoRAParam)))  # A = B = 0 stays so
    with pytest.raises(UserError, match="gradient of the first step is zero"):
        train(model, tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)


def test_nothing_trainable_is_refused(tmp_path: Path, one_device: Any) -> None:
    config = base_config()
    bare = tiny_model(replace(config, lora=replace(config.lora, lora_rank=0)))
    with pytest.raises(UserError, match="no parameter is trainable"):
        train(bare, tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)
