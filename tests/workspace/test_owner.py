"""The run directory has one owner: nobody else names its files, and one object stands for round and arm."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import m3po_jax
from m3po_jax.workspace import layout

PACKAGE = Path(m3po_jax.__file__).parent
NAMES = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
FILES = {name for name in NAMES if "." in name}
FOLDERS = NAMES - FILES
_FILE = re.compile(rf"(?<!docs/)(?<![\w.-])({'|'.join(map(re.escape, sorted(FILES)))})(?![\w-])")
_SEGMENT = re.compile(rf"({'|'.join(map(re.escape, sorted(FOLDERS)))}|\*+|)")
# Help texts are documentation, and the package's folder of quickstart models is no run's.
OTHERS = {"cli.py", "models/registry.py"}
MODULES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def names_of_run_files(source: str) -> Iterator[str]:
    """The strings of a module that name a file or a folder of a run directory; docstrings may.

    Folders have everyday names ("pairs"), so that such a word counts where a path is made with it.
    """
    tree = ast.parse(source)
    docstrings, of_paths = set[ast.AST](), set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            docstrings.add(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            of_paths |= {node.left, node.right}
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of_paths |= set(node.args) if called in ("Path", "glob", "rglob", "joinpath", "join") else set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docstrings:
            continue
        text, segments = node.value, node.value.split("/")
        is_path = len(segments) > 1 and all(map(_SEGMENT.fullmatch, segments)) and bool(FOLDERS & set(segments))
        if _FILE.search(text) or "round-" in text or is_path or (node in of_paths and text in FOLDERS):
            yield text


@pytest.mark.parametrize(
    "source",
    [
        'x = folder / "pairs"',
        'x = folder / "pairs" / "summary.json"',
        'x = folder.glob("arms/*/pairs/")',
        'x = f"round-{number}"',
        'say("see drops.jsonl beside it")',
        'x = root.joinpath("scores")',
    ],
)
def test_the_guard_sees_names_of_run_files(source: str) -> None:
    assert list(names_of_run_files(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""Reads `done.json`."""',
        'x = counts["pairs"]',
        'x = "objective/scores"',
        'x = folder / "config.json"',
        'remedy = "see docs/evaluation.md"',
        'target.with_suffix(".drops.jsonl")',
    ],
)
def test_the_guard_lets_other_words_pass(source: str) -> None:
    assert not list(names_of_run_files(source))


def test_nobody_else_names_a_file_of_a_run() -> None:
    named = {
        name: texts
        for name, path in MODULES.items()
        if not name.startswith("workspace/") and (texts := list(names_of_run_files(path.read_text())))
    }
    assert {name: texts for name, texts in named.items() if name not in OTHERS} == {}
    assert named["models/registry.py"] == ["checkpoints"]


def test_round_and_arm_are_one_object() -> None:
    both = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = {argument.arg for argument in arguments}
            elif isinstance(node, ast.ClassDef) and node.name != "Cell":
                fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
                names = {field.id for field in fields if isinstance(field, ast.Name)}
            else:
                continue
            if "arm" in names and names & {"round", "round_number", "number"}:
                both.append(f"{name}:{node.lineno}")
    assert both == []


def test_the_hosts_room_alone_speaks_to_other_hosts() -> None:
    """Elsewhere `is_writer`, `agreed`, `gathered` and their like do, so that a stage waits for all or for none."""
    direct = ("multihost_utils", "jax.distributed", "process_index() == 0", "process_index() != 0")
    speaking = {name for name, path in MODULES.items() if any(text in path.read_text() for text in direct)}
    assert {name for name in speaking if not name.startswith("hosts/")} == set()
