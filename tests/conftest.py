"""What every test needs before jax is imported: the CPU, one thread an operation, and steady examples.

A worker of pytest-xdist runs on each core, so an operation that spreads over all of them would only make the
workers wait for each other. Tests of meshes start processes of their own with simulated devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that the tests start compile the same programs again and again; kept out of the user's own cache.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))

import jax
import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run: a test that passed here passes elsewhere.
settings.register_profile(
    "m3po", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("m3po")


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the functions that jax compiles, or finds in its cache on disk, while the test runs."""
    names: list[str] = []

    def note(event: str, seconds: float, **facts: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)
