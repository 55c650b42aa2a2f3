import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_eight_devices_equal_one():
    """Token ids exactly and log-probabilities to 1e-5, data parallel and split three ways; the same
    answers and lanes as busy where prompts are dealt to several hosts."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, here.parents[1]])),
    }
    done = subprocess.run(
        [sys.executable, str(here / "mesh_generation.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal on") == 4
