"""Models and adapters in Hugging Face's and PEFT's formats, written atomically, a tensor in memory at a time."""

from m3po_jax.models.export.adapter import export_adapter
from m3po_jax.models.export.directory import EXPORT_DTYPES
from m3po_jax.models.export.model import export_model
from m3po_jax.models.export.read_adapter import load_adapter
from m3po_jax.models.export.serving import vllm_hint

__all__ = ["EXPORT_DTYPES", "export_adapter", "export_model", "load_adapter", "vllm_hint"]
