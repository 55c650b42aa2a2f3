"""The score stage with a server as judge: killed, continued, counted, and the key nowhere to be found."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mini_run import environment, m3po, rows, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.config import EndpointConfig, Recipe, ScoreConfig
from m3po_jax.pipeline.mock import shrink

sys.path.append(str(Path(__file__).parents[1] / "scoring"))
from stub_server import KEY, completion, stub_server

PRICES = {"prompt_price": 2.0, "completion_price": 10.0}


def graded(request, number):
    """A grade that depends on the answer's text alone; the server likes to talk about keys."""
    text = next(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")
    return completion(str(1 + sum(map(ord, text)) % 5), prompt_tokens=1000, completion_tokens=2, note=KEY)


@pytest.mark.parametrize("verb", ["run", "validate"])
def test_a_run_without_the_key_says_so_before_it_starts(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    server = {"base_url": "https://judge.example/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data"), score={"backend": "endpoint", "endpoint": server})
    assert main([verb, "--config", str(recipe)]) == 2
    assert "the environment variable JUDGE_KEY is not set" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "mini" / "round-1").exists()


def test_a_killed_command_pays_nothing_twice(tmp_path, capsys, monkeypatch):
    from m3po_jax.report import build_report

    monkeypatch.setenv("JUDGE_KEY", KEY)
    data = write_data(tmp_path / "data", count=8)
    with stub_server() as server:

        def slow(request, number):
            time.sleep(0.05)
            return graded(request, number)

        server.respond = slow
        config = {"base_url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY", "concurrency": 2, **PRICES}
        score = {"backend": "endpoint", "endpoint": config, "confidence": ["mean", "cluster"]}
        recipe = str(write_recipe(tmp_path, data, score=score))
        run = tmp_path / "runs" / "mini"
        assert main(["generate", "--config", recipe]) == 0
        process = m3po("score", "--config", recipe, JUDGE_KEY=KEY)
        while len(server.requests) < 12 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        printed = "".join(process.communicate(timeout=120))
        (cache,) = (tmp_path / "runs" / "endpoint-cache").glob("*.jsonl")
        kept, asked = len(cache.read_bytes().splitlines()), len(server.requests)
        assert asked - 3 <= kept <= asked, "only what was in flight is lost"

        # A limit that is reached stops with one line; another limit is no other recipe.
        server.respond = graded
        assert main(["score", "--config", recipe, "score.endpoint.max_cost=0.04"]) == 2
        message = capsys.readouterr()
        assert "score.endpoint.max_cost" in message.err and "paid answers are kept" in message.err
        assert main(["score", "--config", recipe, "score.endpoint.max_cost=10"]) == 0
        scored = rows(run / "round-1" / "scores")
        distinct = {(row["id"], row["text"]) for row in rows(run / "round-1" / "candidates")}
        assert len(server.requests) == len(distinct) + asked - kept, "no answer was paid for twice"
        assert all(row["mas"] is not None and row["mas_endpoint"] == row["mas"] for row in scored)
        assert len({row["mas"] for row in scored}) > 2

        cost = len(distinct) * (1000 * 2 + 2 * 10) / 1e6
        manifest = json.loads((run / "manifest.json").read_text())
        (stage,) = [stage for stage in manifest["stages"] if stage["stage"] == "score"]
        noted = stage["details"]["judge-1"]
        assert noted["requests"] == len(distinct) and noted["cost"] == pytest.approx(cost, abs=1e-6)
        page = build_report(run).read_text(encoding="utf-8")
        assert f"{len(distinct)} requests" in page and "judge-1" in page

        output = capsys.readouterr()
        for text in (printed, message.out + message.err, output.out + output.err):
            assert KEY not in text
        assert any(KEY in json.dumps(request["headers"]) for request in server.requests)
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def endpoint_recipe(folder, server, *, count=2, **config):
    server = {"base_url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY", **config}
    score = {"backend": "endpoint", "endpoint": server, "confidence": ["mean"]}
    data = write_data(folder / "data", count=count)
    return str(write_recipe(folder, data, score=score, generate={"num_candidates": 3, "shard_rows": 2}))


def is_question(request):
    return "yes or no" in json.dumps(request).lower() or "is there" in json.dumps(request).lower()


def test_abstentions_are_drops_with_their_reason_and_counted(tmp_path, monkeypatch, capsys):
    from m3po_jax.report import build_report

    monkeypatch.setenv("JUDGE_KEY", KEY)
    with stub_server() as server:
        server.respond = lambda request, number: completion(
            "It is \x1b[31ma picture." if is_question(request) else "4"
        )
        recipe = endpoint_recipe(tmp_path, server, max_reasks=0)
        for verb in ("generate", "score", "select"):
            assert main([verb, "--config", recipe]) == 0
    run = tmp_path / "runs" / "mini"
    scored = rows(run / "round-1" / "scores")
    missing = [row for row in scored if row["id"].startswith("q")]
    assert len(missing) == 3 and {row["abstained"] for row in missing} == {"no_grade"}
    assert all(row["abstained"] is None for row in scored if row not in missing)
    drops = [json.loads(line) for line in (run / "round-1" / "pairs" / "drops.jsonl").read_text().splitlines()]
    assert ("abstained", "no_grade") in {(drop["reason"], drop.get("detail")) for drop in drops}
    printed = capsys.readouterr().err
    assert r"6 of 9 candidates scored by endpoint, 3 abstained (no_grade: 'It is \x1b[31ma picture.')" in printed
    assert "\x1b" not in printed
    counts = {"rows": 9, "scored": 6, "abstained": {"no_grade": 3}}
    calibration = json.loads((run / "round-1" / "scores" / "calibration.json").read_text())
    assert calibration["counts"] == counts
    (stage,) = [s for s in json.loads((run / "manifest.json").read_text())["stages"] if s["stage"] == "score"]
    assert {name: stage[name] for name in counts} == counts
    assert "6 of 9 candidates scored, 3 abstained (no_grade)." in build_report(run).read_text(encoding="utf-8")


def test_a_judge_that_is_down_stops_the_stage_and_is_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    scores = tmp_path / "runs" / "mini" / "round-1" / "scores"
    with stub_server() as server:
        server.respond = lambda request, number: (503, {}, {"error": {"message": "at lunch\n\x1b[2J"}})
        recipe = endpoint_recipe(tmp_path, server, max_retries=1)
        assert main(["generate", "--config", recipe]) == 0
        for verb in ("score", "run"):
            assert main([verb, "--config", recipe]) == 75
            printed = capsys.readouterr().err
            assert "the server gives no answer (status 503 (at lunch " in printed and "\x1b" not in printed
            assert not list(scores.glob("*.parquet"))
        # Unwell for one prompt: what was answered is kept, and a shard without all of its answers is none.
        server.respond = lambda request, number: (503, {}, {}) if is_question(request) else completion("4")
        assert main(["score", "--config", recipe]) == 75
        printed = capsys.readouterr().err
        assert "6 of 9 candidates scored, 3 abstained (no_answer: status 503); paid answers are kept" in printed
        kept, before = list(scores.glob("*.parquet")), len(server.requests)
        assert all(row["abstained"] is None for path in kept for row in rows(path)) and len(kept) == 1
        server.respond = lambda request, number: completion("5")
        assert main(["score", "--config", recipe]) == 0
        distinct = {(r["id"], r["text"]) for r in rows(scores.parent / "candidates") if r["id"].startswith("q")}
        assert len(server.requests) - before == len(distinct), "what was answered is not asked again"
        assert "9 of 9 candidates scored by endpoint" in capsys.readouterr().err
    assert {row["mas"] for row in rows(scores) if row["id"].startswith("q")} == {1.0}


def test_more_room_for_answers_asks_again_where_they_were_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    scores = tmp_path / "runs" / "mini" / "round-1" / "scores"

    def respond(request, number):
        long = is_question(request) and request["max_tokens"] < 64
        return completion("<think>There is", finish_reason="length") if long else completion("4")

    with stub_server() as server:
        server.respond = respond
        recipe = endpoint_recipe(tmp_path, server, max_reasks=0)
        assert main(["generate", "--config", recipe]) == main(["score", "--config", recipe]) == 0
        assert "3 abstained (cut_at_16: finish_reason length at 16 tokens, its thinking did not end)" in (
            capsys.readouterr().err
        )
        before = len(server.requests)
        assert main(["score", "--config", recipe]) == 0 and len(server.requests) == before, "nothing has changed"
        assert main(["score", "--config", recipe, "score.endpoint.max_tokens=64"]) == 0
    assert all(row["mas"] == 0.75 and row["abstained"] is None for row in rows(scores))


def test_mock_recipes_call_no_server():
    server = EndpointConfig(base_url="https://judge.example/v1", model="m", api_key_env="NO_SUCH_KEY")
    for backend in ("endpoint", "judge"):
        score = shrink(Recipe(score=ScoreConfig(backend=backend, model="/models/large", endpoint=server))).score
        assert (score.backend, score.model) == ("claims", "")
    members = ["endpoint", "judge=/models/a", "similarity=/models/b", "reference"]
    score = shrink(Recipe(score=ScoreConfig(backend="ensemble", members=members, endpoint=server))).score
    assert score.members == ["claims", "claims", "similarity=builtin:quickstart-scorer", "reference"]


WORKER = """
from m3po_jax.hosts.startup import initialize_distributed
initialize_distributed()
import jax
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.hosts.agreement import from_writer
assert jax.process_count() == 2
ran = []
def make(outcome):
    ran.append(1)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
print(from_writer(lambda: make({"scores": [0.5, float("nan")], "reasons": [None, "ü" * 3000]}))["scores"][0])
for error in (UserError("no money"), Interrupted("told to stop")):
    try:
        from_writer(lambda: make(error))
    except type(error) as found:
        print(type(found).__name__, found)
print("ran", len(ran))
"""


def test_one_host_asks_and_every_host_knows():
    address = f"127.0.0.1:{free_port()}"
    variables = {"M3PO_COORDINATOR": address, "M3PO_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment() | variables | {"M3PO_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said
    lines = [[line for line in output.splitlines() if "[Gloo]" not in line] for output, _ in said]
    assert lines[0] == ["0.5", "UserError no money", "Interrupted told to stop", "ran 3"]
    there = "on process 0:"
    assert lines[1] == ["0.5", f"UserError {there} no money", f"Interrupted {there} told to stop", "ran 0"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
