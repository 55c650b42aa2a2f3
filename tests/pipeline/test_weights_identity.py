"""What hangs on a model's identity: candidates, judges and borrowed towers change when weights are replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mini_run import write_data, write_recipe
from safetensors.numpy import load_file, save_file

from m3po_jax.cli import main
from m3po_jax.config import ScoreConfig
from m3po_jax.models.registry import describe, resolve_directory
from m3po_jax.pipeline.backends import judge_identities
from m3po_jax.pipeline.models import model_identity


def change_projector(directory: Path) -> None:
    """Another projector under the old name, size and shapes: tensors that lie in the middle of the file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if "multi_modal_projector" in name or "text_model" in name]
    assert names
    for name in names:
        tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_directory("builtin:quickstart-base"), tmp_path / "model"))


def test_candidates_of_replaced_weights_are_drawn_anew(model_directory: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, write_data(tmp_path / "data", 2)))
    command = ["generate", "--config", recipe, f"model.path={model_directory}", "generate.num_candidates=2"]

    def candidates() -> set[str]:
        assert main(command) == 0
        return {path.name for path in (tmp_path / "runs/mini/round-1/candidates").glob("*.parquet")}

    before = candidates()
    assert candidates() == before
    change_projector(model_directory)
    assert not candidates() & before


@pytest.mark.parametrize(("backend", "shipped"), [("claims", "quickstart-base"), ("similarity", "quickstart-scorer")])
def test_a_replaced_judge_is_another_judge(backend: str, shipped: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(resolve_directory(f"builtin:{shipped}"), tmp_path / "judge"))
    alone = ScoreConfig(backend=backend, model=str(directory))
    member = ScoreConfig(backend="ensemble", members=[f"{backend}={directory}", "claims"])
    before = judge_identities(alone), judge_identities(member)
    change_projector(directory)
    after = judge_identities(alone), judge_identities(member)
    assert before[0] == before[1] and after[0] == after[1] and before[0] != after[0]


def test_a_borrowed_tower_counts_named_by_the_recipe_or_by_the_model(model_directory: Path, tmp_path: Path) -> None:
    tower = Path(shutil.copytree(model_directory, tmp_path / "tower"))
    raw = json.loads((model_directory / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**raw["vision_config"], "model_type": "clip_vision_model"}))
    text = raw["text_config"]
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(
        json.dumps({**text, "model_type": "llava_llama", "mm_vision_tower": str(tower), "mm_hidden_size": 1}
                   | {"mm_projector_type": "mlp2x_gelu", "vocab_size": 32000})
    )  # fmt: skip
    ways = [describe(model_directory, vision_tower=tower), describe(original)]
    before = [model_identity(way) for way in ways]
    assert all(way.tower == tower for way in ways)
    (tower / "model.safetensors").write_bytes((tower / "model.safetensors").read_bytes()[:-1] + b"\x01")
    assert all(model_identity(way) != then for way, then in zip(ways, before, strict=True))
