"""Image-text dual encoders: CLIP (Radford et al., arXiv:2103.00020) and SigLIP (Zhai et al., arXiv:2303.15343).

They judge how well a text fits an image (the `similarity` alignment score) and their vision towers are what
LLaVA-shaped models see with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.errors import UserError, nearest
from m3po_jax.models.attention import Bidirectional, Causal
from m3po_jax.models.config_fields import WIDEST, Fields, section, text, whole
from m3po_jax.models.encoder import Encoder, EncoderConfig
from m3po_jax.models.encoder_config import (
    CLIP_TEXT_DEFAULTS,
    CLIP_TEXT_FIELDS,
    CLIP_VISION_FIELDS,
    SIGLIP_TEXT_DEFAULTS,
    SIGLIP_TEXT_FIELDS,
    SIGLIP_VISION_FIELDS,
    encoder_config,
    vit_config,
    with_older_section,
)
from m3po_jax.models.layers import Embedding, LayerNorm, Linear
from m3po_jax.models.vit import VisionTransformer, ViTConfig

POOLINGS = ("pooled", "patches")


@dataclass(frozen=True)
class TextConfig:
    """A text tower; `max_positions` is its window in tokens, `eos_token_id` where CLIP pools (SigLIP: -1)."""

    encoder: EncoderConfig
    vocab_size: int
    max_positions: int
    eos_token_id: int


@dataclass(frozen=True)
class DualEncoderConfig:
    """`kind`: ``clip`` or ``siglip``; `projection_size` is the width of the common space.

    `pooling`: ``pooled`` compares a text with the image's one pooled vector, as the published models do;
    ``patches`` with every patch, joined by log-sum-exp (late interaction, after FILIP, arXiv:2111.07783), which
    small models learn from far fewer images.
    """

    kind: str
    vision: ViTConfig
    text: TextConfig
    projection_size: int
    pooling: str = "pooled"


class TextTransformer(nnx.Module):
    """CLIP's or SigLIP's text tower, one vector a text."""

    def __init__(self, config: DualEncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        text, kinds = config.text, {"dtype": dtype, "param_dtype": param_dtype}
        width = text.encoder.hidden_size
        self.kind, self.eos_token_id = config.kind, text.eos_token_id
        self.token_embedding = Embedding(text.vocab_size, width, axes=("vocab", "embed"), rngs=rngs, **kinds)
        self.position_embedding = Embedding(text.max_positions, width, axes=("position", "norm"), rngs=rngs, **kinds)
        self.encoder = Encoder(text.encoder, rngs=rngs, **kinds)
        self.final_layer_norm = LayerNorm(width, eps=text.encoder.layer_norm_eps, **kinds)
        # SigLIP projects inside the text tower, with a bias; CLIP outside it, without.
        self.head = (
            Linear(width, config.projection_size, axes=("embed", None), use_bias=True, rngs=rngs, **kinds)
            if config.kind == "siglip"
            else None
        )

    def __call__(self, token_ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b d"]:
        """Texts padded on the right to at most `max_positions` tokens; not normalised."""
        x = self.token_embedding(token_ids) + self.position_embedding(jnp.arange(token_ids.shape[1]))
        if self.kind == "siglip":
            # SigLIP was trained on texts padded to the full length, padding attended to, pooled at the last slot.
            x, _ = self.encoder(x, Bidirectional(jnp.ones_like(mask)))
            return self.head(self.final_layer_norm(x)[:, -1])
        x, _ = self.encoder(x, Causal(mask))
        # Checkpoints from before transformers 4.31 state eos_token_id 2 whatever it is; their EOS is the highest id.
        is_end = token_ids if self.eos_token_id == 2 else (token_ids == self.eos_token_id)
        end = jnp.argmax(is_end.astype(jnp.int32), axis=1)
        return jnp.take_along_axis(self.final_layer_norm(x), end[:, None, None], axis=1)[:, 0]


def normalize(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Vectors of length 1, float32; 0 stays 0."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class DualEncoder(nnx.Module):
    """Both towers; similarity is ``exp(logit_scale) · cos(image, text) + logit_bias``."""

    def __init__(self, config: DualEncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        clip = config.kind == "clip"
        self.config = config
        self.vision_tower = VisionTransformer(config.vision, rngs=rngs, **kinds)
        self.text_tower = TextTransformer(config, rngs=rngs, **kinds)
        project = lambda width: Linear(  # noqa: E731
            width, config.projection_size, axes=("embed", None), rngs=rngs, **kinds
        )
        self.visual_projection = project(config.vision.encoder.hidden_size) if clip else None
        self.text_projection = project(config.text.encoder.hidden_size) if clip else None
        # CLIP starts at 1/0.07 with no bias; SigLIP's paper starts at 10 and −10.
        if config.pooling == "patches":
            # Log-sum-exp over n unrelated patches adds log n; together every pair starts at about σ(−4).
            bias, scale = -4.0 - float(np.log(config.vision.num_patches)), 2.3026
        else:
            bias, scale = (0.0, 2.6592) if clip else (-10.0, 2.3026)
        self.logit_scale = nnx.Param(jnp.asarray([scale], jnp.float32), axes=(None,))
        self.logit_bias = nnx.Param(jnp.asarray([bias], jnp.float32), axes=(None,))

    def encode_image(self, pixel_values: Float[Array, "b h w 3"], *, remat: str = "none") -> Float[Array, "b n e"]:
        """Unit vectors, float32: one an image (n = 1), or one a patch with ``pooling: patches``."""
        tokens, pooled = self.vision_tower(pixel_values, remat=remat)
        if self.config.pooling == "pooled":
            features = pooled[:, None]
        elif self.config.kind == "clip":
            features = self.vision_tower.post_layernorm(tokens[:, 1:])
        else:
            features = tokens
        return normalize(features if self.visual_projection is None else self.visual_projection(features))

    def encode_text(self, token_ids: Int[Array, "c t"], mask: Bool[Array, "c t"]) -> Float[Array, "c e"]:
        """Unit vectors, float32. SigLIP wants texts padded to `text.max_positions`."""
        pooled = self.text_tower(token_ids, mask)
        return normalize(pooled if self.text_projection is None else self.text_projection(pooled))

    def logits(self, images: Float[Array, "b n e"], texts: Float[Array, "c e"]) -> Float[Array, "b c"]:
        """``logsumexp_n(exp(logit_scale) · cos) + logit_bias``; for n = 1 the published similarity."""
        cosine = jnp.einsum("bne,ce->bnc", images, texts, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.logsumexp(jnp.exp(self.logit_scale[...]) * cosine, axis=1) + self.logit_bias[...]


CLIP_FIELDS = Fields(
    config_class="CLIPConfig",
    read={
        "text_config": section,
        "vision_config": section,
        "projection_dim": whole(1, WIDEST),
        "m3po_pooling": text,
    },
    # The scale is stored with the weights.
    harmless=frozenset({"logit_scale_init_value", "initializer_factor"}),
)
SIGLIP_FIELDS = Fields(
    config_class="SiglipConfig",
    read={"text_config": section, "vision_config": section, "m3po_pooling": text},
    harmless=frozenset({"initializer_factor"}),
)


def dual_encoder_sections(raw: Mapping[str, Any]) -> dict[str, Fields]:
    """The fields of a CLIP or SigLIP ``config.json``, see `check_fields`."""
    if raw.get("model_type") == "siglip":
        return {"": SIGLIP_FIELDS, "text_config": SIGLIP_TEXT_FIELDS, "vision_config": SIGLIP_VISION_FIELDS}
    return {"": CLIP_FIELDS, "text_config": CLIP_TEXT_FIELDS, "vision_config": CLIP_VISION_FIELDS}


def normalized(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """``config.json`` with the sections of transformers' first versions merged in; see `with_older_section`."""
    for name, fields in dual_encoder_sections(raw).items():
        raw = with_older_section(raw, name, fields) if name else raw
    return raw


def dual_encoder_config(raw: dict[str, Any], where: str) -> DualEncoderConfig:
    """CLIP or SigLIP from ``config.json``, its values checked by `check_fields`.

    Absent keys take the published defaults.

    Raises:
        UserError: another model type, or sizes that contradict each other.
    """
    kind = raw.get("model_type")
    if kind not in ("clip", "siglip"):
        raise UserError(
            f"model_type {kind!r} is not a dual encoder", where=where, remedy="use a CLIP or SigLIP model"
        )
    pooling = raw.get("m3po_pooling") or "pooled"
    if pooling not in POOLINGS:
        raise UserError(
            f"m3po_pooling {pooling!r} is unknown{nearest(str(pooling), POOLINGS)}",
            where=where,
            remedy=f"one of {', '.join(POOLINGS)}",
        )
    clip = kind == "clip"
    tower = {**(CLIP_TEXT_DEFAULTS if clip else SIGLIP_TEXT_DEFAULTS), **(raw.get("text_config") or {})}
    encoder = encoder_config(tower, {}, where)
    return DualEncoderConfig(
        kind=kind,
        vision=vit_config(raw.get("vision_config") or {}, kind, where),
        text=TextConfig(
            encoder=encoder,
            vocab_size=tower["vocab_size"],
            max_positions=tower["max_position_embeddings"],
            eos_token_id=tower["eos_token_id"] if clip else -1,
        ),
        projection_size=raw.get("projection_dim", 512) if clip else tower["projection_size"] or encoder.hidden_size,
        pooling=pooling,
    )


def build(config: DualEncoderConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> DualEncoder:
    """A randomly initialised model; see `llava.model.build`."""
    return DualEncoder(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
