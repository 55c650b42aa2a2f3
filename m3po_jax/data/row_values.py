"""What a text or a value of a row may be, so that every stage after it can hold, write and show it."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any

from m3po_jax.errors import UserError

MAX_DEPTH = 64  # of metadata: Python's JSON writer and Arrow's reader recurse


def check_text(text: str, what: str, where: str) -> str:
    """`text`, which UTF-8 can hold.

    Raises:
        UserError: half of a character (a lone surrogate, from text that was cut inside an emoji, say).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} has half of a character (a lone surrogate) at place {error.start}",
            where=where,
            remedy="mend the text or drop the row",
        ) from None
    return text


def check_id(identifier: str, where: str) -> str:
    """`identifier`, which files, messages and pages can show.

    Raises:
        UserError: a control character (NUL, a line break) or half of a character in it.
    """
    control = next((letter for letter in identifier if ord(letter) < 32 or ord(letter) == 127), None)
    if control is not None:
        raise UserError(
            f"the id has a control character ({control!r})", where=where, remedy="give the row another 'id'"
        )
    return check_text(identifier, "the id", where)


def json_value(value: Any, name: str, where: str) -> Any:
    """A value of a row as JSON holds it: dates as ISO texts, decimals as numbers or texts.

    Raises:
        UserError: NaN, an infinity, half of a character, more than `MAX_DEPTH` levels, keys that are no texts, or a
            type that JSON does not have; `name` is the field that it stands in.
    """
    _check_depth(value, name, where)
    return _json_value(value, name, where)


def _check_depth(value: Any, name: str, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, (list, tuple)):
                inner += item
        if not inner:
            return
        level = inner
    raise UserError(
        f"{name} is nested more than {MAX_DEPTH} levels deep", where=where, remedy="flatten it or drop the row"
    )


def _json_value(value: Any, name: str, where: str) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return check_text(value, name, where)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise UserError(f"{name} is {value}, which is no number of JSON", where=where, remedy="write null instead")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{name} has a key that is not a text ({key!r})", where=where, remedy="use texts")
            check_text(key, f"a key of {name}", where)
        return {key: _json_value(item, name, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, name, where) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    raise UserError(
        f"{name} is of type {type(value).__name__}, which JSON does not have",
        where=where,
        remedy="write it as text, or leave the field out",
    )
