"""Comparisons with other implementations once more, compiled as users get it; see `conftest.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHIPPED = (
    "models/test_llava_parity.py",
    "models/test_dual_encoder_parity.py",
    "inference/test_against_transformers.py",
    "training/test_training_losses.py::test_whole_step_equals_torch",
)


@pytest.mark.slow
def test_parity_holds_as_users_compile_it() -> None:
    quick = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in quick}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *(str(TESTS / name) for name in SHIPPED),
        ],
        env=environment | {"M3PO_TEST_COMPILER": "shipped"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
