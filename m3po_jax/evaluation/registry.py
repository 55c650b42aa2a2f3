"""The metrics that a benchmark may name: what a row needs, how answers are scored, and which intervals are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import parse_json_object
from m3po_jax.errors import UserError
from m3po_jax.evaluation import amber, chair, mmbench, mme, pope, reviews, short_answer, vqa
from m3po_jax.evaluation.bootstrap import bootstrap, ratio_of_sums

Answers = Sequence[Mapping[str, Any]]  # {"id", "text"[, "tokens"]}
Scored = Mapping[str, Any]
Intervals = dict[str, list[float]]


@dataclass(frozen=True)
class Metric:
    """One benchmark's rule.

    Attributes:
        missing: What a row lacks for this metric and how to mend it, None where it is complete.
        score: (rows, answers, settings) to ``summary``, ``items`` and more.
        intervals: (items, their images, resamples, seed) to 95 % bootstrap intervals over images by summary key.
        judged: The texts are a judge's reviews, not a model's answers.
        rules: What `rule` of a benchmark may name; empty: the metric has one rule.
    """

    missing: Callable[[Prompt], tuple[str, str] | None]
    score: Callable[[Sequence[Prompt], Answers, BenchmarkConfig], dict[str, Any]]
    intervals: Callable[[Sequence[Scored], Sequence[str], int, int], Intervals]
    judged: bool = False
    rules: tuple[str, ...] = ()


def image_of(prompt: Prompt) -> str:
    """What tells images apart for the bootstrap: the scene or image a row names, else the row."""
    return str(prompt.metadata.get("scene") or prompt.metadata.get("image") or prompt.id)


def _label(prompt: Prompt, **more: Any) -> dict[str, Any]:
    category = str(prompt.metadata.get("category") or "all")
    return {"id": prompt.id, "category": category, "image": image_of(prompt), **more}


def _needs_reference(prompt: Prompt) -> tuple[str, str] | None:
    return None if prompt.reference is not None else ("the row has no reference", "the metric needs the answer")


def _needs(name: str, kind: type) -> Callable[[Prompt], tuple[str, str] | None]:
    def missing(prompt: Prompt) -> tuple[str, str] | None:
        if isinstance(prompt.metadata.get(name), kind):
            return None
        return f"metadata.{name} is missing", f"the metric needs it as a {'list' if kind is list else 'mapping'}"

    return missing


def _nothing(prompt: Prompt) -> None:
    return None


def _both(*checks: Callable[[Prompt], tuple[str, str] | None]) -> Callable[[Prompt], tuple[str, str] | None]:
    return lambda prompt: next(filter(None, (check(prompt) for check in checks)), None)


def _ratios(columns: Mapping[str, Callable[[Scored], tuple[float, float]]]) -> Callable[..., Intervals]:
    """Intervals of ratios of sums: each metric by what an item adds to numerator and denominator."""

    def intervals(items: Sequence[Scored], images: Sequence[str], resamples: int, seed: int) -> Intervals:
        values = {name: [adds(item) for item in items] for name, adds in columns.items()}
        return _intervals({name: (own, ratio_of_sums) for name, own in values.items()}, images, resamples, seed)

    return intervals


def _intervals(
    statistics: Mapping[str, tuple[Any, Callable[..., Any]]], images: Sequence[str], resamples: int, seed: int
) -> Intervals:
    found: Intervals = {}
    for name, (values, statistic) in statistics.items():
        interval = bootstrap(images, values, statistic, resamples=resamples, seed=seed)
        if interval["low"] is not None:
            found[name] = [interval["low"], interval["high"]]
    return found


def _chair(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    objects = {prompt.id: prompt.metadata["objects"] for prompt in prompts}
    _same_ids(answers, objects, "CHAIR")
    names = config.vocabulary or sorted({name for own in objects.values() for name in own})
    records = [dict(answer) | {"objects": objects[answer["id"]]} for answer in answers]
    return chair.chair(records, chair.vocabulary(dict.fromkeys(names, ())))


def _same_ids(answers: Answers, known: Mapping[str, Any], where: str) -> None:
    unmatched = sorted({str(answer["id"]) for answer in answers}.symmetric_difference(known))
    if unmatched:
        raise UserError(
            f"{len(unmatched)} ids are in only one of answers and questions, e.g. {unmatched[0]!r}",
            where=where,
            remedy="the answers must be to exactly these questions",
        )


def _pope(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    return pope.pope(answers, [_label(prompt, label=prompt.reference) for prompt in prompts])


def _short_answer(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    return short_answer.short_answers(answers, [_label(prompt, reference=prompt.reference) for prompt in prompts])


def _mme(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    return mme.mme(answers, [_label(prompt, label=prompt.reference) for prompt in prompts])


def _mme_intervals(items: Sequence[Scored], images: Sequence[str], resamples: int, seed: int) -> Intervals:
    """Of the two sums: whole images are drawn, and every task's accuracy and accuracy⁺ follow from their sums."""
    right: dict[tuple[str, str], int] = {}
    for item in items:
        key = item["category"], item["image"]
        right[key] = right.get(key, 0) + bool(item["correct"])
    statistics = {}
    for name, tasks in (("perception", mme.PERCEPTION), ("cognition", mme.COGNITION)):
        present = [task for task in tasks if any(item["category"] == task for item in items)]
        if not present:
            continue
        # Each of an image's two questions brings half of it, so that questions can stay the rows.
        values = np.zeros((len(items), 3 * len(present)))
        for row, item in enumerate(items):
            if item["category"] in present:
                at = 3 * present.index(item["category"])
                both = right[item["category"], item["image"]] == 2
                values[row, at : at + 3] = bool(item["correct"]), 0.5 * both, 1.0
        statistics[name] = (values, _mme_sum)
    return _intervals(statistics, images, resamples, seed)


def _mme_sum(sums: Float[np.ndarray, "*batch columns"]) -> Float[np.ndarray, "*batch"]:
    """Σ over tasks of 100·correct/questions + 100·images with both/images, images being half the questions."""
    correct, plus, questions = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = 100 * correct / questions + 100 * plus / (questions / 2)
    return np.nansum(scores, axis=-1)


def _vqa(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    labels = [
        _label(p, answers=p.metadata["answers"], question_type=p.metadata.get("question_type")) for p in prompts
    ]
    return vqa.vqa(answers, labels, config.rule or "official")


def _mmbench(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    labels = []
    for prompt in prompts:
        options, index = prompt.metadata["options"], prompt.metadata.get("index", prompt.id)
        labels.append(_label(prompt, label=prompt.reference, options=options, index=index))
    return mmbench.mmbench(answers, labels)


def _amber_yes_no(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    return amber.discriminative(answers, [_label(prompt, label=prompt.reference) for prompt in prompts])


def _amber(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
    known = {prompt.id: prompt for prompt in prompts}
    _same_ids(answers, known, "AMBER")
    if not config.association:
        raise UserError("AMBER needs its relation.json", where="association", remedy="name the file in the benchmark")
    association = parse_json_object(_read(config.association), config.association)
    safe = _read(config.safe_words).splitlines() if config.safe_words else []
    records = [
        dict(answer) | {key: known[answer["id"]].metadata[key] for key in ("truth", "hallu")} for answer in answers
    ]
    if config.nouns not in ("vocabulary", "nltk"):
        raise UserError(f"unknown way {config.nouns!r} to find nouns", where="nouns", remedy="vocabulary or nltk")
    nouns = amber.nltk_nouns if config.nouns == "nltk" else amber.vocabulary_nouns(association)
    exact = config.similarity in ("", "exact")
    similarity = amber.exact_similarity if exact else amber.spacy_similarity(config.similarity)
    scored = amber.generative(records, association, safe, nouns=nouns, similarity=similarity)
    # The rule belongs to the numbers: with other nouns or another model they are not the published ones.
    scored["summary"] |= {"nouns": config.nouns, "similarity": "exact" if exact else config.similarity}
    return scored


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__})", where=path) from None


def _reviewed(score: Callable[[Answers, Answers], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def run(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig) -> dict[str, Any]:
        return score(answers, [_label(p, category=p.metadata.get("category")) for p in prompts])

    return run


def _correct(item: Scored) -> tuple[float, float]:
    return float(bool(item["correct"])), 1.0


_POPE = {
    "accuracy": _correct,
    "yes_ratio": lambda item: (float(item["parsed"] == "yes"), 1.0),
    # F1 = 2tp / (2tp + fp + fn), a ratio of sums too.
    "f1": lambda item: (
        2.0 * (item["parsed"] == "yes" and item["correct"]),
        2.0 * (item["parsed"] == "yes" and item["correct"]) + (not item["correct"]),
    ),
}
_CHAIR = {
    "chair_i": lambda item: (len(item["hallucinated"]), len(item["mentions"])),
    "chair_s": lambda item: (bool(item["hallucinated"]), 1),
    "recall": lambda item: (len(item["found"]), len(item["objects"])),
}
_AMBER = {
    "chair": lambda item: (100 * len(item["hallucinated"]), len(item["mentions"])),
    "cover": lambda item: (100 * len(item["found"]), len(item["objects"])),
    "hal": lambda item: (100 * bool(item["hallucinated"]), 1),
    "cog": lambda item: (100 * len(item["named"]), len(item["hallu"])),
}
METRICS: dict[str, Metric] = {
    "pope": Metric(_needs_reference, _pope, _ratios(_POPE)),
    "chair": Metric(_needs("objects", list), _chair, _ratios(_CHAIR)),
    "short_answer": Metric(_needs_reference, _short_answer, _ratios({"accuracy": _correct})),
    "mme": Metric(_needs_reference, _mme, _mme_intervals),
    "vqa": Metric(
        _needs("answers", list), _vqa, _ratios({"accuracy": lambda item: (item["accuracy"], 1.0)}), rules=vqa.RULES
    ),
    "amber_yes_no": Metric(
        _needs_reference,
        _amber_yes_no,
        _ratios({"accuracy": lambda item: (100.0 * item["correct"], 1.0)}),
    ),
    "amber": Metric(_both(_needs("truth", list), _needs("hallu", list)), _amber, _ratios(_AMBER)),
    "mmbench": Metric(
        _both(_needs_reference, _needs("options", dict)),
        _mmbench,
        # Each row brings its share of its question, so that questions with more rotations count once as well.
        _ratios({"accuracy": lambda item: (item["circular"] / item["rotations"], 1 / item["rotations"])}),
    ),
    "mmhal": Metric(
        _nothing,
        _reviewed(reviews.mmhal),
        _ratios(
            {
                "score": lambda item: (item["score"], 1.0),
                "hallucination_rate": lambda item: (float(item["hallucinated"]), 1.0),
            }
        ),
        judged=True,
    ),
    "llava_bench": Metric(
        _nothing,
        _reviewed(reviews.llava_bench),
        _ratios({"score": lambda item: (100 * item["model_score"], item["reference_score"])}),
        judged=True,
    ),
}
