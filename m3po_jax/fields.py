"""What a field of a recipe may hold: types, ranges and choices, said once beside the field.

A field's annotation is its type, with rules where it has some: ``Annotated[int, Range(1, 4096)]``. reading.py makes
values of these types and checks them; messages and documentation say in `Kind.words` what a field takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from m3po_jax.errors import nearest


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def _number(value: Any) -> str:
    text = f"{value:g}"
    return text if float(text) == value else str(value)


@dataclass(frozen=True)
class Range:
    """A finite number from `least` (or above `above`) to `most` (or below `below`); each end is given in one way."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    but: float | None = None  # not this one

    def words(self) -> str:
        low = f"({_number(self.above)}" if self.least is None else f"[{_number(self.least)}"
        high = f"{_number(self.below)})" if self.most is None else f"{_number(self.most)}]"
        return f"in {low}, {high}" + ("" if self.but is None else f" but not {_number(self.but)}")

    def problem(self, value: Any) -> str | None:
        if not math.isfinite(value):
            return f"must be a finite number {self.words()}, not {value}"
        holds = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value != self.but
        )
        return None if holds else f"must be {self.words()}, not {_number(value)}"


@dataclass(frozen=True)
class OneOf:
    """One of some words. ``module:NAME`` stands for the names of a registry of that module, which is imported when
    a value is checked, so that the registry stays the one place of its names."""

    named: tuple[str, ...]

    def __init__(self, *named: str):
        object.__setattr__(self, "named", named)

    def choices(self) -> list[str]:
        names: list[str] = []
        for name in self.named:
            module, colon, attribute = name.partition(":")
            names += [*getattr(importlib.import_module(f"m3po_jax.{module}"), attribute)] if colon else [name]
        return names

    def words(self) -> str:
        return " | ".join(choice or '""' for choice in self.choices())

    def problem(self, value: Any) -> str | None:
        choices = self.choices()
        return None if value in choices else f"unknown value {value!r}{nearest(value, filter(None, choices))}"


@dataclass(frozen=True)
class Length:
    """How many items a list has."""

    least: int
    most: int

    def words(self) -> str:
        if self.least == self.most:
            return f"{self.least} values"
        return f"at least {self.least} value{'s' if self.least > 1 else ''}" if self.least else f"at most {self.most}"

    def problem(self, value: Any) -> str | None:
        return None if self.least <= len(value) <= self.most else f"must have {self.words()}, not {len(value)}"


@dataclass(frozen=True)
class FileName:
    """A name that becomes a folder's: it leads nowhere else, and every file system takes it."""

    def words(self) -> str:
        return "a folder's name"

    def problem(self, value: Any) -> str | None:
        wrong = (
            "has no letter or digit"
            if not value.strip(" .")
            else "holds / or \\"
            if "/" in value or "\\" in value
            else "holds a control character"
            if any(ord(c) < 32 or ord(c) == 127 for c in value)
            else "begins or ends with a space"
            if value != value.strip()
            else "is longer than 100 bytes"
            if len(value.encode("utf-8", "surrogatepass")) > 100
            else None
        )
        return None if wrong is None else f"{short(value)} is not a folder's name: it {wrong}"


@dataclass(frozen=True)
class LocalPath:
    """A path on this machine: no URL, whose slashes file systems would drop and whose bucket they would not reach.

    Attributes:
        after: The path begins behind this mark, where the text holds it.
    """

    after: str = ""

    def words(self) -> str:
        return f"a local path behind {self.after}" if self.after else "a local path"

    def problem(self, value: Any) -> str | None:
        path = value.partition(self.after)[2] if self.after else value
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", path)
        if scheme is not None and len(scheme[1]) > 1:  # one letter is a drive's
            return (
                f"{short(value)} is a URL, and buckets are not read or written in place: mount it (gcsfuse, "
                "mountpoint-s3) or copy it, and give the local path"
            )
        return None


@dataclass(frozen=True)
class Words:
    """Plain words that YAML would take for something else and that this text field documents (``off``)."""

    named: tuple[str, ...]

    def __init__(self, *named: str):
        object.__setattr__(self, "named", named)

    def words(self) -> str:
        return " | ".join(self.named)

    def problem(self, value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class Overrides:
    """A mapping of dotted keys of another section (``module:CLASS``) to values, each read as that key's."""

    target: str

    def cls(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f"m3po_jax.{module}"), name)


OPERATIONAL = "operational"  # marks a key that changes how a stage runs and nothing that it computes


@dataclass(frozen=True)
class Kind:
    """An annotation taken apart.

    Attributes:
        base: int, float, bool, str, list, dict, a dataclass, or Any.
        rules: Of the value itself.
        item, key: Kinds of the items of a list or dict, and of a dict's keys.
        optional: None is a value.
    """

    base: Any
    rules: tuple[Any, ...] = ()
    item: Kind | None = None
    key: Kind | None = None
    optional: bool = False

    @property
    def section(self) -> bool:
        return dataclasses.is_dataclass(self.base)

    def words(self) -> str:
        """What it takes, for messages and documentation."""
        if self.section:
            return "a section"
        limits = [rule.words() for rule in self.rules if hasattr(rule, "words")]
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
            self.base, "any value"
        )
        if self.base is str and limits:
            name = ""
        elif self.base is list:
            assert self.item is not None
            name = f"a list, each {self.item.words()}"
            limits = [f"of {words}" for words in limits]
        elif self.base is dict:
            assert self.item is not None
            of_one = self.item.base in (int, float, str)
            name = f"a mapping of names, each to {self.item.words()}" if of_one else "a mapping of names"
        text = " ".join(filter(None, [name, ", ".join(limits)]))
        return f"{text} or null" if self.optional else text


@cache
def kind_of(annotation: Any) -> Kind:
    """Takes an annotation apart."""
    if typing.get_origin(annotation) is Annotated:
        base, *rules = typing.get_args(annotation)
        kind = kind_of(base)
        return dataclasses.replace(kind, rules=(*kind.rules, *rules))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (present,) = [argument for argument in arguments if argument is not type(None)]
        return dataclasses.replace(kind_of(present), optional=True)
    if origin is typing.Literal:
        return Kind(str, (OneOf(*arguments),))
    if origin is list:
        return Kind(list, item=kind_of(arguments[0]))
    if origin is dict:
        return Kind(dict, key=kind_of(arguments[0]), item=kind_of(arguments[1]))
    return Kind(annotation)


@cache
def fields_of(cls: type) -> dict[str, Kind]:
    """The kind of every field of a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(cls)}


def is_operational(kind: Kind) -> bool:
    return OPERATIONAL in kind.rules
