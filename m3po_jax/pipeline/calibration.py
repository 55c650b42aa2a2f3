"""The calibration page's numbers: do MAS and confidence know which answers are right? (docs/method.md)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.data import tables
from m3po_jax.data.schema import Prompt
from m3po_jax.evaluation.bootstrap import bootstrap
from m3po_jax.pipeline.score_counts import count_scores, counts_line
from m3po_jax.scoring.calibration import auroc, concordance, reliability, within_prompt_correlation
from m3po_jax.scoring.claims import object_vocabulary
from m3po_jax.scoring.truth import MEANINGS, known_truth, objects_of
from m3po_jax.selection import CORRELATION_LIMIT

# Confidences that are mean log-probs of tokens: their exponential is a probability.
LOG_PROBABILITIES = frozenset({"confidence_mean", "confidence_tail", "confidence_prior"})
NATS = frozenset({"confidence_sum", "confidence_visual"})
CHANCE, NEAR_CHANCE, WEAK_JUDGE = 0.5, 0.05, 0.6
RESAMPLES = 500
MOSTLY = 0.9  # a judge that scores a smaller share of the candidates is warned of


def calibration(
    candidates: Path,
    scores: Path,
    prompts: Mapping[str, Prompt],
    confidence: str,
    *,
    circular: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC, reliability and agreement of MAS (each member) and of every confidence variant.

    Args:
        confidence: The variant that the selection uses, reported as ``confidence``.
        circular: MAS is made of the ground truth itself.

    Returns:
        ``correlation_mas_confidence`` by variant, which needs no ground truth; ``truths``: kinds of ground truth with
        their counts; for every signal (``mas``, ``mas_<member>``, ``confidence``, ``confidence_<variant>``) with
        answers of both kinds: ``auroc``, ``n``, ``within`` (the AUROC within prompts, with its bootstrap interval
        over prompts), ``by_truth`` and ``reliability``; ``verdict``: what it means, in plain words.
    """
    rows = list(tables.read_rows(scores))
    texts = {
        (row["id"], row["candidate"]): row["text"]
        for row in tables.read_rows(candidates, columns=["id", "candidate", "text"])
    }
    ids = [row["id"] for row in rows]
    signals = _signals(rows)
    variants = [name for name in signals if name.startswith("confidence_")]
    result: dict[str, Any] = {
        "correlation_mas_confidence": {
            name: finite(within_prompt_correlation(ids, signals["mas"], signals[name])) for name in variants
        },
        "circular": circular,
        "counts": count_scores(rows),
    }
    named = map(objects_of, prompts.values())
    vocabulary = object_vocabulary(sorted({name for objects in named for name in objects or ()}))
    truths = [known_truth(prompts[row["id"]], texts[row["id"], row["candidate"]], vocabulary) for row in rows]
    index = np.array([i for i, truth in enumerate(truths) if truth is not None], int)
    kinds = np.array([truth[0] for truth in truths if truth is not None])
    labels = np.array([truth[1] for truth in truths if truth is not None], bool)
    result["truths"] = [
        {"kind": kind, "meaning": MEANINGS[kind], "n": len(of_kind), "true": int(of_kind.sum())}
        for kind in sorted(set(kinds.tolist()))
        for of_kind in [labels[kinds == kind]]
    ]
    if labels.any() and not labels.all():
        known_ids = [ids[i] for i in index]
        for name, values in signals.items():
            quality = _signal(name, known_ids, values[index], labels, kinds, seed)
            if name == f"confidence_{confidence}":
                result["confidence"] = quality | {"variant": confidence}
            else:
                result[name] = quality
    result["verdict"] = verdict(result, confidence)
    return result


def _signals(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """MAS, the scores that went into it, and the confidence variants; NaN where there is none."""
    names = [name for name in (rows[0] if rows else {}) if name.startswith(("mas_", "confidence_"))]
    table = {
        name: np.array([np.nan if row[name] is None else row[name] for row in rows], float)
        for name in ["mas", *sorted(names, key=lambda name: (name.startswith("confidence_"), name))]
    }
    # The only backend's column is MAS itself.
    return {
        name: values
        for name, values in table.items()
        if not name.startswith("mas_") or not np.array_equal(values, table["mas"], equal_nan=True)
    }


def _signal(
    name: str, ids: Sequence[str], values: np.ndarray, labels: np.ndarray, kinds: np.ndarray, seed: int
) -> dict[str, Any]:
    usable = np.isfinite(values)
    keys, wins, pairs = concordance(ids, values, labels)
    interval = bootstrap(
        keys, np.stack([wins, pairs], axis=1) if keys else np.zeros((0, 2)), resamples=RESAMPLES, seed=seed
    )
    of_kind = {
        str(kind): {
            "auroc": finite(auroc(values[kinds == kind], labels[kinds == kind])),
            "n": int(usable[kinds == kind].sum()),
        }
        for kind in np.unique(kinds)
    }
    return {
        "auroc": finite(auroc(values, labels)),
        "n": int(usable.sum()),
        "within": {
            "auroc": interval["estimate"],
            "low": interval["low"],
            "high": interval["high"],
            "pairs": int(pairs.sum()),
            "prompts": len(keys),
        },
        "by_truth": of_kind,
        "reliability": _reliability(name, values, labels),
    }


def _reliability(name: str, values: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Bins with their counts; ``ece`` where the score is a probability, else None."""
    nats, log = name in NATS, name in LOG_PROBABILITIES
    shown = np.exp(values) if log else values
    # Log-probs crowd: bins of equal population show them, bins of equal width would be empty.
    diagram = reliability(shown, labels, quantiles=nats or log)
    bins = [
        {"low": float(low), "high": float(high), "count": int(count), "score": float(score), "true": float(true)}
        for low, high, count, score, true in zip(
            diagram.edges[:-1],
            diagram.edges[1:],
            diagram.counts,
            diagram.mean_scores,
            diagram.mean_labels,
            strict=True,
        )
        if count
    ]
    return {"scale": "nats" if nats else "probability", "bins": bins, "ece": None if nats else finite(diagram.error)}


def verdict(result: Mapping[str, Any], confidence: str) -> list[dict[str, str]]:
    """What the numbers mean, as ``{"about", "tone", "text"}`` with tone warn, good or note."""
    lines: list[dict[str, str]] = []

    def say(about: str, tone: str, text: str) -> None:
        lines.append({"about": about, "tone": tone, "text": text})

    counts = result["counts"]
    if counts["abstained"]:
        say("abstained", "warn" if counts["scored"] < MOSTLY * counts["rows"] else "note", f"{counts_line(counts)}.")
    truths = result.get("truths") or []
    if not truths:
        say(
            "truth",
            "note",
            "No ground truth: the data lists no objects of the images and has no short reference answers, so nothing "
            "here tells whether MAS or confidence know right answers from wrong ones.",
        )
    elif "mas" not in result:
        right = all(truth["true"] for truth in truths)
        say(
            "truth",
            "note",
            f"Every answer whose truth is known is {'right' if right else 'wrong'}: nothing to tell apart.",
        )
    else:
        _judge_verdict(result, say)
        _confidence_verdict(result["confidence"], confidence, say)
        _other_variants(result, confidence, say)
    r = result["correlation_mas_confidence"].get(f"confidence_{confidence}")
    if r is not None and r > CORRELATION_LIMIT:
        say(
            "correlation",
            "warn",
            f"MAS and confidence ({confidence}) correlate at {r:.2f} within prompts (above {CORRELATION_LIMIT}): "
            "confidence partly repeats MAS, so compare with mas_dpo before crediting it.",
        )
    return lines


def _best_auroc(signal: Mapping[str, Any]) -> tuple[float, float | None, float | None, str]:
    """(AUROC, interval, where it was measured): within prompts if there are pairs, else over all answers."""
    within = signal["within"]
    if within["auroc"] is not None:
        return within["auroc"], within["low"], within["high"], "of the same prompt"
    value = signal["auroc"]
    return (CHANCE if value is None else value), None, None, "of all prompts"


def _judge_verdict(result: Mapping[str, Any], say: Any) -> None:
    value, low, high, where = _best_auroc(result["mas"])
    text = f"(AUROC {_span(value, low, high)})"
    if result["circular"]:
        say("mas", "note", "MAS is made of the ground truth itself here: its AUROC says nothing about a judge.")
    elif value < WEAK_JUDGE:
        say(
            "mas",
            "warn",
            f"MAS is a weak judge here: it hardly tells right from wrong answers {where} {text}. "
            "Check some pairs by eye.",
        )
    else:
        say("mas", "good", f"MAS tells right from wrong answers {where} {text}.")


def _confidence_verdict(signal: Mapping[str, Any], variant: str, say: Any) -> None:
    value, low, high, where = _best_auroc(signal)
    text = f"(AUROC {_span(value, low, high)})"
    covers = low is not None and high is not None and low <= CHANCE <= high
    if abs(value - CHANCE) < NEAR_CHANCE or covers:
        say(
            "confidence",
            "warn",
            f"Confidence ({variant}) separates right from wrong answers {where} no better than chance {text}: "
            "its AUROC is about 0.5, so λ is noise here. Try another variant, or compare with mas_dpo.",
        )
    elif value < CHANCE:
        say(
            "confidence",
            "note",
            f"Confidence ({variant}) is higher for wrong than for right answers {where} {text}: the model is "
            "confidently wrong. λ₋ finds such answers; λ₊ pulls the wrong way (select.lambda_preferred=0).",
        )
    else:
        say("confidence", "good", f"Confidence ({variant}) tells right from wrong answers {where} {text}.")


def _other_variants(result: Mapping[str, Any], used: str, say: Any) -> None:
    """Names a variant that knows clearly more than the one in use."""
    telling = {
        name.removeprefix("confidence_"): abs(_best_auroc(signal)[0] - CHANCE)
        for name, signal in result.items()
        if name.startswith("confidence_") and isinstance(signal, dict)
    }
    if not telling:
        return
    best = max(telling, key=lambda name: telling[name])
    if telling[best] > abs(_best_auroc(result["confidence"])[0] - CHANCE) + NEAR_CHANCE:
        value = _best_auroc(result[f"confidence_{best}"])[0]
        say("variants", "note", f"Of the variants computed, {best} knows most (AUROC {value:.2f}, against {used}).")


def _span(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f}, 95 % interval {low:.2f} to {high:.2f}"


def finite(value: float) -> float | None:
    """The value as JSON may hold it; None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
