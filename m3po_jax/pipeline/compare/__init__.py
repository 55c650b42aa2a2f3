"""`m3po compare`: systems × seeds from one recipe, and one table of them with intervals."""

from m3po_jax.pipeline.compare.execute import compare

__all__ = ["compare"]
