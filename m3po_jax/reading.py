"""Reading values into the fields of recipes, by the types and rules that stand beside them (fields.py).

Every refusal names the key, what is wrong with its value, and where it helps what it takes.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from m3po_jax.errors import UserError, nearest
from m3po_jax.fields import FileName, Kind, LocalPath, OneOf, Overrides, Words, fields_of, short
from m3po_jax.yaml_text import Scalar, Unreadable, number, plain_value


class Refused(Exception):
    """A key, and why its value cannot be meant."""

    def __init__(self, key: str, reason: str, remedy: str | None = None):
        self.key, self.reason, self.remedy = key, reason, remedy
        super().__init__(f"{key}: {reason}")


def read_value(kind: Kind, value: Any, key: str, current: Any = None) -> Any:
    """`value` as a field of this kind holds it; `current` is what a section has for the keys that are not given.

    Raises:
        Refused: names the key.
    """
    _refuse_interpolation(value, key)
    if _is_null(value):
        if kind.optional or kind.base is Any:
            return None
        raise Refused(key, "has no value", _takes(kind) if kind.base is not str else 'write "" for no text')
    if kind.section:
        return _read_section(kind.base, value, key, current)
    if kind.base is list:
        return _checked(kind, _read_list(kind, value, key), key)
    if kind.base is dict:
        return _read_dict(kind, value, key)
    if kind.base is Any:
        return _read_any(value, key)
    return _checked(kind, _READERS[kind.base](kind, value, key), key)


def _refuse_interpolation(value: Any, key: str) -> None:
    if isinstance(value, str) and "${" in value:
        raise Refused(key, f"{short(value)} is an interpolation, which recipes do not have", "write the value itself")


def _takes(kind: Kind) -> str:
    return f"it takes {kind.words()}"


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Scalar) and value.plain and value in ("", "~", "null", "Null", "NULL"))


def _checked(kind: Kind, value: Any, key: str) -> Any:
    for rule in kind.rules:
        reason = rule.problem(value) if hasattr(rule, "problem") else None
        if reason is not None:
            raise Refused(key, reason)
    return value


_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OTHER_BOOLEANS = {"yes", "no", "on", "off"}


def _read_bool(kind: Kind, value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Scalar) and value.plain:
        if value in _BOOLEANS:
            return _BOOLEANS[value]
        if value.lower() in _OTHER_BOOLEANS:
            return value.lower() in ("yes", "on")
    raise Refused(key, f"must be true or false, not {short(value)}")


def _read_int(kind: Kind, value: Any, key: str) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Scalar) and value.plain and re.fullmatch(r"[+-]?(0|[1-9][0-9]*(_[0-9]{3})*)", value):
        if len(value) > 30:
            raise Refused(key, f"{short(value)} is too large a number", _takes(kind))
        return int(value)
    raise Refused(key, f"{short(value)} is not a whole number in plain decimal digits", _takes(kind))


def _read_float(kind: Kind, value: Any, key: str) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        parsed: float | None = _as_float(value)
    else:
        parsed = number(value) if isinstance(value, Scalar) and value.plain else None
    if parsed is None:
        raise Refused(key, f"{short(value)} is not a number", _takes(kind))
    return parsed


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond every float
        return math.inf


def _read_text(kind: Kind, value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Refused(key, f"{short(value)} is not text", _takes(kind))
    text = str(value)
    if isinstance(value, Scalar) and value.plain and text.lower() in {"true", "false", *_OTHER_BOOLEANS}:
        documented = [word for rule in kind.rules if isinstance(rule, (OneOf, Words)) for word in rule.named]
        if text not in documented:
            words = f", one of {' | '.join(documented)}" if documented else ""
            raise Refused(key, f"{text} is not text{words}", f'write "{text}" in quotes if you mean the word')
    if "\0" in text:
        raise Refused(key, f"{short(text)} holds a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(key, f"{short(text)} is not valid Unicode")
    if text.startswith("~/") and any(isinstance(rule, LocalPath) for rule in kind.rules):
        return os.path.expanduser(text)  # no shell has done it in a file
    return text


_READERS: dict[Any, Callable[[Kind, Any, str], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_text,
}


def _read_list(kind: Kind, value: Any, key: str) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise Refused(key, f"{short(value)} is not a list", "write [a, b]")
    assert kind.item is not None
    return [read_value(kind.item, item, f"{key}[{place}]") for place, item in enumerate(value)]


def _read_dict(kind: Kind, value: Any, key: str) -> dict[str, Any]:
    """A mapping given whole; its keys have rules too, and may not be one another but for case."""
    if not isinstance(value, Mapping):
        raise Refused(key, f"{short(value)} is not a mapping of names to values", "write {name: value}")
    for rule in kind.rules:
        if isinstance(rule, Overrides):
            return dict(_read_overrides(rule.cls(), value, key, ""))
    assert kind.item is not None and kind.key is not None
    named = {_read_name(kind.key, name, key): item for name, item in value.items()}
    check_case(kind, named, key)
    return {name: read_value(kind.item, item, f"{key}.{name}") for name, item in named.items()}


def _read_overrides(cls: Any, value: Mapping[Any, Any], key: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value of its type) of overrides; sections in them are taken apart."""
    for name, item in value.items():
        dotted = _join(prefix, str(name))
        place = f"{key}.{_bare(dotted)}"
        kind = kind_at(cls, dotted.split("."), place)
        if kind.section and isinstance(item, Mapping):
            yield from _read_overrides(cls, item, key, dotted)
        else:
            yield dotted, as_plain(read_value(kind, item, place))


def kind_at(cls: Any, parts: Sequence[str], key: str) -> Kind:
    """The kind of the field that a dotted key leads to.

    Raises:
        Refused: it leads nowhere; the nearest key is named.
    """
    kinds = fields_of(cls)
    head, *rest = parts
    if head not in kinds:
        raise _unknown(_up_to(key, rest), head, kinds)
    kind = kinds[head]
    if not rest:
        return kind
    if kind.section:
        return kind_at(kind.base, rest, key)
    if kind.base is dict:
        assert kind.item is not None and kind.key is not None
        if kind.item.section:
            _read_name(kind.key, rest[0], key)
            return kind_at(kind.item.base, rest[1:], key) if rest[1:] else kind.item
        for rule in kind.item.rules:
            if isinstance(rule, Overrides):
                return kind_at(rule.cls(), rest[1:], key) if rest[1:] else kind.item
        _read_name(kind.key, ".".join(rest), key)
        return kind.item
    raise Refused(key, f"{head} has no keys of its own", _takes(kind))


def _up_to(key: str, rest: Sequence[str]) -> str:
    """A dotted key without its last parts."""
    return key.removesuffix("." + ".".join(rest)) if rest else key


def _unknown(key: str, name: str, names: Iterable[str]) -> Refused:
    if "${" in name:
        return Refused(key, "is an interpolation, which recipes lack")
    return Refused("", f"unknown key {key!r}{nearest(name, names)}")


def assign(section: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """A copy of a section with the field that a dotted key leads to replaced; a section given there is merged, a list
    or a mapping replaced.

    Raises:
        Refused: no such key, or a value that it does not take.
    """
    kinds = fields_of(_class_of(section))
    head, *rest = parts
    if head not in kinds:
        raise _unknown(_up_to(key, rest), head, kinds)
    kind, current = kinds[head], getattr(section, head)
    if not rest:
        return dataclasses.replace(section, **{head: read_value(kind, value, key, current)})
    if kind.section:
        return dataclasses.replace(section, **{head: assign(current, rest, value, key)})
    if kind.base is dict:
        return dataclasses.replace(section, **{head: _assign_item(kind, current, rest, value, key)})
    raise Refused(key, f"{head} has no keys of its own", _takes(kind))


def _assign_item(
    kind: Kind, current: Mapping[str, Any], parts: Sequence[str], value: Any, key: str
) -> dict[str, Any]:
    """A mapping with one item replaced, or a part of it."""
    assert kind.item is not None and kind.key is not None
    item, (head, *rest) = kind.item, parts
    overrides = [rule for rule in item.rules if isinstance(rule, Overrides)]
    if item.section:
        name = _read_name(kind.key, head, _up_to(key, parts))
        before = current.get(name, item.base())
        item_read = assign(before, rest, value, key) if rest else read_value(item, value, key)
    elif overrides and rest:
        dotted = ".".join(rest)
        place = key.removesuffix(f".{dotted}")
        name = _read_name(kind.key, head, place.removesuffix(f".{head}"))
        item_read = dict(current.get(name, {})) | dict(
            _read_overrides(overrides[0].cls(), {dotted: value}, place, "")
        )
    else:
        name = _read_name(kind.key, ".".join(parts), _up_to(key, parts))
        item_read = read_value(item, value, key)
    merged = dict(current) | {name: item_read}
    check_case(kind, merged, key)
    return merged


def as_plain(value: Any) -> Any:
    """Sections as dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [as_plain(item) for item in value] if isinstance(value, list) else value


def check_case(kind: Kind, names: Iterable[str], key: str) -> None:
    """Raises Refused where two names of folders are one on file systems that do not tell cases apart."""
    if kind.key is None or not any(isinstance(rule, FileName) for rule in kind.key.rules):
        return
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise Refused(
                key, f"{other!r} and {name!r} differ in case alone", "they would share a folder: rename one"
            )


def _read_name(kind: Kind, name: Any, key: str) -> str:
    # Whatever YAML would take a key for, it is the text that stands there.
    text = read_value(kind, Scalar(name, plain=False) if isinstance(name, str) else name, f"{key}.{_bare(name)}")
    assert isinstance(text, str)
    return text


def _bare(name: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(name))[:60]


def _read_section(cls: Any, value: Any, key: str, current: Any) -> Any:
    if dataclasses.is_dataclass(value) and isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        example = next(iter(fields_of(cls)))
        raise Refused(key, f"{short(value)} is not a section", f"set keys of it, like {_join(key, example)}")
    kinds = fields_of(cls)
    changes: dict[str, Any] = {}
    base = cls() if current is None else current
    for name, item in value.items():
        place = _join(key, _bare(name))
        if name not in kinds:
            raise _unknown(place, str(name), kinds)
        changes[str(name)] = read_value(kinds[str(name)], item, place, getattr(base, str(name)))
    return dataclasses.replace(base, **changes)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _read_any(value: Any, key: str) -> Any:
    """A value of no known type, as JSON has them; words that versions of YAML read differently are refused."""
    if isinstance(value, Mapping):
        return {str(name): _read_any(_free(item, f"{key}.{name}"), f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_read_any(_free(item, f"{key}[{place}]"), f"{key}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, Scalar) and value.plain:
        try:
            plain = plain_value(value)
        except Unreadable as error:
            raise Refused(key, str(error), "put text into quotes") from None
    else:
        plain = value
    if isinstance(plain, float) and not math.isfinite(plain):
        raise Refused(key, f"must be a finite number, not {plain}")
    return _read_text(Kind(str), Scalar(plain, plain=False), key) if isinstance(plain, str) else plain


def _free(value: Any, key: str) -> Any:
    _refuse_interpolation(value, key)
    return None if _is_null(value) else value


def _class_of(section: Any) -> Any:  # mypy holds that `type[Any]` cannot be hashed
    return type(section)


def values_of(section: Any, prefix: str) -> Iterator[tuple[str, Kind, Any]]:
    """(key, kind, value) of every field of a section, in order; sections in it as a whole."""
    for name, kind in fields_of(_class_of(section)).items():
        yield _join(prefix, name), kind, getattr(section, name)


def check_value(cls: type, name: str, value: Any, prefix: str) -> None:
    """Checks a value that stands for the field `name` of a section.

    Raises:
        UserError: as `check_values`.
    """
    try:
        read_value(fields_of(cls)[name], value, _join(prefix, name))
    except Refused as refused:
        raise UserError(refused.reason, where=refused.key, remedy=refused.remedy) from None


def check_values(section: Any, prefix: str) -> None:
    """Checks a section whose values were put in by hand.

    Raises:
        UserError: a value of the wrong type, out of its range, or none of its choices.
    """
    try:
        for key, kind, value in values_of(section, prefix):
            if kind.section:
                check_values(value, key)
            elif kind.base is list and kind.item is not None and kind.item.section:
                for place, item in enumerate(value):
                    check_values(item, f"{key}[{place}]")
            elif kind.base is dict and kind.item is not None and kind.item.section:
                for name, item in value.items():
                    check_values(item, f"{key}.{name}")
            else:
                read_value(kind, value, key)
    except Refused as refused:
        raise UserError(refused.reason, where=refused.key or prefix, remedy=refused.remedy) from None
