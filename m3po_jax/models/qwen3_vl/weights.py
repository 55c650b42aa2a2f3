"""Qwen3-VL's stored tensors: ``model.visual.…``, ``model.language_model.…`` in every version of transformers."""

from __future__ import annotations

from m3po_jax.models import tensor_names
from m3po_jax.models.qwen2_5_vl.weights import tower
from m3po_jax.models.qwen3_vl.config import Qwen3VLConfig
from m3po_jax.models.tensor_map import Path, Source

_LINEARS = ("linear_fc1", "linear_fc2")


def canonical_name(name: str) -> str | None:
    """The stored name itself; None for buffers that hold nothing."""
    return None if name.endswith(".inv_freq") else name


def tensor_map(config: Qwen3VLConfig) -> dict[Path, Source]:
    """The stored tensor of every parameter."""
    tensors = tensor_names.decoder(config.text, ("decoder",), "model.language_model", "lm_head")
    prefix, part = "model.visual", ("vision_tower",)
    tensors |= tower(config.vision, prefix, _LINEARS)
    tensors[(*part, "patch_embed", "proj", "bias")] = Source(f"{prefix}.patch_embed.proj.bias")
    tensors[(*part, "pos_embed", "table")] = Source(f"{prefix}.pos_embed.weight")
    for norm in ("norm1", "norm2"):
        tensors[(*part, "blocks", norm, "bias")] = Source(f"{prefix}.blocks.{{}}.{norm}.bias")
    mergers: dict[Path, str] = {("projector",): f"{prefix}.merger"}
    if config.vision.deep_layers:
        mergers[*part, "deep_mergers"] = f"{prefix}.deepstack_merger_list.{{}}"
    for path, name in mergers.items():
        tensors |= tensor_names.layer_norm((*path, "norm"), f"{name}.norm")
        for linear in _LINEARS:
            tensors |= tensor_names.linear((*path, linear), f"{name}.{linear}", bias=True)
    return tensors
