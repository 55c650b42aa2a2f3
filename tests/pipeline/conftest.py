"""For tests of whole runs, which compile hundreds of tiny programs that run a few times each."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs without LLVM's optimisations, here and in processes that the tests start: both give the same bits.

    Compiling is most of these tests' time, and takes 60 % of it this way. Programs from before are dropped: one that
    was compiled otherwise may round otherwise.
    """
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
