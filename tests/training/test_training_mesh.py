"""A stage on 8 simulated devices equals the same stage on one, also when it changes its mesh twice on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_meshes_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{root}:{root / 'tests'}",
    }
    worker = Path(__file__).with_name("mesh_worker.py")
    finished = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    one = results["one"]
    for name in ("data", "mixed"):
        for leaf, values in one["leaves"].items():
            np.testing.assert_allclose(
                results[name]["leaves"][leaf], values, rtol=0, atol=1e-5, err_msg=f"{name} {leaf}"
            )
        assert len(results[name]["metrics"]) == len(one["metrics"]) == 5
        for line, expected in zip(results[name]["metrics"], one["metrics"], strict=True):
            actual, wanted = json.loads(line), json.loads(expected)
            assert actual.keys() == wanted.keys()
            if wanted["step"] == 1:  # policy = reference: rounding decides which of two equal rewards is higher
                del actual["rewards/accuracies"], wanted["rewards/accuracies"]
            np.testing.assert_allclose(list(actual.values()), list(wanted.values()), rtol=1e-3, atol=1e-5)
    # Frozen and trained weights are split over fsdp (and tensor), not copied.
    assert results["shards"] == {"kernel": 0.25, "lora_a": 0.5}
