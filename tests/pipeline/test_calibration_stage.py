"""The calibration page's numbers on a made-up round whose truth is known, and the words for them."""

from __future__ import annotations

import numpy as np
import pytest

from m3po_jax.config import ScoreConfig
from m3po_jax.data import tables
from m3po_jax.data.schema import CANDIDATE, Prompt
from m3po_jax.pipeline.calibration import calibration
from m3po_jax.pipeline.score import score_schema
from m3po_jax.report.calibration import calibration_views
from m3po_jax.scoring.claims import object_vocabulary
from m3po_jax.scoring.truth import known_truth
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.contents import Round

VARIANTS = ["mean", "sum", "cluster", "visual"]


class Pair:
    """Stands for an ensemble: a name and its members' columns."""

    name, columns = "ensemble", ("mas_similarity", "mas_claims")


def write(folder, signals, *, prompts=40, k=4, truth=True):
    """Candidates that name a cat (right) or a dog (wrong), half and half, with scores from `signals(right, rng)`."""
    rng = np.random.default_rng(0)
    candidates, scores, known = [], [], {}
    for p in range(prompts):
        key = f"p{p}"
        known[key] = Prompt(key, (), "Describe the image.", None, {"objects": ["cat", "bird"]} if truth else {})
        for c in range(k):
            right = c % 2 == 0
            candidates.append(
                {
                    "id": key,
                    "candidate": c,
                    "text": "a cat." if right else "a dog.",
                    "token_ids": [1],
                    "token_logprobs": [-1.0],
                }
            )
            scores.append({"id": key, "candidate": c, **signals(right, rng)})
    if truth:
        known["other"] = Prompt("other", (), "x", None, {"objects": ["dog"]})
    schema = score_schema(ScoreConfig(confidence=VARIANTS), Pair())  # type: ignore[arg-type]
    tables.write_table(folder / "candidates" / "0.parquet", candidates, CANDIDATE)
    tables.write_table(folder / "scores" / "0.parquet", scores, schema)
    return folder / "candidates", folder / "scores", known


def knowing(right, rng):
    """MAS and visual confidence know the truth, mean confidence does not, the sum is misled by it."""
    mas = float(np.clip(0.3 + 0.4 * right + 0.1 * rng.normal(), 0, 1))
    noise = rng.normal(size=3)
    return {
        "mas": mas,
        "mas_ensemble": mas,
        "mas_similarity": 0.5 + 0.4 * float(right),
        "mas_claims": 0.5 if rng.random() < 0.5 else None,
        "confidence_mean": -1 + 0.2 * noise[0],
        "confidence_sum": -9 - 4.0 * right + noise[1],
        "confidence_cluster": 0.25,
        "confidence_visual": 2.0 * right + 0.5 * noise[2],
    }


def test_every_signal_is_measured(tmp_path):
    found = calibration(*write(tmp_path, knowing), "mean")
    assert found["truths"][0]["kind"] == "objects" and (found["truths"][0]["n"], found["truths"][0]["true"]) == (
        160,
        80,
    )
    signals = {
        "mas",
        "mas_similarity",
        "mas_claims",
        "confidence",
        "confidence_sum",
        "confidence_cluster",
        "confidence_visual",
    }
    assert {name for name, value in found.items() if isinstance(value, dict) and "auroc" in value} == signals
    assert found["confidence"]["variant"] == "mean"
    assert found["mas"]["within"]["auroc"] > 0.95 and found["mas_similarity"]["auroc"] == 1.0
    assert found["confidence_cluster"]["auroc"] == 0.5 == found["confidence_cluster"]["within"]["auroc"]
    assert found["confidence_sum"]["within"]["auroc"] < 0.05
    assert found["mas_claims"]["n"] < 160 and found["mas"]["within"]["pairs"] == 40 * 4
    low, high = (found["mas"]["within"][key] for key in ("low", "high"))
    assert low <= found["mas"]["within"]["auroc"] <= high
    for name in signals:
        bins = found[name]["reliability"]["bins"]
        assert sum(b["count"] for b in bins) == found[name]["n"] and all(b["count"] > 0 for b in bins)
    # MAS in ten bins of equal width: its error by hand.
    rows = list(tables.read_rows(tmp_path / "scores"))
    mas, right = np.array([row["mas"] for row in rows]), np.array([row["candidate"] % 2 == 0 for row in rows])
    which = np.minimum((mas * 10).astype(int), 9)
    error = sum(
        abs(mas[which == b].mean() - right[which == b].mean()) * (which == b).mean() for b in set(which.tolist())
    )
    assert found["mas"]["reliability"]["ece"] == pytest.approx(error)
    assert found["confidence_visual"]["reliability"]["ece"] is None
    assert all(0 <= b["score"] <= 1 for b in found["confidence"]["reliability"]["bins"])
    assert set(found["correlation_mas_confidence"]) == {f"confidence_{name}" for name in VARIANTS}


def lines(found):
    return {(line["about"], line["tone"]): line["text"] for line in found["verdict"]}


def test_the_verdict_is_plain(tmp_path):
    folders = write(tmp_path, knowing)
    said = lines(calibration(*folders, "mean"))
    assert "no better than chance" in said["confidence", "warn"] and "λ is noise" in said["confidence", "warn"]
    assert "MAS tells right from wrong answers of the same prompt (AUROC 1.00, 95 %" in said["mas", "good"]
    assert "sum knows most" in said["variants", "note"] or "visual knows most" in said["variants", "note"]
    said = lines(calibration(*folders, "sum"))
    assert "confidently wrong" in said["confidence", "note"] and ("correlation", "warn") not in said
    said = lines(calibration(*folders, "visual"))
    assert ("confidence", "good") in said and "correlate at 0." in said["correlation", "warn"]
    said = lines(calibration(*folders, "visual", circular=True))
    assert "made of the ground truth" in said["mas", "note"]


def test_weak_judges_and_absent_truth_are_said(tmp_path):
    said = lines(
        calibration(*write(tmp_path / "a", lambda right, rng: knowing(right, rng) | {"mas": rng.random()}), "mean")
    )
    assert "weak judge" in said["mas", "warn"]
    said = lines(calibration(*write(tmp_path / "b", knowing, truth=False), "mean"))
    assert set(said) == {("truth", "note")} and "No ground truth" in said["truth", "note"]
    found = calibration(*write(tmp_path / "c", knowing, prompts=3, k=1), "mean")
    assert "mas" not in found and "nothing to tell apart" in lines(found)["truth", "note"]


def test_the_page_survives_anything_in_the_file(tmp_path):
    found = calibration(*write(tmp_path, knowing), "mean")
    (view,) = calibration_views([Round(Cell(tmp_path, 1), calibration=found)])
    assert view.rows[0]["name"] == "MAS" and len(view.rows) == 7 and view.comparison is not None
    assert len(view.figures) == 5 and len(view.bins) == 7
    broken = {
        "mas": {"auroc": "x", "within": 3, "reliability": {"bins": [{"low": 1}, 4]}},
        "verdict": [{"tone": "x"}, 1],
    }
    (view,) = calibration_views([Round(Cell(tmp_path, 1), calibration=broken | {"truths": "x", "judges": [{}]})])
    assert view.rows[0]["auroc"] == "–" and not view.figures and view.comparison is None and not view.verdict
    assert calibration_views([Round(Cell(tmp_path, 1))]) == []


@pytest.mark.parametrize(
    ("instruction", "reference", "metadata", "answer", "truth"),
    [
        ("Is there a cat?", "Yes", {"objects": ["cat"]}, "yes, there is", ("reference", True)),
        ("Is there a cat?", "Yes", {}, "No.", ("reference", False)),
        ("What is it?", "the red car", {}, "Red car.", ("reference", True)),
        ("Describe.", "a cat.", {"objects": ["cat"], "kind": "caption"}, "a cat and a dog.", ("objects", False)),
        ("Describe.", None, {"objects": ["cat"]}, "a cat.", ("objects", True)),
        ("Describe.", None, {"objects": []}, "a cat.", ("objects", False)),
        ("Describe.", None, {"objects": ["cat"]}, "nothing much", None),
        ("Describe.", "A long reference that nobody repeats word for word.", {}, "a cat.", None),
        ("Describe.", None, {}, "a cat.", None),
    ],
)
def test_what_is_known_to_be_right(instruction, reference, metadata, answer, truth):
    row = Prompt("x", (), instruction, reference, metadata)
    assert known_truth(row, answer, object_vocabulary(["cat", "dog"])) == truth
