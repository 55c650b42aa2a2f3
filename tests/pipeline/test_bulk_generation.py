"""Ten thousand prompts: `m3po generate`, killed several times at random, makes what an undisturbed run makes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from mini_run import m3po, rows
from safetensors.numpy import load_file, save_file

from m3po_jax.models.registry import resolve_directory
from m3po_jax.quickstart.builder import encode_png
from m3po_jax.quickstart.scenes import scene

pytestmark = pytest.mark.slow

PROMPTS, SHARD_ROWS, KILLS, SEED = 10_000, 500, 3, 20
SHARDS = PROMPTS // SHARD_ROWS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over prompts of several lengths about one image, and the quickstart's model cut down to one layer."""
    folder = tmp_path_factory.mktemp("bulk")
    base, small = resolve_directory("builtin:quickstart-base"), folder / "model"
    shutil.copytree(base, small)
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    (small / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: x for name, x in weights.items() if not any(f"layers.{n}." in name for n in (1, 2))},
        small / "model.safetensors",
    )
    words = ("a red circle", "two blue squares", "what is left of it?", "describe the image", "yes", "no green star")
    (folder / "scene.png").write_bytes(encode_png(scene("prompts", 0).image))
    draw = random.Random(SEED)
    lines = []
    for index in range(PROMPTS):
        instruction = " ".join(draw.choices(words, k=draw.randint(1, 3)))
        lines.append({"id": f"p{index}", "images": ["scene.png"], "instruction": instruction})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = folder / "bulk.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "bulk",
                "model": {
                    "path": str(small),
                    "dtype": "float32",
                    "param_dtype": "float32",
                    "template": "plain",
                    "image_fit": "stretch",
                },
                "data": {"source": "jsonl", "path": str(folder / "prompts.jsonl")},
                "generate": {
                    "num_candidates": 2,
                    "max_new_tokens": 6,
                    "batch_size": 256,
                    "shard_rows": SHARD_ROWS,
                },
            }
        )
    )
    return path


def start(recipe: Path, runs: Path) -> subprocess.Popen[str]:
    return m3po("generate", "--config", str(recipe), f"output_dir={runs}")


def finished(runs: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in runs.glob("bulk/round-1/candidates/*.parquet")}


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory that the process has in use; 0 where the system does not say, or once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> tuple[Path, dict[int, int]]:
    """The candidates, and the largest memory in use while 1, 2, ... shards were there."""
    runs, memory = recipe.parent / "undisturbed", dict.fromkeys(range(SHARDS + 1), 0)
    process = start(recipe, runs)
    while process.poll() is None:
        count = len(finished(runs))
        memory[count] = max(memory[count], resident(process))
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return runs / "bulk" / "round-1" / "candidates", memory


def test_memory_does_not_grow_with_the_prompts(undisturbed: tuple[Path, dict[int, int]]) -> None:
    """From the second to the fourth quarter 5,000 prompts pass, whose images alone are 240 MB."""
    _, memory = undisturbed
    early, late = (max(memory[n] for n in range(at, at + SHARDS // 4)) for at in (SHARDS // 4, SHARDS * 3 // 4 - 1))
    if not early or not late:
        pytest.skip("the system does not tell what memory a process has in use")
    assert late - early < 64 << 20


def test_killed_runs_end_with_the_rows_of_an_undisturbed_one(
    recipe: Path, undisturbed: tuple[Path, dict[int, int]]
) -> None:
    runs, draw = recipe.parent / "killed", random.Random(SEED)
    kept: dict[str, int] = {}
    for moment in sorted(draw.sample(range(SHARDS - 6), KILLS)):
        process = start(recipe, runs)
        while len(finished(runs)) <= moment and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)  # into the next shards
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -9, "it ended before it was killed"
        now = finished(runs)
        assert kept.items() <= now.items(), "a finished shard was made again"
        kept = now
    process = start(recipe, runs)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert kept.items() <= finished(runs).items() and len(finished(runs)) == SHARDS
    folder = runs / "bulk" / "round-1" / "candidates"
    one, two = rows(undisturbed[0]), rows(folder)
    assert len(one) == len(two) == 2 * PROMPTS
    for a, b in zip(one, two, strict=True):
        # Rounding of log-probs depends on what is decoded beside a prompt, and a restart changes that.
        np.testing.assert_allclose(a.pop("token_logprobs"), b.pop("token_logprobs"), rtol=0, atol=1e-5)
        assert a == b
    assert {row["finish_reason"] for row in one} == {"stop", "length"}
