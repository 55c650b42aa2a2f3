"""The TPU's own compiler accepts the kernels and the programs around them; no TPU is attached.

Skipped where libtpu (the `plan` extra) is absent.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def compiled(topology, *programs):
    worker = Path(__file__).with_name("tpu_programs.py")
    # A compilation cache of CPU programs would only be in the way.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, str(worker), topology, *programs], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_the_kernels_compile_for_every_generation(topology):
    """bfloat16 and float32, heads of 128 and 64, grouped queries, K = 1, 8 and 16, ragged prefixes; sharded."""
    programs = compiled(topology, "kernels")
    assert len(programs) == 4 + 12
    for program in programs:
        forward_only = program["program"] != "self_attention"
        assert program["kernels"] == (1 if forward_only else 3)  # forward; dq; dk and dv
        assert program["all_gathers"] == 0  # each device works on its own rows and heads
        if program["program"] == "prefix_attention_128":
            assert program["temp_mb"] < 0.1 * program["argument_mb"]  # the cache is read in place


@pytest.mark.slow
def test_a_preference_step_compiles_without_score_matrices():
    """LLaVA-1.5-7B's widths over eight chips: no [prompt, prompt] array is left in the program."""
    (step,) = compiled("v5e:2x4", "step_pallas")
    # Forward, forward again under rematerialisation, dq, dk and dv; and the vision tower's forward.
    assert step["kernels"] == 5 and step["scores"] == 0
    assert step["temp_mb"] + step["argument_mb"] < 16e3


def test_decoding_moves_neither_cache_nor_weights():
    """LLaVA-1.5-7B's widths, weights over eight chips: the loop over tokens works on its arguments in place."""
    _, decode = compiled("v5e:2x4", "generation")
    assert decode["program"] == "decode" and decode["argument_mb"] > 400
    assert decode["temp_mb"] < 0.05 * decode["argument_mb"]  # 0.65 with copies of the cache, qkv and gate-up
