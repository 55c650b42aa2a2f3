"""A text decoder's stored tensors, by the names of `LlamaForCausalLM` in every transformers version."""

from __future__ import annotations

from m3po_jax.models import tensor_names
from m3po_jax.models.causal_lm.model import CausalLMConfig
from m3po_jax.models.tensor_map import Path, Source


def canonical_name(name: str) -> str | None:
    """The stored name itself; None: a buffer of older versions, which nothing needs."""
    return None if name.endswith(".rotary_emb.inv_freq") else name


def tensor_map(config: CausalLMConfig) -> dict[Path, Source]:
    """The stored tensor of every parameter."""
    return tensor_names.decoder(config.text, ("decoder",), "model", "lm_head")
