"""The whole loop on cached features, with Qwen3-VL (sizes of images, features for several layers), SmolVLM (tiles in
named rows and columns) and Gemma 3 (crops of images, image tokens that see each other)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from mini_run import rows, write_recipe

from m3po_jax.cli import main
from m3po_jax.config import DataConfig, MeshConfig
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.sources import read_prompts
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import load_model
from m3po_jax.pipeline.caches import image_features
from m3po_jax.pipeline.generate import prompt_batches

sys.path.append(str(Path(__file__).parents[1] / "models"))
import hf_gemma3
import hf_idefics3
import hf_qwen

SIZES = {
    "qwen3_vl": [(60, 12), (9, 70), (32, 32), (48, 40), (37, 29), (48, 32)],
    "smolvlm": [(60, 12), (9, 70), (32, 32), (48, 40), (37, 29), (48, 32)],
    "gemma3": [(620, 300), (9, 70), (270, 1101), (48, 40), (310, 600), (48, 32)],
}


def write_data(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Pictures of several sizes; every fourth row shows two."""
    folder.mkdir()
    lines = []
    for number in range(8):
        hf_qwen.picture(*sizes[number % len(sizes)], seed=number).save(folder / f"{number}.png")
        names = [f"{number}.png", *([f"{number - 1}.png"] if number % 4 == 3 else [])]
        row = {"id": f"s{number}", "images": names, "instruction": "What is in the image?", "reference": "a red bus"}
        lines.append(json.dumps(row | {"metadata": {"kind": "caption", "objects": ["bus"]}}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module", params=tuple(SIZES))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder, kind = tmp_path_factory.mktemp("run"), request.param
    if kind == "gemma3":
        hf_gemma3.saved(folder / "model")
    elif kind == "smolvlm":
        hf_idefics3.saved(kind, folder / "model")
    else:
        hf_qwen.saved(kind, folder / "model")
    data = write_data(folder / "data", SIZES[kind])
    chair = {"metric": "chair", "kind": "caption", "data": {"path": str(data)}, "vocabulary": ["bus"]}
    recipe = write_recipe(
        folder,
        data,
        model={"path": str(folder / "model"), "template": "chat", "pan_and_scan": kind == "gemma3"},
        generate={"num_candidates": 3, "max_new_tokens": 6, "temperature": 1.5},
        score={"backend": "claims", "model": "", "vocabulary": [], "aggregate": "mean", "batch_size": 4},
        select={"margin": 0.0, "chosen_floor": 0.0, "cut": "keep", "rule": "vanilla"},
        train={"max_steps": 2, "batch_size": 2, "reference_check_rows": 8},
        arms={},
        cache={"vision_features": "auto"},
        evaluate={"max_new_tokens": 6, "stop_bias": [], "benchmarks": {"scenes": chair}},
    )
    text = recipe.read_text().replace("arms:\n  mas_dpo:\n    select.rule: mas_only\n", "")
    recipe.write_text(text)
    assert main(["run", "--config", str(recipe), "data.image_buckets=2"]) == 0
    return folder


def test_the_first_loss_has_its_closed_form(finished: Path):
    round_1 = finished / "runs/mini/round-1"
    first = json.loads((round_1 / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert all(np.isfinite(row["confidence_prior"]) for row in rows(round_1 / "scores"))


def test_recorded_log_probs_are_those_of_teacher_forcing(finished: Path):
    """Of drawing with images in rows of the run's sizes, against scoring each prompt unpadded."""
    loaded = load_model(finished / "model", dtype="float32", param_dtype="float32")
    crops = loaded.family.name == "gemma3"
    processor = Processor.from_pretrained(
        finished / "model", "chat", "pad", image_root=finished / "data", pan_and_scan=crops
    )
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    scorer = Scorer(loaded.model, mesh, batch_size=1)
    prompts = read_prompts(DataConfig(path=str(finished / "data/rows.jsonl")))
    candidates = rows(finished / "runs/mini/round-1/candidates")
    for batch in prompt_batches([prompts[3], prompts[4]], processor, 1):
        for row in candidates:
            if row["id"] == batch.ids[0]:
                ids = np.array(row["token_ids"], np.int32)[None, None]
                scored = scorer.log_probs(batch, ids, np.ones(ids.shape, bool))
                np.testing.assert_allclose(scored[0, 0], row["token_logprobs"], rtol=0, atol=1e-4)


def test_few_programs_see_many_sizes(tmp_path: Path, compiled: list[str]):
    """Forty sizes of images in at most two widths of the tower."""
    _, loaded = hf_qwen.saved("qwen3_vl", tmp_path)
    processor = Processor.from_pretrained(tmp_path, "chat", "pad")
    sizes = np.random.default_rng(0).integers(8, 60, (40, 2)).tolist()
    prompts = [hf_qwen.prompt(str(n), "a red bus", tuple(size)) for n, size in enumerate(sizes)]
    processor = processor.with_buckets(prompts, 2)
    graph, state = nnx.split(loaded.model)
    tokens = padded = 0
    for prompt in prompts:
        images = stacked([joined(processor.images(prompt), processor.image_buckets)])
        padded += image_features(graph, state, images).shape[1]
        tokens += images["tokens"].sum()
    assert compiled.count("image_features") <= 2
    assert len({plan.tokens for prompt in prompts for plan in processor.image_plans(prompt)}) > 10
    assert tokens / padded > 0.6
