"""The benchmarks at toy shapes: their report, their checks and their deterministic figures. No times are judged."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accelerator  # noqa: E402
import checkpoint  # noqa: E402
import counting  # noqa: E402
import decode_breakdown  # noqa: E402
import expert_torch  # noqa: E402
import measuring  # noqa: E402
import table  # noqa: E402

COLUMNS = {
    *("name", "peer", "shapes", "ours_s", "peer_s", "ratio", "ours_cpu_s", "peer_cpu_s", "ours_peak_mb"),
    *("peer_peak_mb", "compile_s", "dot_flops", "dot_flops_minimum", "temp_mb", "cache_copies", "checks", "warnings"),
}


def run(script, out, *options):
    """The report of a toy run, in a process of its own: a benchmark pins the process that it runs in."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--json", str(out), "--tiny", "--repeats", "2"]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def check_report(report, peers):
    assert report["threads"] == 1 and report["device"] and report["tiny"]
    assert {"jax", "torch", "transformers"} <= set(report["versions"])
    assert all(rates["jax"] > 0 and rates["torch"] > 0 for rates in report["gemm_gflops"].values())
    assert [(row["name"], row["peer"]) for row in report["workloads"]] == peers
    for row in report["workloads"]:
        assert set(row) == COLUMNS
        assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
        assert row["dot_flops"] >= row["dot_flops_minimum"] > 0
        assert row["temp_mb"] > 0 and row["compile_s"] > 0
        for side in ("ours", "peer"):
            unclean = abs(row[f"{side}_cpu_s"] - row[f"{side}_s"]) > 0.1 * row[f"{side}_s"]
            name = "ours" if side == "ours" else row["peer"]
            assert unclean == any(warning.startswith(f"{name}:") for warning in row["warnings"])


def test_layouts_of_a_product_are_one_product():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(8, 6)).astype(np.float32)
    for equation, left in decode_breakdown.EQUATIONS.values():
        own = weight if equation == "mk,kn->mn" else weight.T
        (made,) = decode_breakdown.multiply(x, [own], equation, left)
        np.testing.assert_allclose(np.asarray(made).T if left else made, x @ weight, rtol=1e-5)


@pytest.mark.slow
def test_generation_against_transformers_and_the_expert(tmp_path):
    name = "generate_with_confidence"
    report = run("generation.py", tmp_path / "out.json", "--workloads", name, "--compile", "--no-peaks")
    check_report(report, [(name, peer) for peer in ("transformers", "expert", "expert_compiled")])
    for row in report["workloads"]:
        assert set(row["checks"]["log_prob_difference"]) == {"ours", "transformers", "expert", "expert_compiled"}
        assert row["checks"]["greedy_tokens_equal"] > 1
        # 1.021 at the benchmark's shape; at toy shapes the unwritten slots of the answers' cache weigh more.
        assert row["dot_flops"] < 1.06 * row["dot_flops_minimum"]
        assert row["cache_copies"] >= 0 and row["ours_peak_mb"] is None


@pytest.mark.slow
def test_scoring_and_peak_memory(tmp_path):
    report = run("generation.py", tmp_path / "out.json", "--workloads", "score_k4")
    check_report(report, [("score_k4", "transformers"), ("score_k4", "expert")])
    for row in report["workloads"]:
        assert row["shapes"]["candidates"] == 2 and row["cache_copies"] is None
        assert row["ours_peak_mb"] is None or 50 < row["ours_peak_mb"] < 5_000


@pytest.mark.slow
def test_training_against_trl(tmp_path):
    names = ("dpo_step", "dpo_step_reference")
    options = ("--workloads", ",".join(names), "--no-peaks", "--remat", "dots", "--rank", "4")
    report = run("training.py", tmp_path / "out.json", *options)
    peers = ("trl", "trl_checkpointing", "trl_answer_head", "trl_answer_head_checkpointing")
    check_report(report, [(name, peer) for name in names for peer in peers])
    recorded, computed = (next(row for row in report["workloads"] if row["name"] == name) for name in names)
    assert recorded["dot_flops"] < computed["dot_flops"]
    assert recorded["shapes"]["lora_rank"] == 4 and recorded["shapes"]["remat"] == "dots"
    # Far from ln 2, or an adapter that does nothing would have passed.
    assert abs(recorded["checks"]["loss"] - np.log(2)) > 1e-3


@pytest.mark.slow
def test_accelerator_measures_every_side(tmp_path):
    """On the CPU, whose rates no data sheet here states: no share is made up."""
    report = run("accelerator.py", tmp_path / "out.json", "--rank", "4")
    assert report["platform"] == "cpu" and report["tiny"] and "jax" in report["versions"]
    sides = ("ours", "transformers, TRL")
    assert [(row["workload"], row["side"]) for row in report["rows"]] == [
        (name, side) for name in accelerator.WORKLOADS for side in sides
    ]
    for row in report["rows"]:
        assert "problem" not in row, row
        assert row["seconds"] > 0 and row["peak"] is None
    drawn, scored, stepped = (report["rows"][place] for place in (0, 2, 4))
    assert drawn["log_prob_difference"] < 1e-4 and drawn["bandwidth_share"] is None and drawn["prefill_mfu"] is None
    assert scored["answers_per_second"] > 0 and scored["mfu"] is None
    assert stepped["first_loss_difference"] < 1e-4 and stepped["mfu_4n"] is None
    assert stepped["shapes"]["prompts"] == drawn["shapes"]["prompts"] // 2
    assert accelerator.table(report).count("\n") == 4 + len(report["rows"])


def test_accelerator_shares_follow_from_seconds():
    """Of LLaVA-1.5-7B: 6.6 thousand million weights; the device's rates are read once a step or once a token."""
    from m3po_jax.models.llava.config import llava_config

    shapes = accelerator.LLAVA15_7B
    config = llava_config(checkpoint.peer_config(shapes).to_dict(), "test")
    weights = accelerator.decoder_parameters(config.text)
    assert weights == 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 4096 * 32_064
    step_run = accelerator.Run(shapes, "bfloat16", 1, "full", 128)
    facts = {"peak_flops": 1e15, "bandwidth": 1e12}
    drawn = accelerator.figures("generate", step_run, {"seconds": 3.0, "first_seconds": 1.0}, facts)
    assert drawn["tokens_per_second"] == 16 * 8 * 127 / 2
    cache = 2 * 32 * 4096  # numbers of a token's keys and values
    read = 127 * (weights + 16 * shapes.prefix * cache) + 16 * 8 * 127 * 64 * cache
    assert drawn["bandwidth_share"] == pytest.approx(2 * read / 2e12)
    stepped = accelerator.figures("dpo_step", step_run, {"seconds": 2.0}, facts)
    assert stepped["pairs_per_second"] == 8
    assert stepped["mfu_4n"] == pytest.approx(4 * weights * 16 * (shapes.prefix + 256) / 2e15)
    assert 0.9 < stepped["mfu"] / stepped["mfu_4n"] < 1.3
    unknown = accelerator.figures("score", step_run, {"seconds": 1.0}, {"peak_flops": None, "bandwidth": None})
    assert unknown == {"answers_per_second": 128.0, "mfu": None}


def test_accelerator_reports_what_failed(tmp_path, monkeypatch):
    """A side without memory loses no other side's row."""
    facts = {"device": "card", "platform": "gpu", "peak_flops": None, "bandwidth": None}

    def child(arguments, environment):
        side = arguments[arguments.index("--side") + 1]
        if side == "facts":
            return facts
        return {"problem": "out of memory"} if side.endswith("peer") else {"seconds": 2.0, "peak": 5e9}

    monkeypatch.setattr(accelerator, "_child", child)
    out = tmp_path / "out.json"
    accelerator.main(["--json", str(out), "--workloads", "score"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["side"] for row in rows] == ["ours", "ours, cudnn kernels", "transformers, TRL"]
    assert rows[1]["answers_per_second"] == 64 and rows[2]["problem"] == "out of memory"
    monkeypatch.setattr(
        accelerator, "_child", lambda arguments, _: facts if arguments[-1] == "facts" else {"problem": "no"}
    )
    with pytest.raises(SystemExit, match="nothing could be measured"):
        accelerator.main(["--json", str(out), "--workloads", "score"])


def test_unknown_workloads_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="speed unknown; choose from dpo_step"):
        run("training.py", tmp_path / "out.json", "--workloads", "speed")


def flops(function, *args, trips=()):
    return counting.dot_flops(jax.make_jaxpr(function)(*args), trips)


def test_dot_flops_multiply_loops_out_and_leave_out_what_is_unused():
    x, once = jnp.ones((8, 8)), 2 * 8**3
    assert flops(lambda a: a @ a, x) == once
    assert flops(jax.jit(lambda a: (a @ a, a @ a + 1)[0]), x) == once
    assert flops(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], x) == 5 * once
    assert flops(jax.grad(lambda a: jnp.sum(a @ a)), x) == 2 * once
    assert flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a), x) == 2 * once

    def twice(a):
        loop = lambda b: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ a, b)  # noqa: E731
        return loop(loop(a) + 1)

    assert flops(twice, x, trips=(3, 4)) == 7 * once
    for trips in ((3,), (3, 4, 5)):
        with pytest.raises(ValueError, match="while loop"):
            flops(twice, x, trips=trips)


LOOP = """HloModule m
%fused (p: f32[2,3]) -> f32[3,2] {
  %t = f32[3,2]{1,0} transpose(%p), dimensions={1,0}
}
%body (s: (f32[2,3])) -> (f32[2,3]) {
  %a = f32[2,3]{1,0} copy(%x)
  %b = f32[3,2]{0,1} transpose(%a), dimensions={1,0}
  %c = f32[4,4]{1,0} copy(%y)
  %d = f32[3,2]{1,0} fusion(%b), kind=kLoop, calls=%fused
}
%elsewhere (p: f32[2,3]) -> f32[2,3] {
  %e = f32[2,3]{1,0} copy(%p)
}
ENTRY %main (p: f32[2,3]) -> f32[2,3] {
  %f = f32[2,3]{1,0} copy(%p)
  %w = (f32[2,3]) while(%f), condition=%cond, body=%body
}
"""


def test_cache_copies_are_those_of_the_loop():
    assert counting.cache_copies(LOOP, [(2, 3)]) == 2
    assert counting.cache_copies(LOOP, [(4, 4)]) == 1
    assert counting.cache_copies(LOOP, [(5, 5)]) == 0


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    pytest.importorskip("transformers")
    shapes = checkpoint.TINY
    return shapes, checkpoint.load_peer(checkpoint.save_checkpoint(shapes, tmp_path_factory.mktemp("llava")))


def test_the_minimum_is_what_the_expert_spends(peer):
    """Counted by torch; its prefill multiplies the upper half of the causal square too, and the head K times."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shapes, model = peer
    ids, pixels = checkpoint.prompts(shapes)
    inputs = (torch.tensor(ids, dtype=torch.long), torch.tensor(checkpoint.channels_first(pixels)))
    expert = expert_torch.Expert(model, longest=shapes.prefix + shapes.new_tokens)
    given = torch.tensor(checkpoint.answers(shapes, shapes.candidates), dtype=torch.long)
    sizes = {"candidates": shapes.candidates, "new_tokens": shapes.new_tokens}

    def spent(call):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    from m3po_jax.models.llava.config import llava_config

    minimum = counting.generation_minimum(
        llava_config(model.config.to_dict(), "test"), prompts=shapes.prompts, prefix=shapes.prefix, **sizes
    )
    layers, width = shapes.text[:2]
    half = shapes.prompts * (layers - 1) * 4 * width * (shapes.prefix * (shapes.prefix - 1) // 2)
    assert spent(lambda: expert.generate(*inputs, **sizes)) == minimum + half
    fed = shapes.new_tokens - 1
    half += shapes.prompts * shapes.candidates * layers * 4 * width * (fed * (fed - 1) // 2)
    assert spent(lambda: expert.score(*inputs, given)) == minimum + half


def test_the_expert_draws_from_the_distribution():
    import torch

    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    tokens, log_probs = expert_torch.draw(logits.expand(20_000, -1), 4, False)
    share = torch.bincount(tokens, minlength=12) / 20_000
    wanted = logits.log_softmax(-1)[0]
    assert torch.allclose(share, wanted.exp(), atol=0.015)
    assert torch.allclose(log_probs, wanted[tokens], atol=1e-5)
    assert torch.equal(expert_torch.draw(logits, 4, True)[0], logits.argmax(-1))


def test_dpo_minimum_is_between_forward_and_all_products_of_a_full_backward(peer):
    from m3po_jax.models.llava.config import llava_config

    shapes, model = peer
    config = llava_config(model.config.to_dict(), "test")
    sizes = {"prefix": shapes.prefix, "new_tokens": shapes.new_tokens}
    step = lambda rank: counting.dpo_minimum(config, pairs=2, lora_rank=rank, **sizes)  # noqa: E731
    forward = counting.generation_minimum(config, prompts=2, candidates=2, **sizes)
    assert forward < step(0) < step(4) < step(8) < 3 * forward
    assert step(8) - step(4) == 2 * (step(4) - step(2))  # linear in the rank


def test_a_failing_workload_loses_no_other_rows(tmp_path, monkeypatch, capsys):
    rates = {"product": {"shape": [1, 2, 3], "jax": 2.0, "torch": 1.0}}
    monkeypatch.setattr(measuring, "gemm_gflops", lambda shapes: rates)
    times = {"ours": (1.0, 1.0), "peer": (3.0, 3.0)}
    compiled = {"dot_flops": 11, "dot_flops_minimum": 10, "temp_mb": 5.0, "cache_copies": None, "compile_s": 1.0}

    def work(name):
        if name == "bad":
            raise SystemExit("log-probs differ")
        return [measuring.row(name, "peer", {}, times, peaks={}, compiled=compiled, checks={})]

    options = argparse.Namespace(json=tmp_path / "out.json", tiny=True)
    with pytest.raises(SystemExit, match="bad: log-probs differ"):
        measuring.measure_all(options, ["one", "bad", "two"], work, {})
    report = json.loads(options.json.read_text())
    assert [row["name"] for row in report["workloads"]] == ["one", "two"]
    table.main([str(options.json)])
    assert "| `two` | `peer` | 3.00 | 1.000 | 3.000 |  /  | 1.100 | 5 |  |" in capsys.readouterr().out
