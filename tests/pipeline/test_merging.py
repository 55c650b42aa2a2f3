"""The `merge` verb: adapters that PEFT wrote, merged as PEFT merges them, and everything that is in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3po_jax.cli import main
from m3po_jax.models.registry import resolve_directory
from m3po_jax.models.safetensors_io import open_directory
from m3po_jax.pipeline import merging

SHIPPED = resolve_directory("builtin:quickstart-base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A base, an adapter that PEFT wrote on it, and PEFT's own merged tensors."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("peft")
    base = shutil.copytree(SHIPPED, folder / "base")
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder / "theirs")
    return base, folder / "adapter", {k: v.numpy() for k, v in merged.state_dict().items()}


def merge(*arguments: Any) -> int:
    return main(["merge", *map(str, arguments)])


def test_a_merged_model_is_what_peft_merges(trained: tuple[Path, Path, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    base, adapter, theirs = trained
    output = tmp_path / "merged"
    assert merge("--adapter", adapter, "--output", output, "--dtype", "float32", f"model.path={base}") == 0
    ours = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), value, atol=1e-6, err_msg=name)
    stored, original = open_directory(output), open_directory(base)
    changed = [name for name in original if not np.array_equal(stored[name].read(), original[name].read())]
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    assert merge("--adapter", adapter, "--output", output, "--dtype", "float32", f"model.path={base}") == 0, "again"


def test_the_base_is_what_the_adapter_names(
    trained: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = trained
    assert merge("--adapter", adapter, "--output", tmp_path / "merged") == 0
    assert f"names {base} as its base model" in capsys.readouterr().err
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert merge("--adapter", nameless, "--output", tmp_path / "other") == 2
    assert "does not name its base model; name it: model.path=" in capsys.readouterr().err


def test_what_is_in_the_way_stays(
    trained: tuple[Path, Path, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter, _ = trained
    monkeypatch.setattr(merging, "load_model", lambda *_, **__: pytest.fail("refused before weights are read"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for output, words in (
        (tmp_path / "full", "holds something else than this export"),
        (base, "which an export must not replace"),
        (adapter, "which an export must not replace"),
    ):
        assert merge("--adapter", adapter, "--output", output, f"model.path={base}") == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    monkeypatch.undo()
    assert merge("--adapter", base, "--output", tmp_path / "merged", f"model.path={base}") == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def test_an_adapter_in_a_models_place_says_how_to_merge_it(
    trained: tuple[Path, Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, _ = trained
    assert merge("--adapter", adapter, "--output", tmp_path / "merged", f"model.path={adapter}") == 2
    message = capsys.readouterr().err
    assert "is a PEFT adapter, not a model" in message and f"`m3po merge --adapter {adapter} --output" in message
