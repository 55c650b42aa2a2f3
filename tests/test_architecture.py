"""The rooms of docs/architecture.md: import-linter holds what each may import; the page names what is there."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def layers() -> list[list[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return [[room.strip() for room in line.split("|")] for line in contract["layers"]]


def test_rooms_import_downwards() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_has_its_place() -> None:
    rooms = {
        path.stem
        for path in (ROOT / "m3po_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    placed = [room.removeprefix("m3po_jax.") for line in layers() for room in line]
    assert sorted(placed) == sorted(rooms - {"__init__"})


def test_the_page_shows_the_rooms_in_their_order() -> None:
    picture = re.search(r"^```text\n(.*?)^```$", PAGE, re.M | re.S)
    assert picture is not None
    shown = [re.findall(r"[a-z_]+", line.partition("—")[0]) for line in picture[1].splitlines() if line.strip()]
    assert shown == [[room.removeprefix("m3po_jax.") for room in line] for line in layers()]


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:m3po_jax|tests|docs|configs)/[\w./]+?)`", PAGE))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_names_that_the_page_gives_to_code_are_there() -> None:
    """``file.py: name`` in the table of forms."""
    rows = re.findall(r"`(m3po_jax/[\w/]+\.py)`: `(\w+)", PAGE)
    assert len(rows) >= 10
    missing = [
        (file, name)
        for file, name in rows
        if not re.search(rf"(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M)
    ]
    assert missing == []


WHOLE_RECIPES = 45  # what reads most of a recipe: the run, its checks, its plan, its arms and its record


def test_settings_arrive_as_sections() -> None:
    """A function that needs a section is given the section: what it depends on stands in its signature."""

    def names_recipe(argument: ast.arg) -> bool:
        nodes = [] if argument.annotation is None else ast.walk(argument.annotation)
        return any(isinstance(node, ast.Name) and node.id == "Recipe" for node in nodes)

    takers = [
        f"{path.relative_to(ROOT)}: {function.name}"
        for path in sorted((ROOT / "m3po_jax").rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and any(map(names_recipe, [*function.args.args, *function.args.kwonlyargs]))
    ]
    assert len(takers) <= WHOLE_RECIPES, "\n".join(takers)
