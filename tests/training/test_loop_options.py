"""Options of the loop on a tiny model: what learns, averages, best weights, trackers, times, bfloat16."""

from __future__ import annotations

import json
import re
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from model_inputs import shown
from training_tools import CONFIG, TinyProcessor, base_config, tiny_model, tiny_pairs

from m3po_jax.config import LoRAConfig
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.schema import message
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.models.llava.model import build
from m3po_jax.training.checkpoint import best_step, is_minimised
from m3po_jax.training.flops import PEAK_FLOPS, peak_flops, seen_pairs, step_cost
from m3po_jax.training.loop import load_trained, train
from m3po_jax.training.optimizer import OptimizerSettings, learning_rate_schedule
from m3po_jax.training.progress import describe, duration, progress_bar
from m3po_jax.training.step import make_step, place_frozen, split_model
from m3po_jax.training.timing import StepTimer
from m3po_jax.training.trackers import Trackers
from m3po_jax.workspace.metrics_log import MetricsLog, read_metrics


def leaves(model: Any) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def changed_parts(config: Any, folder: Path, mesh: Mesh) -> set[str]:
    """First parts of the names of the leaves that one stage changed."""
    model = tiny_model(config)
    after = leaves(train(model, tiny_pairs(config), config, output_dir=folder, mesh=mesh).model)
    return {name.split(".")[0] for name, value in leaves(model).items() if not np.array_equal(value, after[name])}


def test_the_projector_alone(tmp_path: Path, one_device: Mesh) -> None:
    config = base_config(max_steps=1, freeze=["decoder"])
    config = replace(config, lora=replace(config.lora, lora_rank=0))
    assert changed_parts(config, tmp_path, one_device) == {"projector"}
    with pytest.raises(UserError, match="did you mean 'decoder'"):
        split_model(tiny_model(config), replace(config, freeze=["decodr"]))


def test_adapters_on_tower_and_projector(tmp_path: Path, one_device: Mesh) -> None:
    """They learn, and the reference sees with the tower as it was: the first loss is ln 2, and it falls."""
    targets = ["q_proj", "projector.linear_1", "vision_tower.q_proj"]
    config = base_config(max_steps=3, learning_rate=2e-2)
    config = replace(config, lora=replace(config.lora, target_modules=targets))
    assert changed_parts(config, tmp_path, one_device) == {"decoder", "projector", "vision_tower"}
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[-1]["loss"] < 0.68


def test_warmup_steps_override_the_ratio() -> None:
    config = base_config(warmup_ratio=0.9, warmup_steps=2, lr_schedule="constant", learning_rate=3.0)
    schedule = learning_rate_schedule(OptimizerSettings.of(config), 10)
    np.testing.assert_allclose(schedule(np.arange(4)), [1.5, 3.0, 3.0, 3.0])
    with pytest.raises(UserError, match="warmup_steps: must be in"):
        OptimizerSettings.of(replace(config, warmup_steps=-1))


@pytest.fixture(scope="module")
def averaged(
    tmp_path_factory: pytest.TempPathFactory, one_device: Mesh
) -> tuple[Path, Any, list[dict[str, np.ndarray]]]:
    """A stage with a moving average and the best checkpoint kept, and its parameters after each step."""
    config = base_config(ema_decay=0.5, keep_best=1, keep_checkpoints=1, max_steps=4, learning_rate=3e-2)
    history: list[dict[str, np.ndarray]] = []
    folder = tmp_path_factory.mktemp("averaged")
    for steps in range(1, 5):
        part = replace(config, max_steps=steps, lr_schedule="constant")
        found = train(tiny_model(config), tiny_pairs(config), part, output_dir=folder / str(steps), mesh=one_device)
        history.append(leaves(found.model))
    return folder / "4", replace(config, lr_schedule="constant"), history


def test_average_and_best_weights(averaged: Any, one_device: Mesh) -> None:
    folder, config, history = averaged
    start = leaves(tiny_model(config))
    expected = dict(start)
    for after in history:
        expected = {name: 0.5 * value + 0.5 * after[name] for name, value in expected.items()}
    changed = [name for name in start if not np.array_equal(start[name], history[-1][name])]

    def loaded(weights: str) -> dict[str, np.ndarray]:
        settings = replace(config, weights=weights)
        return leaves(load_trained(tiny_model(config), settings, output_dir=folder, mesh=one_device).model)

    for name in changed:
        np.testing.assert_allclose(loaded("ema")[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(loaded("last")[name], history[-1][name])
    # Every step is saved, so the best checkpoint is that of the step with the least loss.
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    best = int(np.argmin(losses)) + 1
    assert (
        best_step(folder / "checkpoints", "loss")
        == best
        == json.loads((folder / "done.json").read_text())["best_step"]
    )
    for name in changed:
        np.testing.assert_array_equal(loaded("best")[name], history[best - 1][name])
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == sorted({best, 4})
    # A finished stage gives the weights that are asked for, without training.
    again = train(
        tiny_model(config),
        tiny_pairs(config),
        replace(config, weights="ema", max_steps=4),
        output_dir=folder,
        mesh=one_device,
    )
    assert again.compilations == 0
    np.testing.assert_array_equal(leaves(again.model)[changed[0]], loaded("ema")[changed[0]])


def test_which_metrics_are_minimised() -> None:
    assert is_minimised("loss") and is_minimised("nll/chosen") and is_minimised("loss/preference")
    assert not is_minimised("rewards/accuracies") and not is_minimised("delta_logps/chosen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "ema"}, "set train.ema_decay"),
        ({"weights": "best"}, "set train.keep_best"),
        ({"weights": "first"}, "best, ema, last"),
        ({"ema_decay": 1.0}, r"ema_decay: must be in \[0, 1\), not 1"),
        ({"keep_best": 1, "log_steps": 2, "save_steps": 1}, "log_steps to at most"),
        ({"collapse_warning": -1.0}, "collapse_warning: must be in"),
        ({"report_to": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"keep_best": 1, "best_metric": "accuracy"}, "'accuracy' is not logged"),
    ],
)
def test_senseless_options_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, one_device: Mesh
) -> None:
    config = base_config(max_steps=1, **changes)
    with pytest.raises(UserError, match=message):
        train(tiny_model(config), tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)


def test_bfloat16_keeps_what_learns_in_float32(tmp_path: Path, one_device: Mesh) -> None:
    """Base weights and computation in bfloat16; factors, moments and averages in float32."""
    from m3po_jax.models import lora

    config = base_config(max_steps=2, ema_decay=0.9)
    model = build(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, seed=0)
    lora.attach(model, config.lora, scope="decoder", rngs=nnx.Rngs(1))
    partition, trainable, frozen = split_model(model, config)
    step = make_step(partition, trainable, config, total_steps=2, mesh=one_device, compute_reference=True)
    state = step.init(trainable)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(place_frozen(frozen, one_device))} == {jnp.dtype("bfloat16")}
    result = train(model, tiny_pairs(config), config, output_dir=tmp_path, mesh=one_device)
    assert result.model.decoder.layers.attention.q_proj.lora_b[...].dtype == jnp.float32
    assert result.model.decoder.layers.attention.q_proj.kernel[...].dtype == jnp.bfloat16
    assert read_metrics(result.metrics_path)[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)


def test_mixed_rows_and_histories_run_through_the_loop(tmp_path: Path, one_device: Mesh) -> None:
    """Text alone, one image, two images and several turns, in one stage."""
    rows = []
    for i in range(8):
        images = [{"bytes": None, "path": str(10 * i + j)} for j in range(i % 3)]
        turns = [*message("user", "who?"), *message("assistant", "me")] if i % 2 else []
        rows.append(
            {
                "id": f"row-{i}",
                "images": images,
                "prompt": [*turns, *message("user", "what?", images=i % 3)],
                "chosen": message("assistant", "abc" + chr(97 + i)),
                "rejected": message("assistant", "xyz" + chr(97 + i)),
            }
        )

    class WithHistory(TinyProcessor):
        def encode_prompt(self, prompt: Any) -> list[int]:
            earlier = "".join(text for turn in prompt.metadata.get("history", []) for text in turn)
            ids = super().encode_prompt(prompt)
            return [*ids, *(3 + ord(letter) % 60 for letter in earlier)]

    config = base_config(max_steps=4, batch_size=4, learning_rate=2e-2)
    source = pair_batches(rows, WithHistory(), batch_size=4, seed=0)
    lengths = {int(source.take([i]).prefix_mask.sum()) for i in range(8)}
    assert len(lengths) == 6  # images and histories are in the prompts
    result = train(tiny_model(config), source, config, output_dir=tmp_path, mesh=one_device)
    lines = read_metrics(result.metrics_path)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[-1]["loss"] < lines[0]["loss"]


def test_times_and_tokens(tmp_path: Path, one_device: Mesh) -> None:
    config = base_config(max_steps=2)
    source = tiny_pairs(config, length_window=2, max_shapes=1)
    result = train(tiny_model(config), source, config, output_dir=tmp_path, mesh=one_device)
    assert result.compilations == 1
    tokens = [int(source.dataset[i].prefix_mask.sum() + source.dataset[i].branch_mask.sum()) for i in range(2)]
    slots = [source.dataset[i].prefix_mask.size + source.dataset[i].branch_mask.size for i in range(2)]
    metrics, times = (read_metrics(tmp_path / f"{name}.jsonl") for name in ("metrics", "timing"))
    assert [line["num_tokens"] for line in metrics] == [tokens[0], sum(tokens)]
    assert [line["padding"] for line in metrics] == pytest.approx(
        [1 - a / b for a, b in zip(tokens, slots, strict=True)]
    )
    assert "step_time" not in metrics[0] and [line["step"] for line in times] == [1, 2]
    for line, count in zip(times, tokens, strict=True):
        assert line["tokens_per_second"] * line["step_time"] == pytest.approx(count)
        assert line["rows_per_second"] * line["step_time"] == pytest.approx(4)
        assert line["flops"] > 0 and line["mfu"] is None  # a CPU's peak is not known
    assert times[0]["compiled"] == 1.0


def test_mfu_is_flops_over_time_and_peak(one_device: Mesh) -> None:
    timer = StepTimer(one_device)
    timer.peak = 1e12
    took = timer.lap(rows=2, tokens=10, flops=3e9, compiled=False)
    assert took["mfu"] == pytest.approx(3e9 / took["step_time"] / 1e12)
    known = [types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
    assert peak_flops(known) == 2 * PEAK_FLOPS["NVIDIA H100 80GB HBM3"]
    assert peak_flops([*known, types.SimpleNamespace(device_kind="abacus")]) is None


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_pairs_inside_a_window_are_counted(window: int | None) -> None:
    back = np.arange(9)[:, None] - np.arange(9)
    seen = (back >= 0) & (back < (window or 9))
    counted = seen_pairs(np.arange(10.0), window)
    np.testing.assert_array_equal(counted, [seen[:tokens].sum() for tokens in range(10)])


@pytest.mark.parametrize("case", ["lora", "full", "vision", "reference"])
def test_analytic_flops_against_the_compiler(case: str, one_device: Mesh) -> None:
    """What XLA counts in the compiled step, at sizes where matrix products dominate and nothing is padded.

    The compiler counts norms, softmax and whole (not causal) attention too, so it comes out a little higher.
    """
    from m3po_jax.data.collation import TreeBatch
    from m3po_jax.models import lora
    from m3po_jax.models.decoder_config import DecoderConfig
    from m3po_jax.models.encoder import EncoderConfig
    from m3po_jax.models.llava.config import LlavaConfig
    from m3po_jax.models.vit import ViTConfig

    shape = LlavaConfig(
        text=DecoderConfig(512, 256, 768, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64),
        vision=ViTConfig("clip", EncoderConfig(192, 512, num_layers=2, num_heads=4), image_size=32, patch_size=8),
        image_token_id=500,
    )
    config = base_config(reference="computed" if case == "reference" else "recorded", batch_size=2)
    if case == "vision":
        config = replace(config, objective="sft", train_vision=True)
    rank = 0 if case in ("full", "vision") else 4
    config = replace(config, lora=LoRAConfig(lora_rank=rank, lora_alpha=4.0))
    model = build(shape, dtype=jnp.float32, param_dtype=jnp.float32, seed=0)
    if rank:
        lora.attach(model, config.lora, scope="decoder", rngs=nnx.Rngs(1))
    partition, trainable, frozen = split_model(model, config)
    branches = 1 if case == "vision" else 2
    prefix = np.full((2, 24), 7, np.int32)
    prefix[:, 1:17] = 500
    batch = TreeBatch(
        prefix_ids=prefix,
        prefix_mask=np.ones((2, 24), bool),
        images=shown(np.zeros((2, 1, 32, 32, 3), np.float32), 16),
        branch_ids=np.full((2, branches, 16), 9, np.int32),
        branch_mask=np.ones((2, branches, 16), bool),
        reference=np.zeros((2, branches), np.float32),
        row_index=np.arange(2, dtype=np.int32),
    )
    cost = step_cost(model, set(trainable))
    assert cost is not None
    reference = case == "reference"
    ours = cost.flops(
        np.array([24, 24]), np.full((2, branches), 16), image_tokens=32, cached_images=False, reference=reference
    )
    step = make_step(partition, trainable, config, total_steps=1, mesh=one_device, compute_reference=reference)
    state = jax.eval_shape(step.init, trainable)
    base = partition.base_weights(trainable) if reference else None
    theirs = step.jitted.lower(state, frozen, base, batch).compile().cost_analysis()["flops"]
    # Below the only layer, adapters need no gradient of the activations; a deep model has one such layer of many.
    assert 0.8 * theirs < ours < (1.15 if rank else 1.02) * theirs, (ours, theirs)
    without = cost.flops(
        np.array([24, 24]), np.full((2, branches), 16), image_tokens=32, cached_images=True, reference=reference
    )
    assert without < ours


def test_tensorboard_reads_what_is_written(tmp_path: Path, one_device: Mesh) -> None:
    """With the real reader; after an interruption the steps beyond the checkpoint are there once."""
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = base_config(max_steps=3, report_to=["tensorboard"], save_steps=2)

    class Killed(BaseException):
        pass

    def die(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    arguments = {"output_dir": tmp_path, "mesh": one_device}
    config = replace(config, max_steps=4)
    with pytest.raises(Killed):
        train(tiny_model(config), tiny_pairs(config), config, on_step=die, **arguments)
    train(tiny_model(config), tiny_pairs(config), config, **arguments)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for key in ("loss", "rewards/margins", "grad_norm", "num_tokens"):
        events = reader.Scalars(key)
        assert [event.step for event in events] == [1, 2, 3, 4]
        np.testing.assert_allclose([event.value for event in events], [line[key] for line in lines], rtol=1e-6)
    assert {"step_time", "tokens_per_second"} <= set(reader.Tags()["scalars"])


def test_wandb_gets_one_run_that_continues(monkeypatch: Any, tmp_path: Path, one_device: Mesh) -> None:
    """With a stand-in that keeps what it is told."""
    started: list[dict[str, Any]] = []
    logged: dict[int, dict[str, float]] = {}

    class Run:
        def log(self, values: dict[str, float], *, step: int) -> None:
            logged[step] = values

        def finish(self) -> None:
            started[-1]["finished"] = True

    def init(**settings: Any) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = base_config(max_steps=3, report_to=["wandb"])

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    arguments = {"output_dir": tmp_path / "round-1", "mesh": one_device}
    with pytest.raises(Interrupted):
        train(tiny_model(config), tiny_pairs(config), config, on_step=stop, **arguments)
    train(tiny_model(config), tiny_pairs(config), config, **arguments)
    assert len(started) == 2 and started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert all(run["finished"] for run in started) and started[0]["config"]["learning_rate"] == 1e-2
    lines = read_metrics(tmp_path / "round-1" / "metrics.jsonl")
    assert sorted(logged) == [1, 2, 3] and logged[3]["loss"] == lines[-1]["loss"]


def test_a_missing_tracker_is_told(monkeypatch: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "x", "settings": {}, "done": 0}
    for module, extra in (("tensorboardX", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install 'm3po-jax\[{extra}\]'"):
            Trackers([extra], tmp_path, first=True, **settings)
        Trackers([extra], tmp_path, first=False, **settings)  # other processes need none


def test_lines_of_a_file_up_to_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.lines(5) == []
    for step in range(1, 4):
        log.write(step, {"loss": 1.0 / step, "note": "ü", "nothing": float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in log.lines(2)] == [1, 2]
    assert log.lines(9)[-1] == {"step": 3, "loss": 1 / 3, "note": "ü", "nothing": None}


def test_the_bar_shows_loss_accuracy_margin_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.25, "grad_norm": 9.0}
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with progress_bar("training", 10, 2) as bar:
        time.sleep(0.15)  # a bar is drawn ten times a second
        bar(3, describe(numbers))
        time.sleep(0.01)
        bar(4, describe(numbers))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in shown.splitlines() if "training" in line]
    assert re.search(r"2/10 +compiling", lines[0]), lines[0]
    assert re.search(r"4/10 +loss 0\.500  accuracy 0\.750  margin 1\.250 +\d+:\d\d:\d\d", lines[-1]), lines[-1]
    with progress_bar("training", 10, 2, enabled=False) as bar:
        bar(3, describe(numbers))
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_line_a_minute_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with progress_bar("training", 5_000, 1_000, clock=lambda: now) as advance:
        for done, seconds in ((1_001, 30.0), (1_011, 40.0), (1_041, 70.0), (1_051, 80.0), (1_200, 131.0)):
            now = seconds
            advance(done, "loss 0.500")
        now = 9_000.0
        advance(5_000)
    # The first step, 30 s of which were the compiler's, does not count: one step takes a second, then half of one.
    assert capsys.readouterr().err.splitlines() == [
        "training: 1,041 of 5,000 (21%), 66 min left, loss 0.500",
        "training: 1,200 of 5,000 (24%), 32 min left, loss 0.500",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5_300, "88 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_said_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
