"""What a benchmark is: how its answers are scored, which numbers stand for it, and how they are told from chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError

Answers = Sequence[Mapping[str, Any]]  # {"id", "text"[, "tokens"]}
Item = Mapping[str, Any]
Sums = Num[np.ndarray, "*batch columns"]
Rates = dict[str, Float[np.ndarray, "*batch"]]
Lack = tuple[str, str]  # what a row lacks, and what the metric does with it


@dataclass(frozen=True)
class Column:
    """One number of a metric, wherever a table shows it.

    Attributes:
        key: In a result's ``summary``.
        label: The column's head.
        better: ``higher``, ``lower``, or None where neither is.
        meaning: What it is, in a few words.
        digits: After the point.
        percent: It is a fraction, and shown in percent.
    """

    key: str
    label: str
    better: str | None
    meaning: str
    digits: int = 1
    percent: bool = True

    @property
    def factor(self) -> float:
        """From the summary's value to the one that is shown."""
        return 100.0 if self.percent else 1.0


@dataclass(frozen=True)
class Frontier:
    """A metric's two columns between which the base's stop bias trades, and the column of what is left at equal gain.

    Attributes:
        gain: The key that rises with longer answers.
        cost: The key that has to fall.
        delta: The key of the cost minus that of the frontier at the same gain.
    """

    gain: str
    cost: str
    delta: str


@dataclass(frozen=True)
class Metric:
    """One benchmark's rules and numbers; whoever scores, compares or shows it reads them here.

    Attributes:
        rules: Name -> whose rule it is, and which version of it; the first is the default.
        needs: What its rows must have, for the documentation.
        missing: What a row lacks and how to mend it, None where it is complete.
        score: (rows, answers, settings, the rule's name) to ``summary`` (with `columns`' values), ``items`` and more.
        sums: What an item adds to each sum, for the bootstrap over images.
        rates: Sums, of any leading shape, to the columns' values; NaN where one is undefined.
        columns: What tables show, in order.
        deciding: Keys that a comparison decides on, the first that is defined.
        settings: Fields of `BenchmarkConfig` that it reads beside those that every metric has.
        default_rule: The rule where the recipe names none; None: the first.
        judged: The texts are a judge's reviews, not a model's answers.
        gate: Why differences mean little, from the base's values by key; None where they mean something.
        frontier: The base's stop-bias frontier, where the metric has one.
        check: More that the settings must fulfil, before any row is read.
    """

    rules: Mapping[str, str]
    needs: str
    missing: Callable[[Prompt], Lack | None]
    score: Callable[[Sequence[Prompt], Answers, BenchmarkConfig, str], dict[str, Any]]
    sums: Callable[[Item], Sequence[float]]
    rates: Callable[[Sums], Rates]
    columns: tuple[Column, ...]
    deciding: tuple[str, ...]
    settings: tuple[str, ...] = ()
    default_rule: Callable[[BenchmarkConfig], str] | None = None
    judged: bool = False
    gate: Callable[[Mapping[str, float | None]], str | None] = lambda base: None
    frontier: Frontier | None = None
    check: Callable[[BenchmarkConfig], None] = lambda config: None

    def rule(self, config: BenchmarkConfig) -> str:
        """The name of the rule that a recipe's settings mean.

        Raises:
            UserError: there is none of this name.
        """
        if config.rule and config.rule not in self.rules:
            raise UserError(f"unknown rule {config.rule!r}", where="rule", remedy=f"one of {', '.join(self.rules)}")
        if config.rule:
            return config.rule
        return self.default_rule(config) if self.default_rule else next(iter(self.rules))

    @property
    def drawn(self) -> tuple[Column, ...]:
        """The columns that follow from one system's own items, and so have a bootstrap interval."""
        return tuple(c for c in self.columns if self.frontier is None or c.key != self.frontier.delta)

    def column(self, key: str) -> Column:
        """The column of a key."""
        return next(column for column in self.columns if column.key == key)

    def table(self, items: Sequence[Item]) -> Float[np.ndarray, "n columns"]:
        """What each item adds."""
        return np.array([self.sums(item) for item in items], dtype=np.float64)

    def values(self, items: Sequence[Item]) -> dict[str, float | None]:
        """The rates of some items; None where one is undefined."""
        return values(self.sums, self.rates, items)


def values(
    sums: Callable[[Item], Sequence[float]], rates: Callable[[Sums], Rates], items: Sequence[Item]
) -> dict[str, float | None]:
    """Rates of the sums of some items; None where one is undefined, and all of nothing."""
    if not items:
        return {}
    totals = np.array([sums(item) for item in items], dtype=np.float64).sum(axis=0)
    return {key: None if np.isnan(value) else float(value) for key, value in rates(totals).items()}


def verdict(value: float | None, base: tuple[float, float] | None, better: str | None) -> str:
    """How a number of a system lies to the base's interval.

    Args:
        value: None where there is none.
        base: The interval's bounds; None where there are none.
        better: `Column.better`.

    Returns:
        ``better``, ``worse`` or, of a column where neither way is better, ``differs``; empty inside the interval.
    """
    if value is None or base is None or base[0] <= value <= base[1]:
        return ""
    if better not in ("higher", "lower"):
        return "differs"
    return "better" if (value > base[1]) == (better == "higher") else "worse"


def ratio(numerator: np.ndarray, denominator: np.ndarray, *, undefined: float = np.nan) -> np.ndarray:
    """A quotient of sums; `undefined` where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator != 0, numerator / denominator, undefined)


def image_of(prompt: Prompt) -> str:
    """What tells images apart for the bootstrap: the scene or image that a row names, its only image's path, or the
    row."""
    named = prompt.metadata.get("scene") or prompt.metadata.get("image")
    path = prompt.images[0].path if len(prompt.images) == 1 else None
    return str(named or path or prompt.id)


def as_label(prompt: Prompt, **more: Any) -> dict[str, Any]:
    """A row as the scorers take it: id, category, image and whatever else the metric compares with."""
    category = str(prompt.metadata.get("category") or "all")
    return {"id": prompt.id, "category": category, "image": image_of(prompt), **more}


def needs_nothing(prompt: Prompt) -> None:
    """For metrics that any row will do for."""
    return None


def needs_reference(prompt: Prompt) -> Lack | None:
    """For metrics that compare with the row's answer."""
    return None if prompt.reference is not None else ("the row has no reference", "the metric needs the answer")


_KINDS: dict[type, str] = {list: "list", dict: "mapping", str: "text"}


def needs_metadata(name: str, kind: type) -> Callable[[Prompt], Lack | None]:
    """For metrics that compare with a list or a mapping of the row's metadata."""

    def missing(prompt: Prompt) -> Lack | None:
        if isinstance(prompt.metadata.get(name), kind):
            return None
        return f"metadata.{name} is missing", f"the metric needs it as a {_KINDS[kind]}"

    return missing


def needs_texts(name: str) -> Callable[[Prompt], Lack | None]:
    """For metrics that compare with a list of names in the row's metadata."""

    def missing(prompt: Prompt) -> Lack | None:
        names = prompt.metadata.get(name)
        if isinstance(names, list) and all(isinstance(entry, str) for entry in names):
            return None
        wrong = "missing" if names is None else "no list of texts"
        return f"metadata.{name} is {wrong}", "the metric needs it as a list"

    return missing


def needs_all(*checks: Callable[[Prompt], Lack | None]) -> Callable[[Prompt], Lack | None]:
    """The first that a row lacks of several needs."""
    return lambda prompt: next(filter(None, (check(prompt) for check in checks)), None)
