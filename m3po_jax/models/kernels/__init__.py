"""Attention kernels beside the XLA path, chosen by `model.attention`.

`ATTENTION` names what a recipe may ask for. ``xla`` is the plain path of `models/attention.py` and
`generation/decoder.py` and the default; ``pallas`` are kernels for TPUs and ``cudnn`` is cuDNN's fused attention
for GPUs. ``pallas_interpret`` runs the TPU kernels on any machine, slowly: it is for tests, not for recipes.
"""

from m3po_jax.models.kernels.choice import ATTENTION, check_attention, self_attention, with_attention
from m3po_jax.models.kernels.grouped_decode import prefix_attention
from m3po_jax.models.kernels.partial import Partial, masked_attention, merge

__all__ = [
    "ATTENTION",
    "Partial",
    "check_attention",
    "masked_attention",
    "merge",
    "prefix_attention",
    "self_attention",
    "with_attention",
]
