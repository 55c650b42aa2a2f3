"""YAML as recipes are written in it: mappings, lists and scalars whose text is kept until a field's type reads it.

YAML 1.1 takes ``off`` for False, ``1:30`` for 90 and ``2020-01-01`` for a date. Here a scalar stays the text that
stands in the file, marked as plain or quoted; what it means is for the field to say (fields.py). Tags, several
documents, repeated keys, and aliases that multiply or contain themselves are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 100_000  # in one file; aliases count as often as they are used
MOST_LEVELS = 50


class Scalar(str):
    """A scalar's text; `plain` where it stood without quotes."""

    plain: bool

    def __new__(cls, text: str, plain: bool = True) -> Scalar:
        scalar = super().__new__(cls, text)
        scalar.plain = plain
        return scalar


class Unreadable(Exception):
    """Why text cannot be read, in one line."""


class _Loader(yaml.SafeLoader):
    """Composes nodes without guessing what plain scalars mean."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's name; there are none


def read(text: str) -> Any:
    """The one document of `text` as nested dicts and lists of `Scalar`; None where it is empty.

    Raises:
        Unreadable: it is not valid YAML, or uses what recipes do not have.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _Reader().value(node, 0)
    except yaml.YAMLError as error:
        raise Unreadable(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise Unreadable("nested too deeply") from None


_TAGS = {
    yaml.ScalarNode: "tag:yaml.org,2002:str",
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
    yaml.MappingNode: "tag:yaml.org,2002:map",
}


class _Reader:
    def __init__(self) -> None:
        self.values = 0

    def value(self, node: yaml.Node, level: int) -> Any:
        mark = node.start_mark
        self.values += 1
        if self.values > MOST_VALUES:
            raise Unreadable(f"more than {MOST_VALUES:,} values, with aliases counted as often as they are used")
        if level > MOST_LEVELS:
            raise Unreadable(f"nested deeper than {MOST_LEVELS} levels, line {mark.line + 1}")
        if node.tag != _TAGS[type(node)]:
            raise Unreadable(f"the tag {node.tag!r}, line {mark.line + 1}: recipes have none")
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, plain=node.style is None)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, level + 1) for item in node.value]
        return self.mapping(node, level)

    def mapping(self, node: yaml.MappingNode, level: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise Unreadable(f"a key that is no text, line {line}")
            key = self.value(key_node, level)
            value = self.value(value_node, level + 1)
            if key == "<<" and key.plain:
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, dict) for part in parts):
                    raise Unreadable(f"<< takes mappings, line {line}")
                merged += parts
            elif key in content:
                raise Unreadable(f"the key {str(key)!r} stands twice, line {line}")
            else:
                content[key] = value
        for part in merged:
            for key, value in part.items():
                content.setdefault(key, value)
        return content


_FLOAT = re.compile(r"[+-]?([0-9]+(_[0-9]{3})*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SPECIAL = re.compile(r"([+-]?)\.?(inf|nan)(inity)?", re.IGNORECASE)


def number(text: str) -> float | None:
    """The number that plain text is, in decimal; None where it is none, or begins with a zero as octals do."""
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    if not _FLOAT.fullmatch(text) or re.match(r"[+-]?0[0-9]", text):
        return None
    return float(text.replace("_", ""))


_YAML_1_1 = yaml.SafeLoader.yaml_implicit_resolvers  # by first character


def plain_value(text: str) -> Any:
    """What plain text of no known type is: true, false, a number, or text, where all versions of YAML agree.

    Raises:
        Unreadable: they do not (``off``, ``010``, ``1:30``, ``2020-01-01``).
    """
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]{0,30})", text):
        return int(text)
    if _FLOAT.fullmatch(text) and not re.match(r"[+-]?0[0-9]", text) and "_" not in text:
        return float(text)
    for _, pattern in _YAML_1_1.get(text[:1], []) + _YAML_1_1.get(None, []):
        if pattern.match(text):
            raise Unreadable(f"{str(text)!r} is read differently by different versions of YAML")
    return str(text)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `read` would not give back as text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("+-.0123456789"))


def write(value: Any) -> str:
    """Nested dicts, lists and scalars as YAML that `read` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
