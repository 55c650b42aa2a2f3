"""The metrics that a benchmark may name, and what is the same for all of them: settings, scores, intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation import amber, chair, mmbench, mme, pope, reviews, short_answer, vqa
from m3po_jax.evaluation.bootstrap import image_sums, percentiles, resampled
from m3po_jax.evaluation.metric import Answers, Item, Metric

METRICS: dict[str, Metric] = {
    "pope": pope.METRIC,
    "chair": chair.METRIC,
    "short_answer": short_answer.METRIC,
    "mme": mme.METRIC,
    "vqa": vqa.METRIC,
    "mmbench": mmbench.METRIC,
    "amber": amber.METRIC,
    "amber_yes_no": amber.YES_NO,
    "mmhal": reviews.MMHAL,
    "llava_bench": reviews.LLAVA_BENCH,
}
_EVERY = ("metric", "data", "kind", "rule")  # settings of every metric


def check(name: str, config: BenchmarkConfig) -> Metric:
    """The metric that a benchmark of this name and these settings has.

    Raises:
        UserError: an unknown metric or rule, a setting of another metric, or one that the metric refuses.
    """
    where = f"evaluate.benchmarks.{name}"
    if config.metric not in METRICS:
        raise UserError(f"unknown metric {config.metric!r}{nearest(config.metric, METRICS)}", where=where)
    metric = METRICS[config.metric]
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else []
        if field.name not in (*_EVERY, *metric.settings) and getattr(config, field.name) != default:
            readers = ", ".join(name for name, reader in METRICS.items() if field.name in reader.settings)
            raise UserError(
                f"{config.metric} has no such setting",
                where=f"{where}.{field.name}",
                remedy=f"it is one of {readers}",
            )
    try:
        metric.rule(config)
        metric.check(config)
    except UserError as error:
        raise UserError(error.what, where=f"{where}.{error.where}", remedy=error.remedy) from None
    return metric


def score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    """What a metric makes of answers, with the name of its rule in the ``summary`` and whose it is in ``rule``.

    Raises:
        UserError: answers and questions do not match by id.
    """
    metric = METRICS[config.metric]
    rule = metric.rule(config)
    scored = metric.score(prompts, answers, config, rule)
    scored["summary"]["rule"] = rule
    return scored | {"rule": {"name": rule, "version": metric.rules[rule]}}


def intervals(
    metric: Metric, items: Sequence[Item], images: Sequence[str], resamples: int, seed: int
) -> dict[str, list[float]]:
    """95 % bootstrap intervals over images of the columns' values, by key, where they are defined.

    Args:
        images: Of each item.
    """
    if not items:
        return {}
    rates = metric.rates(resampled(image_sums(images, metric.table(items)), resamples, seed))
    spans = {column.key: percentiles(rates[column.key][1:])[:2] for column in metric.drawn}
    return {key: [low, high] for key, (low, high) in spans.items() if low is not None and high is not None}
