"""The `export` verb: what the run trained, under a name of its own, and nothing that says otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mini_run import write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.models.identity import directory_identity
from m3po_jax.models.registry import resolve_directory
from m3po_jax.models.safetensors_io import open_directory, read_header
from m3po_jax.pipeline.arms import arm_recipe
from m3po_jax.pipeline.train import trained_settings
from m3po_jax.recipes import load_recipe
from m3po_jax.workspace.training import TrainingArtifact

SHIPPED = resolve_directory("builtin:quickstart-base")
ADAPTER = {"lora_rank": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of SFT on rows and its finished run, whose data is gone."""
    folder = tmp_path_factory.mktemp("trained")
    base = shutil.copytree(SHIPPED, folder / "base")
    (base / "README.md").write_text("# the base")
    train = {"objective": "sft", "batch_size": 2, "max_steps": 1, "max_shapes": 1, "lora": ADAPTER}
    recipe = write_recipe(folder, write_data(folder / "data", 2), train=train, model={"path": str(base)})
    content = yaml.safe_load(recipe.read_text()) | {"arms": {"sft": {}, "wide": {"train.lora.lora_alpha": 8.0}}}
    recipe.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(recipe)]) == 0
    shutil.rmtree(folder / "data")
    run = folder / "runs/mini"
    # Other rounds and arms have the same shapes; what is in them is not what is tested.
    record = TrainingArtifact(run).read()
    assert record is not None
    for arm, place in ((None, "round-2"), ("sft", "arms/sft/round-1"), ("wide", "arms/wide/round-1")):
        (run / place).mkdir(parents=True)
        shutil.copytree(run / "checkpoints", run / place / "checkpoints")
        shutil.copy(run / "done.json", run / place)
        made_by = arm_recipe(load_recipe(recipe), arm)
        settings = trained_settings(made_by.model, made_by.train, made_by.seed)
        TrainingArtifact(run / place).finish(record.inputs | settings, {})
    return folder


@pytest.fixture
def export(trained: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the verb on the trained run; returns what it says."""

    def run(*arguments: str, status: int = 0, recipe: bool = True) -> str:
        config = ["--config", str(trained / "mini.yaml")] if recipe else []
        place = [f"output_dir={trained / 'runs'}", "name=mini"]
        capsys.readouterr()
        assert main(["export", *config, *place, *arguments]) == status
        return capsys.readouterr().err

    return run


def test_every_system_has_an_export_of_its_own(trained: Path, export: Callable[..., str]) -> None:
    run = trained / "runs/mini"
    for arguments, name in (
        ([], "export-round-1-huggingface"),
        (["--round", "2"], "export-round-2-huggingface"),
        (["--arm", "sft"], "export-sft-round-1-huggingface"),
        (["--arm", "wide", "--format", "peft"], "export-wide-round-1-peft"),
        (["--format", "peft"], "export-round-1-peft"),
    ):
        assert f"exported to {run / name}" in export(*arguments)
        record = json.loads((run / name / "m3po_export.json").read_text())
        assert (record["arm"], record["round"], record["format"]) == (
            arguments[1] if "--arm" in arguments else None,
            2 if "--round" in arguments else 1,
            name.rpartition("-")[2],
        )
    # The arm's own alpha, not the recipe's.
    assert json.loads((run / "export-wide-round-1-peft/adapter_config.json").read_text())["lora_alpha"] == 8.0
    assert json.loads((run / "export-round-1-peft/adapter_config.json").read_text())["lora_alpha"] == 4.0


def test_another_export_is_replaced_only_where_that_is_asked(
    trained: Path, export: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export("--output", str(out))
    before = directory_identity(out)
    (out / "model.safetensors").write_bytes(b"damaged")
    export("--output", str(out))  # the same export heals it
    assert directory_identity(out) == before
    for arguments, reason in (
        (["--arm", "sft"], "arm is None, here 'sft'"),
        (["--round", "2"], "round is 1, here 2"),
        (["--dtype", "bfloat16"], "dtype is 'auto', here 'bfloat16'"),
        (["--format", "peft"], "format is 'huggingface', here 'peft'"),
    ):
        said = export("--output", str(out), *arguments, status=2)
        assert f"holds another export ({reason}); choose another --output, or give --overwrite" in said
        assert said.count("\n") == 1 and directory_identity(out) == before
    export("--output", str(out), "--format", "peft", "--overwrite")
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "m3po_export.json")
    }


def test_a_folder_that_is_no_export_is_never_replaced(
    trained: Path, export: Callable[..., str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    assert "give --overwrite" in export("--output", str(mine), status=2)
    assert "holds no model, and is not replaced" in export("--output", str(mine), "--overwrite", status=2)
    for place in (trained, trained / "runs/mini", trained / "base", Path.cwd()):
        assert "must not replace" in export("--output", str(place), "--overwrite", status=2)
    assert (mine / "thesis.txt").exists() and (trained / "base/config.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lora.lora_alpha=8", "train.lora.lora_alpha=8.0, and the run was trained with 4.0"),
        ("train.lora.lora_rank=4", "train.lora.lora_rank=4, and the run was trained with 2"),
        ("train.lora={lora_rank: 4}", "train.lora.lora_rank=4, and the run was trained with 2"),
        ("train.lora.target_modules=[k_proj]", "target_modules=['k_proj'], and the run was trained with ['q_proj']"),
        ("train.lora.train_projector=true", "train_projector=True, and the run was trained with False"),
        ("model.path=builtin:quickstart-base", "model.path='builtin:quickstart-base', and the run was trained with"),
        ("model.template=hf", "model.template='hf', and the run was trained with 'plain'"),
        ("model.image_fit=pad", "model.image_fit='pad', and the run was trained with 'stretch'"),
        ("seed=3", "seed=3, and the run was trained with 0"),
    ],
)
def test_a_contradiction_of_the_run_is_refused(export: Callable[..., str], setting: str, message: str) -> None:
    for arguments in ([], ["--format", "peft"]):
        said = export(setting, *arguments, status=2)
        assert message in said and "leave it out: an export takes it from the run" in said


def test_what_is_not_stated_is_the_runs(trained: Path, export: Callable[..., str], tmp_path: Path) -> None:
    """No recipe, other data, another mesh: the adapter is the one that was trained."""
    export("--format", "peft", "--output", str(tmp_path / "a"), "data.path=/nowhere", "mesh.fsdp=1", recipe=False)
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 4.0)
    assert written["base_model_name_or_path"] == str(trained / "base")
    assert written["target_modules"].endswith("(q_proj)")
    export("--output", str(tmp_path / "b"), "--arm", "wide", recipe=False)
    assert "unknown arm 'wider' (did you mean 'wide'?)" in export("--arm", "wider", status=2, recipe=False)
    assert "no finished training" in export("--round", "3", status=2)
    assert "holds no recipe of a run" in export("name=absent", status=2)


def test_a_moved_base_is_known_by_its_content(trained: Path, export: Callable[..., str], tmp_path: Path) -> None:
    """Where the run has noted what its base was; other weights under the same path are refused."""
    run = trained / "runs/mini"
    noted = json.loads((run / "manifest.json").read_text())
    export("--output", str(tmp_path / "a"))
    identity = json.loads((tmp_path / "a/m3po_export.json").read_text())["base"]
    with_base = noted | {"model": {"path": str(trained / "base"), "hash": identity}}
    (run / "manifest.json").write_text(json.dumps(with_base))
    try:
        moved = shutil.copytree(trained / "base", tmp_path / "moved")
        export("--output", str(tmp_path / "b"), f"model.path={moved}")
        content = bytearray((moved / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (moved / "model.safetensors").write_bytes(content)
        said = export("--output", str(tmp_path / "c"), f"model.path={moved}", status=2)
        assert f"{moved}: the base model's files have changed since this run was trained on them" in said
    finally:
        (run / "manifest.json").write_text(json.dumps(noted))


def test_the_model_card_is_the_exports_own(trained: Path, export: Callable[..., str], tmp_path: Path) -> None:
    export("--output", str(tmp_path / "a"))
    export("--output", str(tmp_path / "b"), "--format", "peft", "--arm", "wide")
    for name, library, alpha in (("a", "transformers", "4"), ("b", "peft", "8")):
        _, header, body = (tmp_path / name / "README.md").read_text().split("---\n", 2)
        fields = yaml.safe_load(header)
        assert fields["library_name"] == library and fields["pipeline_tag"] == "image-text-to-text"
        assert fields["tags"] == ["m3po_jax", "sft", "lora"] and "base_model" not in fields  # a local folder
        assert f"| LoRA alpha | {alpha} |" in body and "| prompt template | plain |" in body
        assert "`base`" in body and "the base" not in body.lower().split("the base model's licence")[0]


def test_an_adapter_is_written_in_the_type_asked_for(export: Callable[..., str], tmp_path: Path) -> None:
    export("--output", str(tmp_path / "a"), "--format", "peft", "--dtype", "bfloat16")
    assert {t.code for t in read_header(tmp_path / "a/adapter_model.safetensors").values()} == {"BF16"}


def test_tensors_without_an_adapter_are_the_bases(trained: Path, export: Callable[..., str], tmp_path: Path) -> None:
    export("--output", str(tmp_path / "a"))
    base, out = open_directory(trained / "base"), open_directory(tmp_path / "a")
    assert base.keys() == out.keys()
    for name, tensor in base.items():
        same = tensor.code == out[name].code and tensor.read().tobytes() == out[name].read().tobytes()
        assert same or (name.startswith("language_model") and name.endswith("q_proj.weight")), name
