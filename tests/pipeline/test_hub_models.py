"""Models of the hub: what `validate` asks of it, which commit a run is of, and what another one changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub, running_hub
from mini_run import write_data, write_recipe
from safetensors.numpy import load_file, save_file
from test_borrowed_towers import read, write, write_release, write_tower

from m3po_jax.cli import main
from m3po_jax.config import ModelConfig, Recipe
from m3po_jax.errors import UserError
from m3po_jax.models.hub import pinned
from m3po_jax.models.registry import describe, resolve_directory, stored_tensors
from m3po_jax.pipeline.mock import shrink

BASE, SCORER = map(resolve_directory, ("builtin:quickstart-base", "builtin:quickstart-scorer"))
HEADER = 100_001  # bytes that `huggingface_hub` asks of a file for its header


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running_hub(tmp_path / "cache") as hub:
        yield hub


def other_weights(folder: Path) -> Path:
    """The shipped model with one tensor changed."""
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"] * np.float16(0.5)
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """The shipped model in two files with their index."""
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def recipe_of(folder: Path, **changes: Any) -> str:
    return str(write_recipe(folder, write_data(folder / "data", 2), arms={}, **changes))


def validate(recipe: str, *overrides: str) -> int:
    return main(["validate", "--config", recipe, *overrides])


def test_validate_reads_headers_alone(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    hub.publish("owner/policy", sharded(tmp_path / "sharded"))
    hub.publish("owner/scorer", SCORER)
    hub.publish("owner/clip", write_tower(tmp_path / "clip", patch_size=32))
    recipe = recipe_of(
        tmp_path,
        model={"path": "owner/policy", "vision_tower": "owner/clip"},
        score={"model": "owner/scorer@main", "backend": "similarity"},
    )
    assert validate(recipe) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().err.split())
    count = len(load_file(BASE / "model.safetensors"))
    assert f"no problems: {count} tensors" in said
    weights = {name: size for name, size in hub.bytes_sent.items() if name.endswith(".safetensors")}
    assert len(weights) == 4 and all(size % HEADER == 0 and size <= 3 * HEADER for size in weights.values())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not any(size > 1_000_000 for size in hub.bytes_sent.values())


def test_validate_compares_the_headers_with_the_configuration(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    cases = {
        "owner/wide": ({"hidden_size": 64}, "config.json says"),
        "owner/deep": ({"num_hidden_layers": 4}, "9 tensors are missing"),
    }
    for name, (text, complaint) in cases.items():
        folder = shutil.copytree(BASE, tmp_path / name.replace("/", "-"))
        config = read(folder / "config.json")
        write(folder / "config.json", config | {"text_config": config["text_config"] | text})
        hub.publish(name, folder)
        with pytest.raises(UserError, match=complaint):
            stored_tensors(describe(name, download=False))
    eight = shutil.copytree(BASE, tmp_path / "eight")
    content = (eight / "model.safetensors").read_bytes()
    (eight / "model.safetensors").write_bytes(content.replace(b'"dtype":"F16"', b'"dtype":"I16"'))
    hub.publish("owner/eight", eight)
    with pytest.raises(UserError, match="is stored as I16"):
        stored_tensors(describe("owner/eight", download=False))
    broken = sharded(tmp_path / "broken")
    (broken / "model-00002-of-00002.safetensors").unlink()
    hub.publish("owner/broken", broken)
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        stored_tensors(describe("owner/broken", download=False))
    empty = shutil.copytree(BASE, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    hub.publish("owner/empty", empty)
    with pytest.raises(UserError, match=r"owner/empty@.* holds no weights"):
        stored_tensors(describe("owner/empty", download=False))
    pickled = shutil.copytree(empty, tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("owner/pickled", pickled)
    with pytest.raises(UserError, match=r"holds \.bin weights only, which run code"):
        stored_tensors(describe("owner/pickled", download=False))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_was_fetched_is_read_from_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish("owner/policy", BASE)
    resolve_directory("owner/policy")
    sent = hub.weight_bytes
    stored_tensors(describe("owner/policy", download=False))
    assert sent == (BASE / "model.safetensors").stat().st_size == hub.weight_bytes


def test_revisions(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.publish("owner/policy", BASE, "v1")
    second = hub.publish("owner/policy", other_weights(tmp_path / "other"))

    def commit(name: str) -> str:
        return resolve_directory(name, weights=False).name

    assert commit("owner/policy") == commit("owner/policy@main") == commit(f"owner/policy@{second}") == second
    assert commit(pinned("owner/policy", "v1")) == commit(pinned("owner/policy@v1", "v1")) == first
    assert pinned("owner/policy", "") == "owner/policy"
    with pytest.raises(UserError, match=r"owner/policy@v9: no such directory, and the hub gave: .*404"):
        commit("owner/policy@v9")
    with pytest.raises(UserError, match=r"model\.revision: 'v2', and the path says 'v1'"):
        pinned("owner/policy@v1", "v2")
    recipe = Recipe(model=ModelConfig(path="owner/policy", revision="v1"))
    assert pinned(shrink(recipe).model.path, shrink(recipe).model.revision).startswith("builtin:")
    for path in ("builtin:quickstart-base", str(tmp_path)):
        with pytest.raises(UserError, match="is not a hub id, which alone has revisions"):
            pinned(path, "v1")


def test_a_run_notes_its_commit_and_notices_another(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    first = hub.publish("owner/policy", BASE)
    hub.publish("owner/policy", BASE, "v1")
    recipe = recipe_of(tmp_path, model={"path": "owner/policy"}, generate={"max_new_tokens": 4})
    generate = ["generate", "--config", recipe]
    assert main(generate) == 0
    manifest = tmp_path / "runs/mini/manifest.json"
    assert read(manifest)["model"]["commit"] == first
    rows = (tmp_path / "runs/mini/round-1/candidates").rglob("*")
    before = {file.name: file.read_bytes() for file in rows if file.is_file()}
    second = hub.publish("owner/policy", other_weights(tmp_path / "other"))
    capsys.readouterr()
    assert main([*generate, "model.revision=v1"]) == 0
    assert "has changed" not in capsys.readouterr().err and read(manifest)["model"]["commit"] == first
    third = hub.publish("owner/policy", shutil.copytree(BASE, tmp_path / "same"), "again")
    assert main([*generate, "model.revision=again"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "model: another path or commit than this run began with, of the same content" in said
    assert read(manifest)["model"]["commit"] == third
    assert main(generate) == 0
    assert "has changed" in capsys.readouterr().err and read(manifest)["model"]["commit"] == second
    rows = (tmp_path / "runs/mini/round-1/candidates").rglob("*")
    assert {file.name: file.read_bytes() for file in rows if file.is_file()} != before


def test_an_adapter_names_the_commit_of_its_base(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    first = hub.publish("owner/policy", BASE, "v1")
    hub.publish("owner/policy", other_weights(tmp_path / "other"))
    train = {"objective": "sft", "batch_size": 2, "max_steps": 1, "max_shapes": 1}
    recipe = recipe_of(tmp_path, model={"path": "owner/policy", "revision": "v1"}, train=train)
    assert main(["train", "--config", recipe]) == 0
    assert main(["export", "--config", recipe, "--format", "peft"]) == 0
    exported = tmp_path / "runs/mini/export-round-1-peft"
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/policy", first)
    assert "base_model: owner/policy\n" in (exported / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", "--config", recipe, "model.revision=main", "--output", str(tmp_path / "x")]) == 2
    assert "model.revision='main', and the run was trained with 'v1'" in capsys.readouterr().err


def test_a_release_on_the_hub_finds_its_tower_there(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish("owner/release", write_release(tmp_path / "release", mm_vision_tower="owner/clip"))
    with pytest.raises(UserError, match=r"owner/clip: config.json takes the vision tower .*; set model.vision_tower"):
        describe("owner/release", download=False)
    hub.publish("owner/clip", write_tower(tmp_path / "clip"))
    assert len(stored_tensors(describe("owner/release", download=False))) == len(
        load_file(BASE / "model.safetensors")
    )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
