"""Checks the shapes that annotations state, at every call of the package, while the tests run.

jaxtyping's import hook gives every function of `m3po_jax` to `check_shapes`. Of its annotations only those count that
say a shape (``Float[Array, "b t"]``): a name in them stands for one size throughout a call. mypy looks after the
others.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, TypeVar

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, BeartypeStrategy, beartype
from jaxtyping import install_import_hook

SHAPED = re.compile(r"\b(Bool|Complex|Float|Inexact|Int|Integer|Key|Num|Real|Shaped|UInt)(\d*)\[")
F = TypeVar("F")
# Every item of a list or mapping of arrays, not one of them at random.
_check = beartype(conf=BeartypeConf(strategy=BeartypeStrategy.On, is_pep484_tower=True))


def _on_host_too(note: Any) -> Any:
    """An annotation that takes NumPy's arrays wherever it takes JAX's, as JAX's functions do, and NumPy's scalars for
    arrays without axes, as NumPy's functions give them."""
    kinds = {jax.Array: jax.Array | np.ndarray | np.generic, np.ndarray: np.ndarray | np.generic}
    if getattr(note, "array_type", None) in kinds:
        return getattr(jaxtyping, note.__name__.partition("[")[0])[kinds[note.array_type], note.dim_str]
    origin, parts = typing.get_origin(note), typing.get_args(note)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_on_host_too, parts))]  # noqa: UP007
    if origin in (tuple, list, dict):
        return origin[tuple(part if part is Ellipsis else _on_host_too(part) for part in parts)]
    return note


def check_shapes(function: F) -> F:
    """The function with its stated shapes checked, arguments and result."""
    stated = getattr(function, "__annotations__", {})
    if isinstance(function, type) or not stated:
        return function
    shaped = {name: _on_host_too(note) for name, note in stated.items() if SHAPED.search(repr(note))}
    if not shaped:
        return function
    function.__annotations__ = shaped  # type: ignore[attr-defined]
    try:
        checked = _check(function)
    finally:
        function.__annotations__ = stated  # type: ignore[attr-defined]
    checked.__annotations__ = stated
    return checked


def install() -> None:
    """For all modules of the package that are imported from now on."""
    install_import_hook("m3po_jax", "shape_checks.check_shapes")
