"""What a step took: seconds, throughput, MFU, memory. In a file of its own, since times never repeat."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from m3po_jax.data.model_images import FEATURES, TOKENS
from m3po_jax.training.flops import StepCost, peak_flops


def batch_tokens(batch: Any) -> int:
    """Tokens of a batch that are not padding: prompts once, and every answer."""
    return sum(int(np.sum(mask)) for mask in batch.masks)


def batch_flops(cost: StepCost | None, batch: Any, *, reference: bool) -> float | None:
    """Analytic FLOPs of a step on `batch`; None where the model's cost is unknown."""
    if cost is None:
        return None
    images = batch.images or {}
    return cost.flops(
        np.sum(batch.prefix_mask, axis=-1),
        np.sum(batch.branch_mask, axis=-1),
        image_tokens=int(np.sum(images.get(TOKENS, 0))),
        cached_images=FEATURES in images,
        reference=reference,
    )


def memory_peak(mesh: Mesh) -> float | None:
    """The most bytes in use so far on this process's fullest device; None where the backend does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
    measured = [peak for peak in peaks if peak is not None]
    return float(max(measured)) if measured else None


class StepTimer:
    """Seconds between calls of `lap`, and what follows from them."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.peak = mesh, peak_flops(list(mesh.devices.flat))
        self.started = time.perf_counter()

    def lap(self, *, rows: int, tokens: int, flops: float | None, compiled: bool) -> dict[str, Any]:
        """Numbers of the step that ended now.

        Args:
            compiled: A program was compiled in it: its time is no step time.
        """
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        measured = flops is not None and self.peak is not None
        return {
            "step_time": seconds,
            "compiled": float(compiled),
            "tokens_per_second": tokens / seconds,
            "rows_per_second": rows / seconds,
            "flops": flops,
            "mfu": flops / seconds / self.peak if measured and flops is not None and self.peak else None,
            "peak_memory_bytes": memory_peak(self.mesh),
        }
