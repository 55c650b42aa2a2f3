"""Hugging Face's names for the parts that several families share, in transformers 4.x's layout."""

from __future__ import annotations

from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.tensor_map import Path, Source
from m3po_jax.models.vit import ViTConfig


def linear(path: Path, name: str, *, bias: bool) -> dict[Path, Source]:
    """A linear layer's kernel and, with `bias`, its bias."""
    tensors = {(*path, "kernel"): Source(f"{name}.weight", "linear")}
    if bias:
        tensors[(*path, "bias")] = Source(f"{name}.bias")
    return tensors


def layer_norm(path: Path, name: str) -> dict[Path, Source]:
    """A norm's gain and bias."""
    return {(*path, "scale"): Source(f"{name}.weight"), (*path, "bias"): Source(f"{name}.bias")}


def decoder(config: DecoderConfig, path: Path, model: str, head: str) -> dict[Path, Source]:
    """A decoder whose layers are named under `model` and whose output layer is `head`."""
    layers = (*path, "layers")
    copies = (f"{head}.weight",) if config.tie_word_embeddings else ()
    tensors = {
        (*path, "embed_tokens", "table"): Source(f"{model}.embed_tokens.weight", pad_rows=True, copies=copies),
        (*path, "norm", "scale"): Source(f"{model}.norm.weight"),
        (*layers, "input_norm", "scale"): Source(f"{model}.layers.{{}}.input_layernorm.weight"),
    }
    # Where results are normalised too, what stands after attention in LLaMA stands before the MLP.
    norms = {"post_attention_norm": "post_attention_layernorm"}
    if config.norms_of_results:
        norms = {
            **{
                "attention_result_norm": "post_attention_layernorm",
                "post_attention_norm": "pre_feedforward_layernorm",
            },
            "mlp_result_norm": "post_feedforward_layernorm",
        }
    for norm, theirs in norms.items():
        tensors[(*layers, norm, "scale")] = Source(f"{model}.layers.{{}}.{theirs}.weight")
    for ours, theirs, names in (
        ("attention", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            tensors |= linear(
                (*layers, ours, name), f"{model}.layers.{{}}.{theirs}.{name}", bias=name in config.biases
            )
    for norm in ("q_norm", "k_norm") if config.norms_of_heads else ():
        tensors[(*layers, "attention", norm, "scale")] = Source(f"{model}.layers.{{}}.self_attn.{norm}.weight")
    if not config.tie_word_embeddings:
        tensors[(*path, "lm_head", "kernel")] = Source(f"{head}.weight", "linear", pad_rows=True)
    return tensors


def encoder(path: Path, prefix: str) -> dict[Path, Source]:
    """The stacked layers of a CLIP or SigLIP tower."""
    layers, name = (*path, "layers"), f"{prefix}.layers.{{}}"
    tensors: dict[Path, Source] = {}
    for norm in ("layer_norm1", "layer_norm2"):
        tensors |= layer_norm((*layers, norm), f"{name}.{norm}")
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        tensors |= linear((*layers, "self_attn", projection), f"{name}.self_attn.{projection}", bias=True)
    for projection in ("fc1", "fc2"):
        tensors |= linear((*layers, "mlp", projection), f"{name}.mlp.{projection}", bias=True)
    return tensors


def vision_transformer(config: ViTConfig, path: Path, prefix: str, *, pooled: bool) -> dict[Path, Source]:
    """A CLIP or SigLIP vision tower named under `prefix`; `pooled` as given to `VisionTransformer`."""
    clip = config.kind == "clip"
    tensors: dict[Path, Source] = {
        (*path, "patch_embedding", "kernel"): Source(f"{prefix}.embeddings.patch_embedding.weight", "conv"),
        (*path, "position_embedding"): Source(f"{prefix}.embeddings.position_embedding.weight"),
        **encoder((*path, "encoder"), f"{prefix}.encoder"),
        **layer_norm((*path, "post_layernorm"), f"{prefix}.post_layernorm"),
    }
    if clip:
        tensors[(*path, "class_embedding")] = Source(f"{prefix}.embeddings.class_embedding")
        tensors |= layer_norm((*path, "pre_layernorm"), f"{prefix}.pre_layrnorm")  # the published spelling
        return tensors
    tensors[(*path, "patch_embedding", "bias")] = Source(f"{prefix}.embeddings.patch_embedding.bias")
    if pooled:
        head, name = (*path, "head"), f"{prefix}.head"
        tensors[(*head, "probe")] = Source(f"{name}.probe")
        for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):  # torch's MultiheadAttention fuses them
            tensors[(*head, projection, "kernel")] = Source(f"{name}.attention.in_proj_weight", "linear", part=(i, 3))
            tensors[(*head, projection, "bias")] = Source(f"{name}.attention.in_proj_bias", part=(i, 3))
        tensors |= linear((*head, "out_proj"), f"{name}.attention.out_proj", bias=True)
        tensors |= layer_norm((*head, "layernorm"), f"{name}.layernorm")
        for projection in ("fc1", "fc2"):
            tensors |= linear((*head, "mlp", projection), f"{name}.mlp.{projection}", bias=True)
    return tensors
