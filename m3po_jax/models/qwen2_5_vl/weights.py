"""Qwen2.5-VL's stored tensors. The canonical layout is the published one (``visual.…``, ``model.…``), which every
version of transformers writes; read too: that of modules since 4.52 (``model.visual.…``, ``model.language_model.…``).
"""

from __future__ import annotations

from m3po_jax.models import tensor_names
from m3po_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TowerConfig
from m3po_jax.models.tensor_map import Path, Source

_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def canonical_name(name: str) -> str | None:
    """The published name of a tensor of any layout; None for buffers that hold nothing."""
    if name.endswith(".inv_freq"):
        return None
    for prefix, published in _PREFIXES:
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def tower(config: TowerConfig, prefix: str, mlp: tuple[str, ...]) -> dict[Path, Source]:
    """Patch embedding and layers of a tower named under `prefix`, without biases of norms and of the embedding.

    Args:
        mlp: The linear layers of its MLPs.
    """
    size = (config.hidden_size, 3, config.frames, config.patch_size, config.patch_size)
    tensors = {
        ("vision_tower", "patch_embed", "proj", "kernel"): Source(f"{prefix}.patch_embed.proj.weight", "flat", shape=size)
    }
    blocks, layer = ("vision_tower", "blocks"), f"{prefix}.blocks.{{}}"
    for norm in ("norm1", "norm2"):
        tensors[(*blocks, norm, "scale")] = Source(f"{layer}.{norm}.weight")
    for part, names in (("attn", ("qkv", "proj")), ("mlp", mlp)):
        for name in names:
            tensors |= tensor_names.linear((*blocks, part, name), f"{layer}.{part}.{name}", bias=True)
    return tensors


def tensor_map(config: Qwen25VLConfig) -> dict[Path, Source]:
    """The canonical stored tensor of every parameter."""
    tensors = tensor_names.decoder(config.text, ("decoder",), "model", "lm_head")
    tensors |= tower(config.vision, "visual", ("gate_proj", "up_proj", "down_proj"))
    tensors[("projector", "ln_q", "scale")] = Source("visual.merger.ln_q.weight")
    for ours, theirs in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
        tensors |= tensor_names.linear(("projector", ours), f"visual.merger.{theirs}", bias=True)
    return tensors
