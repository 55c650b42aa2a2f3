"""Names say what a thing is: none of the package's is a word that fits anything, and no class shares its name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import m3po_jax

PACKAGE = Path(m3po_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Words for how a thing was come by, not for what it is.
EMPTY_WORDS = {"found", "own", "known", "seen", "made", "look", "told"}
# The same part of every model family, each in its family's folder.
OF_EVERY_FAMILY = {"Projector", "Merger", "VisionTower"}


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that a module names: variables, arguments, attributes, fields, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name


def empty_names(source: str) -> list[tuple[int, str]]:
    return [(line, name) for line, name in bound_names(ast.parse(source)) if name.strip("_") in EMPTY_WORDS]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_name_is_an_empty_word(path: Path) -> None:
    assert empty_names(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for known in x: pass",
        "def f(own): pass",
        "def _look(): pass",
        "class made: pass",
        "self.seen = 1",
        "x = [1 for told in y]",
        "import json as found",
        "try:\n    pass\nexcept ValueError as known:\n    pass",
    ],
)
def test_every_way_to_name_is_judged(source: str) -> None:
    assert len(empty_names(source)) == 1


def test_no_two_public_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in OF_EVERY_FAMILY:
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
