"""LLaVA-1.5's configuration, read from a Hugging Face ``config.json`` of any transformers version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.layers import ACTIVATIONS
from m3po_jax.models.llama import LlamaConfig
from m3po_jax.models.vit import ViTConfig


@dataclass(frozen=True)
class LlavaConfig:
    """A tower, a projector and a decoder; layer indices as of `vit.VisionTransformer.features`."""

    text: LlamaConfig
    vision: ViTConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...] = (-2,)
    keep_class_token: bool = False  # vision_feature_select_strategy: full (True) or default (False)
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that a prompt holds for each image."""
        return self.vision.num_patches + (1 if self.keep_class_token else 0)

    @property
    def feature_width(self) -> int:
        """Width of the features that the projector reads."""
        return self.vision.encoder.hidden_size * len(self.vision_feature_layers)


def _unsupported(what: str, where: str) -> UserError:
    return UserError(f"{what} is not supported", where=where, remedy="LLaVA-1.5 and its LLaMA sizes are")


def llama_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """A LLaMA `text_config` (or a bare LLaMA ``config.json``); absent keys take LLaMA's published defaults."""
    hidden, heads = int(raw.get("hidden_size", 4096)), int(raw.get("num_attention_heads", 32))
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise _unsupported(f"rope_type {kind!r}", where)
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise _unsupported("a bias in the decoder's linear layers", where)
    activation = raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise _unsupported(f"activation {activation!r}", where)
    return LlamaConfig(
        vocab_size=int(raw.get("vocab_size", 32000)),
        hidden_size=hidden,
        intermediate_size=int(raw.get("intermediate_size", 11008)),
        num_layers=int(raw.get("num_hidden_layers", 32)),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=activation,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=int(raw.get("max_position_embeddings", 2048)),
    )


def vit_config(raw: dict[str, Any], kind: str, where: str) -> ViTConfig:
    """A CLIP or SigLIP `vision_config`; absent keys take the published defaults of that model."""
    defaults = {
        "clip": {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        "siglip": {
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
    }[kind]
    activation = raw.get("hidden_act", defaults["hidden_act"])
    if activation not in ACTIVATIONS:
        raise _unsupported(f"activation {activation!r}", where)
    return ViTConfig(
        kind=kind,
        encoder=EncoderConfig(
            hidden_size=int(raw.get("hidden_size", 768)),
            intermediate_size=int(raw.get("intermediate_size", 3072)),
            num_layers=int(raw.get("num_hidden_layers", 12)),
            num_heads=int(raw.get("num_attention_heads", 12)),
            activation=activation,
            layer_norm_eps=float(raw.get("layer_norm_eps", defaults["layer_norm_eps"])),
        ),
        image_size=int(raw.get("image_size", defaults["image_size"])),
        patch_size=int(raw.get("patch_size", defaults["patch_size"])),
    )


def llava_config(raw: dict[str, Any], where: str) -> LlavaConfig:
    """LLaVA-1.5 from ``config.json``.

    Raises:
        UserError: a decoder, tower or option that this family does not cover.
    """
    text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
    if text.get("model_type", "llama") != "llama":
        raise _unsupported(f"decoder {text['model_type']!r}", where)
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise _unsupported(f"vision tower {vision['model_type']!r}", where)
    # An older file may state the vision tower's CLIP-L/336 by its size alone; LLaVA's own default is that tower.
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    tower |= {"image_size": 336, "patch_size": 14}
    layer = raw.get("vision_feature_layer", -2)
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise _unsupported(f"vision_feature_select_strategy {strategy!r}", where)
    llama = llama_config(text, where)
    if "tie_word_embeddings" in raw and "tie_word_embeddings" not in text and raw["tie_word_embeddings"]:
        llama = LlamaConfig(**{**llama.__dict__, "tie_word_embeddings": True})
    return LlavaConfig(
        text=llama,
        vision=vit_config({**tower, **vision}, "clip", where),
        image_token_id=int(raw.get("image_token_index", raw.get("image_token_id", 32000))),
        vision_feature_layers=tuple(layer) if isinstance(layer, list) else (int(layer),),
        keep_class_token=strategy == "full",
        projector_activation=raw.get("projector_hidden_act", "gelu"),
        projector_bias=bool(raw.get("multimodal_projector_bias", True)),
    )
