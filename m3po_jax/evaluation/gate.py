"""The regression gate: whether a system lost more on a benchmark than it may, beyond what the images explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3po_jax.config import GateConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.bootstrap import image_sums, percentiles, resampled
from m3po_jax.evaluation.metric import Column, Item, Metric

FAILED, PASSED, UNDECIDED = "failed", "passed", "undecided"


@dataclass(frozen=True)
class Guarded:
    """One entry of `evaluate.gate`.

    Attributes:
        key: As the recipe names it, ``BENCHMARK.COLUMN``.
        allowed: The drop that is allowed, in the unit that tables show.
    """

    key: str
    benchmark: str
    column: Column
    allowed: float


def read_gate(gate: Mapping[str, GateConfig], metrics: Mapping[str, Metric]) -> list[Guarded]:
    """The entries of `evaluate.gate`, in order.

    Args:
        metrics: Of every benchmark, by the benchmark's name.

    Raises:
        UserError: an unknown benchmark or number, or one that cannot get worse.
    """
    return [_guarded(key, config.drop, metrics) for key, config in gate.items()]


def _guarded(key: str, allowed: float, metrics: Mapping[str, Metric]) -> Guarded:
    where = f"evaluate.gate.{key}"
    # Names of benchmarks may hold points, columns' keys do not.
    name, _, column = key.rpartition(".")
    if name not in metrics:
        unknown = f"no benchmark {name!r}" if name else "names no benchmark"
        raise UserError(
            f"{unknown}{nearest(name, metrics)}", where=where, remedy="write BENCHMARK.NUMBER, e.g. pope.accuracy"
        )
    columns = {one.key: one for one in metrics[name].drawn}
    guarded = [one.key for one in columns.values() if one.better]
    if column not in columns:
        raise UserError(
            f"benchmark {name} has no number {column!r}{nearest(column, guarded, listed=False)}",
            where=where,
            remedy=f"one of {', '.join(guarded)}",
        )
    if column not in guarded:
        raise UserError(
            f"neither more nor less of {column} is better, so that it cannot drop",
            where=where,
            remedy=f"one of {', '.join(guarded)}",
        )
    return Guarded(key, name, columns[column], allowed)


def decide(
    guarded: Guarded,
    metric: Metric,
    base: tuple[Sequence[str], Sequence[Item]],
    system: tuple[Sequence[str], Sequence[Item]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Whether a system's number dropped by more than is allowed, and outside noise.

    Both conditions must hold for a failure: the drop is larger than `guarded.allowed`, and the 95 % interval of the
    paired difference (the same images drawn for both, Efron's percentile bootstrap) lies above zero. A system whose
    number is undefined where the base's is defined has failed: silence is no way past a gate.

    Args:
        base, system: The images of the items, and the items.

    Returns:
        ``key``, ``benchmark``, ``label``, ``digits``, ``allowed``, ``base``, ``value``, ``drop`` (how much worse;
        below zero: better), ``low`` and ``high`` of the drop, all in the unit that tables show, and ``outcome``:
        passed, failed, or undecided where the base has no number.
    """
    column = guarded.column
    order = {image: place for place, image in enumerate(dict.fromkeys([*base[0], *system[0]]))}
    sums = [image_sums(images, metric.table(items), order) for images, items in (base, system)]
    drawn = np.split(resampled(np.concatenate(sums, axis=1), resamples, seed), 2, axis=1)
    before, after = (column.factor * metric.rates(part)[column.key] for part in drawn)
    drops = before - after if column.better == "higher" else after - before
    low, high, _ = percentiles(drops[1:])

    def shown(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    drop = shown(drops[0])
    if np.isnan(before[0]):
        outcome = UNDECIDED
    elif drop is None:
        outcome = FAILED
    else:
        outcome = FAILED if drop > guarded.allowed and low is not None and low > 0 else PASSED
    return {
        "key": guarded.key,
        "benchmark": guarded.benchmark,
        "label": column.label,
        "digits": column.digits,
        "allowed": guarded.allowed,
        "base": shown(before[0]),
        "value": shown(after[0]),
        "drop": drop,
        "low": low,
        "high": high,
        "outcome": outcome,
    }


def sentence(verdict: Mapping[str, Any], system: str, base: str = "the base") -> str:
    """A verdict in words, without a full stop."""

    def number(name: str) -> str:
        return f"{verdict[name]:.{verdict['digits']}f}"

    name = f"{system}, {verdict['key']}"
    if verdict["outcome"] == UNDECIDED:
        return f"{name}: undecided, {base} has no value"
    if verdict["value"] is None:
        return f"{name}: failed, it has no value ({base} {number('base')})"
    change = f"{number('base')} to {number('value')}"
    noise = "no interval" if verdict["low"] is None else f"paired interval {number('low')} to {number('high')}"
    within = "beyond" if verdict["drop"] > verdict["allowed"] else "within"
    if verdict["drop"] <= 0:
        return f"{name}: passed, {change}, no drop"
    text = f"{change}, a drop of {number('drop')} ({noise}), {within} the allowed {verdict['allowed']:g}"
    unclear = ", but not outside noise" if within == "beyond" and verdict["outcome"] == PASSED else ""
    return f"{name}: {verdict['outcome']}, {text}{unclear}"
