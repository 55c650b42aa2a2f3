"""The whole loop on a handful of scenes: what it writes, that it resumes, and that it is the same anywhere."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mini_run import m3po, rows, same_run, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.data import dual_inputs, tables
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.models import processor as processors
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline import gate as gates
from m3po_jax.pipeline.run import Run


class Counts:
    """What an undisturbed run does to its prompts and images, by stage."""

    def __init__(self) -> None:
        self.stage = ""
        self.tokenised: list[tuple[str, str]] = []  # stage, prompt
        self.decoded: list[tuple[str, str]] = []  # stage, image; the judge's processor reads them for itself

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("generate", "score", "select", "train", "evaluate"):
            self._watch_stage(patch, name)
        self._watch_stage(patch, "evaluate", "evaluate_base")
        render = Processor.render

        def rendered(processor: Processor, prompt: Prompt) -> Any:
            self.tokenised.append((self.stage, prompt.id))
            return render(processor, prompt)

        patch.setattr(Processor, "render", rendered)
        for module in (processors, dual_inputs):
            patch.setattr(module, "decode", self._decoding(module.decode))

    def _decoding(self, decode: Any) -> Any:
        def decoded(image: Image, **options: Any) -> Any:
            self.decoded.append((self.stage, image.path or ""))
            return decode(image, **options)

        return decoded

    def _watch_stage(self, patch: pytest.MonkeyPatch, name: str, method: str = "") -> None:
        whole = getattr(Run, method or f"{name}_stage")

        def stage(run: Run, *given: Any, **options: Any) -> Any:
            before, self.stage = self.stage, name
            try:
                return whole(run, *given, **options)
            finally:
                self.stage = before

        patch.setattr(Run, whole.__name__, stage)


FAILED_VERDICT = {
    "benchmark": "any",
    "label": "any",
    "digits": 1,
    "allowed": 1.0,
    "base": 80.0,
    "value": 70.0,
    "drop": 10.0,
    "low": 5.0,
    "high": 15.0,
    "outcome": "failed",
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counts]:
    """The run directory of an undisturbed run, and what it did to its prompts and images."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, write_data(folder / "data"))
    counts = Counts()
    with pytest.MonkeyPatch.context() as patch:
        counts.watch(patch)
        assert main(["run", "--config", str(recipe)]) == 0
    return folder / "runs" / "mini", counts


@pytest.fixture(scope="module")
def finished(counted: tuple[Path, Counts]) -> Path:
    return counted[0]


def test_a_prompt_is_tokenised_once_and_an_image_decoded_once_a_stage(counted: tuple[Path, Counts]):
    """Sixteen prompts about twelve images, two arms, five systems on two benchmarks with these prompts."""
    _, counts = counted
    tokenised = Counter(counts.tokenised)
    assert Counter(stage for stage, _ in tokenised) == {"generate": 16, "evaluate": 16}  # prompts, and questions
    assert set(tokenised.values()) == {1}
    decoded = Counter(counts.decoded)
    assert set(decoded.values()) == {1}
    of_stage = Counter(stage for stage, _ in decoded)
    assert of_stage["generate"] == of_stage["score"] == 12 and of_stage["select"] == 0
    assert 0 < of_stage["train"] <= 12 and of_stage["evaluate"] == 0  # they are those of the prompts, and kept


def test_every_stage_leaves_what_the_design_promises(finished: Path):
    round_1 = finished / "round-1"
    candidates, scores = rows(round_1 / "candidates"), rows(round_1 / "scores")
    assert len(candidates) == len(scores) == 4 * 16
    for candidate, score in zip(candidates, scores, strict=True):
        assert len(candidate["token_ids"]) == len(candidate["token_logprobs"]) > 0
        assert max(candidate["token_logprobs"]) <= 0
        mean = float(np.mean(candidate["token_logprobs"]))
        assert score["confidence"] == pytest.approx(mean, abs=1e-5) and 0 <= score["mas"] <= 1
        assert score["mas_similarity"] == score["mas"] and np.isfinite(score["confidence_prior"])
    summary = json.loads((round_1 / "pairs" / "summary.json").read_text())
    drops = [json.loads(line) for line in (round_1 / "pairs" / "drops.jsonl").read_text().splitlines()]
    pairs = rows(round_1 / "pairs")
    assert len(pairs) == summary["kept"] and len(pairs) + len(drops) == summary["prompts"] == 16
    by_key = {(row["id"], row["candidate"]): row for row in candidates}
    for pair in pairs:
        chosen = by_key[pair["id"], pair["chosen_candidate"]]
        assert pair["chosen_token_ids"] == chosen["token_ids"]
        assert pair["reference_chosen_logprobs"] == chosen["token_logprobs"]
        assert pair["images"][0]["bytes"].startswith(b"\x89PNG")
        assert pair["chosen"][0]["content"][0]["text"] == chosen["text"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {stage["stage"] for stage in manifest["stages"]} == {"generate", "score", "select", "train", "evaluate"}
    assert manifest["model"]["hash"] and manifest["data"]["rows"] == 16 and manifest["versions"]["jax"]
    table = json.loads((finished / "evaluation.json").read_text())["tables"][0]
    names = [row["name"] for row in table["rows"]]
    assert names == ["base", "base, stop bias +2", "vcd α=1", "mas_dpo", "m3po"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "mas_dpo" in page and "<script src" not in page


def test_first_step_has_the_closed_form_loss(finished: Path):
    first = json.loads((finished / "round-1" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)


def test_batches_come_in_the_recipes_shapes(finished: Path):
    read = lambda name: [json.loads(line) for line in (finished / "round-1" / name).read_text().splitlines()]  # noqa: E731
    assert all(0 <= line["padding"] < 0.5 for line in read("metrics.jsonl"))
    assert 1 <= sum(line["compiled"] for line in read("timing.jsonl")) <= 2  # train.max_shapes


def test_trl_and_datasets_open_the_pairs(finished: Path):
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in tables.shards(finished / "round-1" / "pairs")]
    loaded = datasets.Dataset.from_parquet(files)
    assert {"images", "prompt", "chosen", "rejected"} <= set(loaded.column_names)
    assert loaded[0]["prompt"][0]["content"][0]["type"] == "image"


def test_a_second_call_does_nothing_new(finished: Path, capsys: pytest.CaptureFixture[str]):
    watched = [path for path in finished.rglob("*") if path.is_file() and path.name not in ("report.html", ".lock")]
    before = {path: path.stat().st_mtime_ns for path in watched if "evaluation." not in path.name}
    assert main(["run", "--config", str(finished.parents[1] / "mini.yaml")]) == 0
    changed = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert [path.name for path in changed if path.name not in ("manifest.json", "calibration.json")] == []


def test_a_gate_is_decided_after_everything_is_written(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It may join a finished run, judges the run's own system alone, and has an exit status of its own."""
    recipe = str(finished.parents[1] / "mini.yaml")
    gated = ["run", "--config", recipe, "evaluate.gate={questions.accuracy: {drop: 100}, scenes.recall: {}}"]
    monkeypatch.setattr(gates, "decide", lambda guarded, *_, **__: {**FAILED_VERDICT, "key": guarded.key})
    (finished / "report.html").unlink()
    assert main(gated) == 3
    shown = capsys.readouterr()
    failed = "m3po, {}: failed, 80.0 to 70.0, a drop of 10.0 (paired interval 5.0 to 15.0), beyond the allowed 1"
    for key in ("questions.accuracy", "scenes.recall"):
        assert f"m3po: gate: {failed.format(key)}\n" in shown.err and f"Gate: {failed.format(key)}.\n" in shown.out
    assert "gate: mas_dpo" not in shown.err and "Gate: mas_dpo, questions.accuracy: failed" in shown.out
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Regression gate: failed" in page and failed.format("scenes.recall") in page
    verdicts = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))["gate"]
    systems = [(entry["system"], entry["decides"]) for entry in verdicts]
    assert systems == [("m3po", True)] * 2 + [("mas_dpo", False)] * 2
    monkeypatch.undo()
    assert main(["run", "--config", recipe, "evaluate.gate={questions.accuracy: {drop: 100}}"]) == 0
    assert "Regression gate: passed" in (finished / "report.html").read_text(encoding="utf-8")
    assert "questions.accuracy: passed" in capsys.readouterr().out
    assert main(["run", "--config", recipe, "evaluate.gate={questions.acuracy: {drop: 1}}"]) == 2
    assert "did you mean 'accuracy'?" in capsys.readouterr().err
    assert main(["run", "--config", recipe]) == 0
    assert "Gate" not in capsys.readouterr().out
    assert "Regression gate" not in (finished / "report.html").read_text(encoding="utf-8")


def test_another_recipe_is_refused_in_the_same_folder(finished: Path, capsys: pytest.CaptureFixture[str]):
    """One that would keep nothing of what is there; others redo what depends on them (test_out_of_date.py)."""
    assert main(["run", "--config", str(finished.parents[1] / "mini.yaml"), "seed=5"]) == 2
    assert "holds a run of another recipe (it has 'seed: 0', this one 'seed: 5'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "round-1/candidates/00001-*.parquet"),
        (signal.SIGTERM, "round-1/candidates/00000-*.parquet"),
        (signal.SIGKILL, "round-1/scores/00000-*.parquet"),
        (signal.SIGKILL, "round-1/checkpoints/2"),
        (signal.SIGTERM, "round-1/checkpoints/2"),
        (signal.SIGKILL, "round-0/evaluation/scenes/items.jsonl"),
    ],
)
def test_a_killed_run_ends_with_the_same_result(finished: Path, tmp_path: Path, number: signal.Signals, moment: str):
    data = finished.parents[1] / "data" / "prompts.jsonl"
    recipe = write_recipe(tmp_path, data)
    run = tmp_path / "runs" / "mini"
    process = m3po("run", "--config", str(recipe))
    deadline = time.monotonic() + 300
    while not list(run.glob(moment)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    if number == signal.SIGTERM:
        assert process.returncode in (75, 0), errors
        assert process.returncode == 0 or "the same command continues" in errors
    kept = {path: path.stat().st_mtime_ns for path in run.glob("round-1/candidates/*.parquet")}
    again = m3po("run", "--config", str(recipe))
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()), "a finished shard was made again"
    # Prompts that are left are decoded beside others than before, which rounds their log-probs differently.
    same_run(finished, run, tolerance=1e-5 if "candidates" in moment else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["mesh.data=8", "mesh.data=2 mesh.fsdp=2 mesh.tensor=2"])
def test_eight_devices_give_the_same_run(finished: Path, tmp_path: Path, mesh: str):
    recipe = write_recipe(tmp_path, finished.parents[1] / "data" / "prompts.jsonl")
    process = m3po("run", "--config", str(recipe), *mesh.split(), devices=8)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    same_run(finished, tmp_path / "runs" / "mini", tolerance=2e-3)


def test_stages_by_themselves_make_the_same_run(finished: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, finished.parents[1] / "data" / "prompts.jsonl")
    for verb in ("generate", "score", "select", "train"):
        assert main([verb, "--config", str(recipe)]) == 0
    other = tmp_path / "runs" / "mini"
    for stage in ("candidates", "scores", "pairs"):
        assert rows(finished / "round-1" / stage) == rows(other / "round-1" / stage)
    assert (finished / "round-1/metrics.jsonl").read_text() == (other / "round-1/metrics.jsonl").read_text()


def test_export_loads_in_transformers_and_peft(finished: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    recipe = str(finished.parents[1] / "mini.yaml")
    merged, adapter, base = tmp_path / "merged", tmp_path / "adapter", tmp_path / "base"
    assert main(["export", "--config", recipe, "--output", str(merged), "--dtype", "float32"]) == 0
    assert main(["export", "--config", recipe, "--format", "peft", "--output", str(adapter)]) == 0
    whole = LlavaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()

    from peft import PeftModel

    from m3po_jax.models.registry import resolve_directory

    base = resolve_directory("builtin:quickstart-base")
    adapted = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32), adapter
    )
    image = (
        whole.config.image_token_index if hasattr(whole.config, "image_token_index") else whole.config.image_token_id
    )
    ids = torch.tensor([[1, 20, *[image] * 16, 21, 22, 23]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = whole(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        two = adapted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        with adapted.disable_adapter():
            start = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    assert (one - two).abs().max() < 1e-3
    assert (one - start).abs().max() > 1e-3, "training changed nothing"


def test_json_lines_in_and_out_of_select(finished: Path, tmp_path: Path):
    scores = {(row["id"], row["candidate"]): row for row in rows(finished / "round-1" / "scores")}
    joined = [row | scores[row["id"], row["candidate"]] for row in rows(finished / "round-1" / "candidates")]
    tables.write_json_lines(tmp_path / "scored.jsonl", joined)
    arguments = ["--input", str(tmp_path / "scored.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]
    assert main(["select", *arguments, "select.margin=0.0", "select.chosen_floor=0.0"]) == 0
    made = {row["id"]: row for _, row in tables.read_json_lines(tmp_path / "pairs.jsonl")}
    for pair in rows(finished / "round-1" / "pairs"):
        assert made[pair["id"]]["chosen_candidate"] == pair["chosen_candidate"]
        assert made[pair["id"]]["rejected_candidate"] == pair["rejected_candidate"]


def test_pairs_table_has_the_schema(finished: Path):
    from m3po_jax.data.schema import PAIR

    assert pq.read_schema(tables.shards(finished / "round-1" / "pairs")[0]).equals(PAIR)
