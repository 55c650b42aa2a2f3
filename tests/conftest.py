"""What every test needs before jax is imported: the CPU, one thread an operation, quick compilation, steady examples.

A worker of pytest-xdist runs on each core, so an operation that spreads over all of them would only make the
workers wait for each other. Tests of meshes start processes of their own with simulated devices.

Most of the tests' time is XLA's and LLVM's, on programs that run once on tiny shapes. They are compiled without
LLVM's optimisations and by XLA's plainer emitters, in a fifth of the time; the passes over whole programs are
those that users get. `test_shipped_compiler.py` repeats the comparisons with other implementations as users compile
them: `M3PO_TEST_COMPILER=shipped` does so for any test.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

flags = ["--xla_cpu_multi_thread_eigen=false"]
if os.environ.get("M3PO_TEST_COMPILER") != "shipped":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Both workers and the processes that the tests start compile the same programs; kept out of the user's own cache.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))

import shape_checks  # noqa: E402

shape_checks.install()  # before anything of the package is imported

import pytest  # noqa: E402
from compile_log import noted_compilations  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same examples in every run: a test that passed here passes elsewhere.
settings.register_profile(
    "m3po", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("m3po")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker that begins one when the other has done all would be waited for."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the functions that were compiled since the test began."""
    with noted_compilations() as names:
        yield names
