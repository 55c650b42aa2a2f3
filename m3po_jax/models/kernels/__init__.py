"""Attention kernels beside the XLA path, chosen by `model.attention`.

``xla`` is the plain path of `models/attention.py` and `inference/` and the default; ``pallas`` are kernels for
TPUs and ``cudnn`` is cuDNN's fused attention for GPUs. ``pallas_interpret`` runs the TPU kernels on any machine,
slowly: it is for tests, not for recipes. `choice.py` dispatches.
"""
