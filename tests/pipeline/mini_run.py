"""A recipe that goes through every stage in seconds, on images of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from m3po_jax.data import tables
from m3po_jax.quickstart import language
from m3po_jax.quickstart.builder import encode_png
from m3po_jax.quickstart.objects import OBJECTS
from m3po_jax.quickstart.scenes import scene

ROOT = Path(__file__).resolve().parents[2]


def write_data(folder: Path, count: int = 12) -> Path:
    """Scenes as image files and JSON lines: captions, and a yes/no question about every third."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        made = scene("prompts", index)
        name = f"{index:03d}.png"
        (folder / name).write_bytes(encode_png(made.image))
        about = {"objects": list(made.objects), "scene": name}
        row = {"id": f"s{index}", "images": [name], "instruction": language.CAPTION_INSTRUCTION}
        lines.append(row | {"reference": language.caption(made.objects), "metadata": about | {"kind": "caption"}})
        if index % 3 == 0:
            question = language.ExistenceQuestion(made.objects[0], True, "random")
            row = {"id": f"q{index}", "images": [name], "instruction": question.instruction, "reference": "Yes"}
            lines.append(row | {"metadata": about | {"kind": "yesno", "category": "random"}})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, data: Path, **changes: object) -> Path:
    """The mini recipe as YAML; `changes` replace top-level sections' keys (``train={"max_steps": 2}``)."""
    rows = {"source": "jsonl", "path": str(data)}
    recipe: dict[str, object] = {
        "name": "mini",
        "output_dir": str(folder / "runs"),
        "model": {
            "path": "builtin:quickstart-base",
            "dtype": "float32",
            "param_dtype": "float32",
            "template": "plain",
            "image_fit": "stretch",
            "remat": "none",
        },
        "data": dict(rows),
        "generate": {"num_candidates": 4, "max_new_tokens": 20, "batch_size": 4, "shard_rows": 4},
        "score": {
            "backend": "similarity",
            "model": "builtin:quickstart-scorer",
            "aggregate": "soft_f1",
            "vocabulary": list(OBJECTS),
            "confidence": ["mean", "prior"],
            "batch_size": 8,
        },
        "select": {"margin": 0.0, "chosen_floor": 0.0},
        "train": {
            "lora": {"lora_rank": 4, "lora_alpha": 8.0},
            "learning_rate": 1e-3,
            "batch_size": 4,
            "max_steps": 5,
            "max_shapes": 2,
            "max_answer_tokens": 20,
            "save_steps": 2,
        },
        "arms": {"mas_dpo": {"select.rule": "mas_only"}},
        "evaluate": {
            "max_new_tokens": 20,
            "batch_size": 8,
            "stop_bias": [2.0],
            "contrast_alpha": [1.0],
            "bootstrap_samples": 50,
            "benchmarks": {
                "scenes": {"metric": "chair", "kind": "caption", "data": dict(rows), "vocabulary": list(OBJECTS)},
                "questions": {"metric": "pope", "kind": "yesno", "data": dict(rows)},
            },
        },
    }
    for section, values in changes.items():
        current = recipe.get(section)
        recipe[section] = {**current, **values} if isinstance(current, dict) and isinstance(values, dict) else values
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    """For a subprocess: compiles as the tests do, for `devices` simulated CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def m3po(*arguments: str, devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """Starts the command line in a process of its own, with more environment `variables`."""
    return subprocess.Popen(
        [sys.executable, "-m", "m3po_jax.cli", *arguments],
        env=environment(devices) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def rows(folder: Path) -> list[dict]:
    return sorted(tables.read_rows(folder), key=lambda row: (row["id"], row.get("candidate", 0)))


def same_run(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Candidates, scores, pairs, metrics and the final table are equal (floats within `tolerance`)."""
    for stage in ("candidates", "scores", "pairs"):
        first, second = rows(one / "round-1" / stage), rows(other / "round-1" / stage)
        assert [row["id"] for row in first] == [row["id"] for row in second]
        for a, b in zip(first, second, strict=True):
            assert a.keys() == b.keys()
            for key, value in a.items():
                if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
                    np.testing.assert_allclose(
                        value, b[key], rtol=tolerance, atol=tolerance, err_msg=f"{stage} {key}"
                    )
                else:
                    assert value == b[key], (stage, key)
    for arm in (".", "arms/mas_dpo"):
        logs = [
            [json.loads(line) for line in (run / arm / "round-1/metrics.jsonl").read_text().splitlines()]
            for run in (one, other)
        ]
        assert [log["step"] for log in logs[0]] == [log["step"] for log in logs[1]]
        assert [log["step"] for log in logs[0]] == list(range(1, 1 + len(logs[0]))) and len(logs[0]) >= 3
        for a, b in zip(*logs, strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=20 * tolerance, atol=20 * tolerance)
    tables_of = [json.loads((run / "evaluation.json").read_text())["tables"] for run in (one, other)]
    assert tables_of[0] == tables_of[1]
