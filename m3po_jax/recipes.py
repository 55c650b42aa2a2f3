"""Reading and writing recipes: YAML files, the recipes that ship, and dotted overrides on the command line."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from m3po_jax import yaml_text
from m3po_jax.config import Recipe
from m3po_jax.errors import UserError, nearest
from m3po_jax.fields import Kind, fields_of, is_operational
from m3po_jax.reading import Refused, assign, read_value
from m3po_jax.yaml_text import Scalar, Unreadable

MOST_BYTES = 4_000_000


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name, in order."""
    folder = Path(str(resources.files("m3po_jax"))) / "configs"
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(files.items()))


def summary_of(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".")


def find_recipe(name: str | Path) -> Path:
    """A recipe's file: a path, or the name of one that ships, as `quickstart` or `configs/quickstart.yaml`.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        folder = False
    names = shipped()
    wanted = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if not path.is_absolute() and wanted in names and (not path.suffix or path.parts[0] == "configs"):
        return names[wanted]
    what = "a folder, not a recipe" if folder else f"no such recipe{nearest(wanted, names, listed=False)}"
    raise UserError(what, where=str(name), remedy="`m3po recipes` lists those that ship")


def load_recipe(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or the name of one that ships (or the defaults), and ``dotted.key=value`` overrides.

    Raises:
        UserError: missing or malformed file, unknown key (the nearest one is suggested), a value of the wrong type,
            out of its range or none of its choices.
    """
    recipe = Recipe()
    if path is not None:
        file = find_recipe(path)
        recipe = _read(Recipe, read_document(file), str(file), recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or override.startswith("-"):
            raise UserError(
                f"cannot read {override!r}", where="command line", remedy="overrides are dotted.key=value"
            )
        recipe = _assigned(recipe, key, value_of(text, f"{key}={text}"), "command line")
    return recipe


def read_document(file: Path) -> dict[Any, Any]:
    """The keys and values that a recipe's file states itself, as they stand there.

    Raises:
        UserError: no YAML, or no mapping.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"more than {MOST_BYTES:,} bytes: not a recipe", where=str(file))
        loaded = yaml_text.read(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(file)) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(file)) from None
    except Unreadable as error:
        raise UserError(str(error), where=str(file)) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError("a recipe is a mapping of keys to values", where=str(file))
    return loaded


def value_of(text: str, shown: str, where: str = "command line") -> Any:
    """A value as the command line reads one; nothing at all is empty text.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        read = yaml_text.read(text)
    except Unreadable as error:
        reason = str(error) if not str(error).startswith("not valid YAML") else "the value is not valid YAML"
        raise UserError(f"{shown!r}: {reason}", where=where, remedy="quote it or close its brackets") from None
    return Scalar("", plain=False) if read is None else read


def override(recipe: Recipe, changes: Mapping[str, Any], where: str = "arms") -> Recipe:
    """A copy of `recipe` with ``{"dotted.key": value}`` replaced."""
    for key, value in changes.items():
        recipe = _assigned(recipe, key, value, where)
    return recipe


def _assigned(recipe: Recipe, key: str, value: Any, where: str) -> Recipe:
    try:
        return assign(recipe, key.split("."), value, key)
    except Refused as refused:
        raise _user_error(refused, where) from None


def _read(kind: type, values: Any, where: str, current: Any = None) -> Any:
    try:
        return read_value(Kind(kind), values, "", current)
    except Refused as refused:
        raise _user_error(refused, where) from None


def _user_error(refused: Refused, where: str) -> UserError:
    what = f"{refused.key}: {refused.reason}" if refused.key else refused.reason
    return UserError(what, where=where, remedy=refused.remedy)


T = typing.TypeVar("T")


def from_plain(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A section of a recipe from what `dataclasses.asdict` made of it, as files of trained models hold it."""
    return typing.cast(T, _read(kind, values, where))


def essential(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe (or its `score` section under that key) as nested dictionaries, without the operational keys.

    Those change how a stage runs and nothing that it computes: a run may be continued with other values of them.
    """
    return _essential(Recipe, recipe)


def _essential(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = fields_of(cls)
    kept = {name: value for name, value in values.items() if name not in kinds or not is_operational(kinds[name])}
    return {
        name: _essential(kinds[name].base, value)
        if name in kinds and kinds[name].section and isinstance(value, Mapping)
        else copy.deepcopy(value)
        for name, value in kept.items()
    }


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; keys may be dotted themselves, as those of an arm are."""
    keys: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            keys |= leaves(value, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = value
    return keys


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, as `config.yaml` of a run directory stores it."""
    return yaml_text.write(dataclasses.asdict(recipe))
