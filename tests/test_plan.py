"""`m3po plan`: the TPU's own compiler on a recipe, with no TPU. Skipped where libtpu (the `plan` extra) is absent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from m3po_jax import plan as planning
from m3po_jax.config import Recipe
from m3po_jax.errors import UserError
from m3po_jax.models.registry import abstract_model, describe

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
BASE = "builtin:quickstart-base"
TINY = [
    f"model.path={BASE}", "model.dtype=float32", "model.param_dtype=float32", "generate.batch_size=8",
    "generate.max_new_tokens=16", "train.batch_size=8", "train.max_answer_tokens=16", "train.lora.lora_rank=4",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as libtpu reads its settings once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-m", "m3po_jax.cli", "plan", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_compiler
@pytest.mark.slow
def test_programs_of_a_recipe(tmp_path: Path) -> None:
    """On 2 × 2 chips: what each program holds, and its roofline."""
    file = tmp_path / "plan.json"
    mesh = ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"]
    done = run("--topology", "v5e:2x2", "--json", str(file), *mesh, *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["kind"] == "TPU v5 lite" and found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    names = [(program["stage"], program["name"]) for program in found["programs"]]
    assert names == [("generate", "prefill"), ("generate", "decode"), ("judge", "questions"), ("train", "step")]
    decode, step = found["programs"][1], found["programs"][3]
    model = abstract_model(describe(BASE))
    layers = sum(x.size * 4 for x in jax.tree.leaves(nnx.state(model.decoder.layers)))
    for program in found["programs"]:
        # At least a chip's share of the weights, and less than a chip has.
        assert layers / 4 < program["arguments"] <= program["needed"] < 2**30
        assert not program["problem"] and program["seconds"] > 0
    assert decode["bound"] == "memory bandwidth" and step["bound"] == "arithmetic"
    # The policy's own layers lie beside the generator's: split by rows and width, but for the norms' scales.
    assert layers / 4 <= decode["beside"] < 1.1 * layers / 4
    assert step["beside"] > 0  # the adapters that training started from


@needs_compiler
def test_what_does_not_fit_is_one_line_and_names_the_number_to_lower() -> None:
    done = run("--topology", "v5e:2x2", *TINY, "train.objective=sft", "mesh.fsdp=4", "train.batch_size=1048576")
    assert done.returncode == 2
    assert "does not fit" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("m3po: ")]
    assert len(lines) == 2 and lines[0].startswith("m3po: train (step): ")
    assert "iB a chip; lower train.batch_size" in lines[0]
    assert lines[1].startswith("m3po: --topology v5e:2x2: 1 of 1 programs do not fit")


def test_no_topology_is_not_the_oldest_chip() -> None:
    with pytest.raises(UserError, match="--topology: no topology is named; give one like v5e-8"):
        planning.topology_devices(" ")


@needs_compiler
def test_an_unknown_topology() -> None:
    done = run("--topology", "v5x:2x2", *TINY)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "--topology v5x:2x2: no such TPU topology" in line and "v5e:2x4" in line


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v5e:2x4", "v5e:2x4"),
        ("v5e-8", "v5e:2x4"),
        ("V5E-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod:2x4", "v5e:2x4"),
        ("v5e-2x4", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-1", "v6e:1x1"),
        ("v6e-16", "v6e:4x4"),
        ("v6e_4x8", "v6e:4x8"),
        ("v4-8", "v4:2x2x1"),
        ("v4-64", "v4:2x4x4"),
        ("v4:2x2", "v4:2x2x1"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p:2x2x2", "v5p:2x2x2"),
        ("v3-8", "v3:2x2"),
        ("v2-32", "v2:4x4"),
        ("v9:2x2", "v9:2x2"),
    ],
)
def test_names_of_topologies(text: str, name: str) -> None:
    """Accelerator types as Google Cloud lists them: v2 to v5p count cores (two a chip), v5e and v6e chips."""
    assert planning.topology_name(text) == name


@pytest.mark.parametrize("text", ["v5e-7", "v4-9", "v5p-2", "v6e-4096"])
def test_sizes_that_no_slice_has(text: str) -> None:
    with pytest.raises(UserError, match="no slice of that size") as caught:
        planning.topology_name(text)
    assert "v5e-8" in str(caught.value) or text[:3] != "v5e"


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'm3po-jax\[plan\]'"):
        planning.topology_devices("v5e:2x2")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"objective": "reward"}, {}, "only vision-language models with train.objective preference or sft"),
        ({}, {"prompt_tokens": 3}, "3 tokens leave no room for text"),
    ],
)
def test_what_cannot_be_planned(
    changes: dict[str, str], options: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "topology_devices", lambda topology: jax.devices()[:1])
    recipe = Recipe()
    recipe.model.path = BASE
    for name, value in changes.items():
        setattr(recipe.train, name, value)
    with pytest.raises(UserError, match=message):
        planning.plan(recipe, "v5e:1x1", **options)
