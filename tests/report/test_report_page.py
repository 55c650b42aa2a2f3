"""The page as a whole: contents, hostile text, missing and broken parts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import (
    HOSTILE,
    evaluation,
    metric_rows,
    picture,
    word,
    write_json,
    write_jsonl,
    write_round,
    write_run,
)

from m3po_jax.errors import UserError
from m3po_jax.report import build_report


class Page(HTMLParser):
    """Elements, their attributes, and the text outside and inside of scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._raw = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts[-1] += data
        elif self._raw != "style":
            self.words.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]

    def assert_inert(self) -> None:
        """No script but ours, no event handler, nothing that leaves the page."""
        assert [attrs for tag, attrs in self.elements if tag == "script"] == [
            {"type": "application/json", "id": "chart-data"},
            {},
        ]
        assert {tag for tag, _ in self.elements}.isdisjoint({"iframe", "object", "embed", "form", "base", "b-x"})
        for tag, attrs in self.elements:
            assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
            for name in ("src", "href", "srcset", "action", "xlink:href"):
                assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
        (policy,) = [a["content"] for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(self.scripts[1].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def build(run: Path, **kwargs: object) -> Page:
    page = Page(build_report(run, **kwargs))
    page.assert_inert()
    return page


def test_finished_run_shows_every_section(tmp_path):
    page = build(write_run(tmp_path / "run"), token_text=word)
    ids = {attrs.get("id") for _, attrs in page.elements}
    assert {"summary", "evaluation", "selection", "training", "browser", "stages"} <= ids
    assert {
        "curve-loss",
        "curve-rewards-margins",
        "curve-rewards-accuracies",
        "curve-delta-logps-chosen",
    } <= ids
    assert {"hist-mas-1", "hist-confidence-2", "scatter-2", "frontier-0", "forest-0-chair-i"} <= ids
    for text in (
        "scenes-tiny",
        "8 × TPU v5e",
        "2026-11-23 08:32 UTC",
        "sha256:ab12",
        "0.10.2",
        "builtin:tiny-llava",
    ):
        assert text in page.text
    assert "no contrast" in page.text and "below floor" in page.text
    assert "The judge shares the policy's vision encoder. (round 1, round 2)" in page.text
    assert "correlate within prompts at 0.47" in page.text
    # On each round's page, and the latest round's among the warnings.
    assert page.text.count("Its AUROC is about 0.5, so λ is noise.") == 3
    assert {"auroc-1", "reliability-mas-2", "reliability-confidence-sum-1"} <= ids
    assert "412 answers, 61 % of them right" in page.text.replace("\u00a0", " ")
    assert "1,234 requests, 910,000 prompt tokens, 2,468 completion tokens, cost 1.845" in page.text
    assert "likelihood displacement" in page.text
    assert "Not there yet" not in page.text
    pairs = [a for a in page.of_class("item") if a["data-status"] == "pair"]
    assert len(pairs) == 40  # 20 in each of two rounds
    assert len([a for a in page.of_class("item") if a["data-status"] == "dropped: no_contrast"]) > 0
    assert "ln 2: start of DPO" in page.text
    json.loads(page.scripts[0])


def test_pair_shows_all_candidates_with_scores_and_roles(tmp_path):
    run = tmp_path / "run"
    write_round(run / "round-1", prompts=2, k=4)
    page = build(run, token_text=word)
    rows = [attrs.get("class") for tag, attrs in page.elements if tag == "tr" and "class" in attrs]
    assert rows[:2] == ["chosen", "rejected"] and rows.count("chosen") == 1
    assert len(page.of_class("answer")) == 8  # 4 of the pair, 4 of the dropped prompt
    colours = [attrs for tag, attrs in page.elements if tag == "i" and re.fullmatch(r"t\d", attrs.get("class") or "")]
    assert len([attrs for attrs in colours if "title" in attrs]) == 8 * 8
    assert all(re.fullmatch(r"−?\d+\.\d\d", attrs["title"]) for attrs in colours if "title" in attrs)
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 2 and all(a["src"].startswith("data:image/webp;base64,") for a in images)
    plain = build(run)  # without a tokenizer the text and its mean log-probability remain
    assert "mean log-prob −" in plain.text and "Token probability" not in plain.text


def test_hostile_text_is_inert_and_visible(tmp_path):
    run = write_run(tmp_path / "run", hostile=True, arms=("</script><script>document.title='owned'<",), steps=5)
    table = evaluation()
    table["tables"][0]["title"] = HOSTILE
    table["tables"][0]["rows"][1]["name"] = HOSTILE
    table["tables"][0]["columns"][0]["label"] = HOSTILE
    table["warnings"] = [HOSTILE, "lone surrogate \ud800"]
    write_json(run / "evaluation.json", table)
    page = build(run, token_text=lambda token: f"<img src=x onerror=alert({token})>")
    assert "<script>document.title='owned'</script>" in page.text  # shown as text
    assert "{{ 7*7 }}" in page.text and "猫 🐈" in page.text
    assert "\x00" not in page.source and "\x07" not in page.source
    assert "\u2028" not in page.scripts[0] and "<" not in page.scripts[0] and "&" not in page.scripts[0]
    assert "<b>below floor</b>" in page.text


def test_no_secret_of_the_environment_is_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/a/very/private/place")
    page = build(write_run(tmp_path / "run", rounds=1))
    assert "${oc.env:HOME}" in page.text and "private" not in page.text


def test_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run", rounds=1)
    first = build_report(run, word).read_bytes()
    assert build_report(run, word).read_bytes() == first
    assert [path.name for path in run.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize("prepare", ["missing", "empty", "unrelated"])
def test_nothing_to_report_is_a_user_error(tmp_path, prepare):
    run = tmp_path / "run"
    if prepare != "missing":
        run.mkdir()
    if prepare == "unrelated":
        (run / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="run"):
        build_report(run)


@pytest.mark.parametrize(
    ("kept", "absent"),
    [
        ("config.yaml", "candidates, scores, pairs, training metrics, evaluation"),
        ("manifest.json", "candidates, scores, pairs, training metrics, evaluation"),
        ("evaluation.json", "candidates, scores, pairs, training metrics"),
        ("round-1/candidates", "scores, pairs, training metrics, evaluation"),
        ("round-1/scores", "pairs, training metrics, evaluation"),
        ("round-1/pairs", "candidates, scores, training metrics, evaluation"),
        ("round-1/metrics.jsonl", "candidates, scores, pairs, evaluation"),
        ("round-1/prompts.parquet", "candidates, scores, pairs, training metrics, evaluation"),
        ("arms", "candidates, scores, pairs, training metrics, evaluation"),
    ],
)
def test_any_single_part_is_enough(tmp_path, kept, absent):
    whole = write_run(tmp_path / "whole", rounds=1, arms=("dpo",), steps=4)
    part = tmp_path / "part"
    (part / kept).parent.mkdir(parents=True)
    copy = shutil.copytree if (whole / kept).is_dir() else shutil.copy
    copy(whole / kept, part / kept)
    page = build(part, token_text=word)
    stated = re.search(r"Not there yet: ([a-z, ]*)\.", page.text)
    assert stated and stated.group(1).replace("candidates, ", "", kept == "round-1/scores") == absent.replace(
        "candidates, ", "", kept == "round-1/scores"
    )


def test_pairs_without_candidates_show_their_own_answers(tmp_path):
    run = tmp_path / "run"
    write_round(run / "round-1", prompts=2)
    shutil.rmtree(run / "round-1" / "candidates")
    shutil.rmtree(run / "round-1" / "scores")
    (run / "round-1" / "prompts.parquet").unlink()
    page = build(run)
    assert len(page.of_class("answer")) == 2
    assert "Which things do you see" in page.text
    assert "The candidates of this prompt are not in the run directory." in page.text


def test_broken_files_are_named_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", rounds=1, steps=4)
    metrics = run / "round-1" / "metrics.jsonl"
    metrics.write_text("[1, 2]\n" + metrics.read_text())  # and its last line is a write in progress
    (run / "round-1" / "candidates" / "shard-1.parquet").write_bytes(b"PAR1 half a shard")
    (run / "evaluation.json").write_text('{"tables": [')
    (run / "config.yaml").write_text("a: [1\n")
    page = build(run)
    assert "round-1/metrics.jsonl: 1 malformed line left out" in page.text
    assert "round-1/candidates/shard-1.parquet: not readable as parquet" in page.text
    assert "evaluation.json: not readable as JSON" in page.text
    assert "config.yaml: not readable" in page.text


def test_half_written_last_line_is_no_problem(tmp_path):
    run = tmp_path / "run"
    write_jsonl(run / "round-1" / "metrics.jsonl", metric_rows(6, 1.0, 0), tail='{"step": 7, "loss": 0.')
    page = build(run)
    assert "left out" not in page.text
    assert json.loads(page.scripts[0])["curve-loss"]["series"][0]["x"] == [1, 2, 3, 4, 5, 6]


def test_resumed_steps_count_once_and_odd_values_are_left_out(tmp_path):
    run = tmp_path / "run"
    rows = [
        {"step": 1, "loss": 0.69},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 9.0},
        {"step": 3, "loss": 0.5},  # after a resume
        {"step": 4, "loss": "high"},
        {"loss": 1.0},
        {"step": 5, "loss": None},
    ]
    write_jsonl(run / "round-1" / "metrics.jsonl", rows)
    page = build(run)
    (series,) = json.loads(page.scripts[0])["curve-loss"]["series"]
    assert (series["x"], series["y"]) == ([1, 3], [0.69, 0.5])
    assert "not finite at some steps" in page.text


def test_unexpected_json_types_do_not_stop_the_report(tmp_path):
    run = write_run(tmp_path / "run", rounds=1, steps=3)
    manifest = {
        "name": 7,
        "versions": [1],
        "model": "x",
        "data": None,
        "stages": [3, {"stage": None, "seconds": "x"}],
    }
    write_json(run / "manifest.json", manifest)
    write_json(run / "round-1" / "pairs" / "summary.json", {"prompts": "many", "drops": [1], "warnings": "none"})
    write_json(run / "round-1" / "scores" / "calibration.json", {"mas": 3, "confidence": None})
    rows = [4, {"name": None, "kind": "<i>", "values": 3, "intervals": {"a": [1]}}, {"name": "base"}]
    tables = [None, {"columns": [{"key": "a", "digits": "x"}, 5], "rows": rows}, {}]
    write_json(run / "evaluation.json", {"tables": tables, "warnings": {"a": 1}})
    write_json(run / "round-1" / "evaluation" / "pope" / "results.json", [1])
    write_jsonl(
        run / "round-1" / "evaluation" / "pope" / "items.jsonl",
        [{"id": 3, "output": {"a": 1}, "correct": "yes"}],
    )
    build(run)


def test_unreadable_images_become_a_placeholder(tmp_path, monkeypatch):
    good = picture(0)
    kinds = [good, good[:200], b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", b""]
    monkeypatch.setattr("report_runs.picture", lambda seed, side: kinds[seed])
    write_round(tmp_path / "run" / "round-1", prompts=4)
    page = build(tmp_path / "run")
    assert len([1 for tag, _ in page.elements if tag == "img"]) == 1
    assert page.text.count("image not readable") == 3


def test_evaluation_is_bold_only_outside_the_interval_of_the_base(tmp_path):
    columns = [
        {"key": "f1", "label": "F1", "digits": 1, "better": "higher"},
        {"key": "chair", "label": "CHAIR", "digits": 1, "better": "lower"},
        {"key": "length", "label": "Length", "digits": 1, "better": None},
    ]
    rows = [
        {"name": "base", "kind": "arm", "values": {"f1": 80.0, "chair": 10.0, "length": 9.0},
         "intervals": {"f1": [79.0, 81.0], "chair": [9.0, 11.0], "length": [8.5, 9.5]}},
        {"name": "m3po", "kind": "arm", "values": {"f1": 80.9, "chair": 8.9, "length": 4.0}, "intervals": {}},
        {"name": "sft", "kind": "arm", "values": {"f1": 70.0, "chair": None, "length": 9.1}, "intervals": {}},
        {"name": "stop", "kind": "frontier", "values": {"f1": 79.5, "chair": 12.0}, "intervals": {}},
    ]  # fmt: skip
    write_json(tmp_path / "run" / "evaluation.json", {"tables": [{"title": "T", "columns": columns, "rows": rows}]})
    page = build(tmp_path / "run")
    cells = [attrs["class"] for tag, attrs in page.elements if tag == "td" and "num" in (attrs.get("class") or "")]
    verdicts = np.array([cell.replace("num", "").strip() for cell in cells]).reshape(4, 3).tolist()
    assert verdicts == [["", "", ""], ["", "better", "differs"], ["worse", "", ""], ["", "worse", ""]]
    bold = re.findall(r"<td class=\"num[^>]*><b>([^<]*)</b>", page.source)
    assert bold == ["8.9", "4.0", "70.0", "12.0"]
    assert len(page.of_class("kind-frontier")) == 1


def test_report_of_a_long_run_stays_small(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def noise(seed: int, side: int) -> bytes:
        out = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        return out.getvalue()

    monkeypatch.setattr("report_runs.picture", noise)
    write_round(tmp_path / "run" / "round-1", prompts=120, k=8, words=160)
    write_jsonl(tmp_path / "run" / "round-1" / "metrics.jsonl", metric_rows(3000, 1.0, 0))
    path = build_report(tmp_path / "run", word)
    assert path.stat().st_size < 5_000_000
    page = Page(path)
    charts = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(charts) >= 10 and sum(map(len, charts)) < 100_000 * len(charts)
    assert len([1 for tag, _ in page.elements if tag == "img"]) == 84  # 60 pairs, 24 dropped prompts


def test_a_run_without_pairs_speaks_of_no_chosen_answers(tmp_path):
    write_round(tmp_path / "run" / "round-1", prompts=6)
    shutil.rmtree(tmp_path / "run" / "round-1" / "pairs")
    page = build(tmp_path / "run")
    assert "scatter-1" in page.source and "hist-mas-1" in page.source
    assert not re.search(
        "chosen|rejected", page.text.split("From prompts to pairs")[1].replace("confidently wrong", "")
    )


def test_max_pairs_bounds_the_browser(tmp_path):
    write_round(tmp_path / "run" / "round-1", prompts=30, k=2)
    page = build(tmp_path / "run", max_pairs=5)
    assert len([a for a in page.of_class("item") if a["data-status"] == "pair"]) == 5
