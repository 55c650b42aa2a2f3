"""M3PO: multimodal-model-guided preference optimization for large vision-language models, in JAX."""

from m3po_jax.version import __version__

__all__ = ["__version__"]
