"""What the package and its tests import is what pyproject.toml declares."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Where a module and its distribution are spelled differently.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "easy_vqa": "easy-vqa",
}
# Not imported by us, and why they are declared all the same.
INDIRECT = {
    "sentencepiece": "transformers reads tokenizer.model with it",
    "importlib-resources": "tensorflow-datasets needs it undeclared",
    "array-record": "tensorflow-datasets reads the random-access format with it",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Names of the distributions that the package, with `extras`, asks for."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {normal(re.split(r"[\s\[<>=!~;]", line)[0]) for line in lines}


def imported(folder: Path) -> dict[str, str]:
    """Distributions imported anywhere below `folder`, each with one file that does."""
    own = {path.stem for part in (folder, ROOT / "benchmarks") for path in part.rglob("*.py")} | {"m3po_jax"}
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top not in own:
                    found[normal(DISTRIBUTIONS.get(top, top))] = str(path.relative_to(ROOT))
    return found


def test_the_package_declares_what_it_imports() -> None:
    own = ROOT / "m3po_jax"
    missing = {
        name: file
        for name, file in imported(own).items()
        if name not in declared("quickstart", "judge", "amber", "tensorboard", "wandb")
    }
    assert not missing


def test_the_tests_declare_what_they_import() -> None:
    known = declared("quickstart", "judge", "test")
    assert not {name: file for name, file in imported(ROOT / "tests").items() if name not in known}


def test_nothing_is_declared_in_vain() -> None:
    used = imported(ROOT / "m3po_jax")
    assert declared() - set(used) == set(INDIRECT)


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_every_dependency_has_a_version_or_is_an_accelerator_s(extra: str) -> None:
    """An open lower bound would let an installer choose a release that was never tried."""
    for line in PROJECT["optional-dependencies"][extra]:
        assert re.search(r"[<>=~]=", line) or extra in ("tpu", "cuda", "plan") or line.startswith("m3po-jax["), line


def test_no_module_needs_itself() -> None:
    """Imports inside functions and for type checkers count too: what two modules need lies in a third."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "m3po_jax").rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                needs.setdefault(name, set()).update((named & files.keys()) or {node.module})
    assert len(needs) > 100
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names them
