"""Vision transformers of the CLIP and SigLIP kind (Dosovitskiy et al., arXiv:2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m3po_jax.models.attention import Bidirectional, dense_attention
from m3po_jax.models.encoder import Encoder, EncoderConfig, EncoderMLP
from m3po_jax.models.layers import LayerNorm, Linear


@dataclass(frozen=True)
class ViTConfig:
    """`kind` names the published variant: ``clip`` (class token, a norm before the layers, no patch bias) or
    ``siglip`` (no class token, a patch bias, attention pooling)."""

    kind: str
    encoder: EncoderConfig
    image_size: int
    patch_size: int

    @property
    def num_patches(self) -> int:
        """Of the square image; a class token is not one."""
        return (self.image_size // self.patch_size) ** 2


def patchify(images: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
    """Non-overlapping patches in raster order, each flattened as (row, column, channel).

    Rows and columns beyond the last whole patch are left out, as by the published convolutions (SigLIP-so400m: 384
    pixels in patches of 14).
    """
    b, h, w, c = images.shape
    images = images[:, : h // patch * patch, : w // patch * patch]
    x = images.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


class AttentionPool(nnx.Module):
    """SigLIP's pooling: a learned probe attends to all patches, then a residual MLP (arXiv:2303.15343)."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        d = config.hidden_size
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        probe = 0.02 * jax.random.normal(rngs.params(), (1, 1, d), jnp.float32)
        self.probe = nnx.Param(probe.astype(param_dtype), axes=(None, None, "norm"))
        self.q_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.k_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.v_proj = Linear(d, d, axes=("embed", "heads"), use_bias=True, **kinds)
        self.out_proj = Linear(d, d, axes=("heads", "embed"), use_bias=True, **kinds)
        self.layernorm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.mlp = EncoderMLP(config, **kinds)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """One vector an image."""
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)  # noqa: E731
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        everything = jnp.ones((x.shape[0], 1, x.shape[1]), bool)
        out = dense_attention(heads(self.q_proj(probe)), heads(self.k_proj(x)), heads(self.v_proj(x)), everything)
        out = self.out_proj(out.reshape(probe.shape))
        return (out + self.mlp(self.layernorm(out)))[:, 0]


class VisionTransformer(nnx.Module):
    """A tower: normalised images in, a state for each patch (and CLIP's class token) out."""

    def __init__(self, config: ViTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, pooled: bool = True):
        """`pooled=False` leaves out SigLIP's pooling head, for use as a tower only."""
        d, clip = config.encoder.hidden_size, config.kind == "clip"
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        norm = {"eps": config.encoder.layer_norm_eps, **kinds}
        self.config, self.dtype = config, dtype
        self.patch_embedding = Linear(
            config.patch_size**2 * 3, d, axes=("patch", "embed"), use_bias=not clip, rngs=rngs, **kinds
        )
        normal = lambda *shape: (0.02 * jax.random.normal(rngs.params(), shape)).astype(param_dtype)  # noqa: E731
        self.class_embedding = nnx.Param(normal(d), axes=("norm",)) if clip else None
        self.position_embedding = nnx.Param(normal(config.num_patches + clip, d), axes=("position", "norm"))
        self.pre_layernorm = LayerNorm(d, **norm) if clip else None
        self.encoder = Encoder(config.encoder, rngs=rngs, **kinds)
        self.post_layernorm = LayerNorm(d, **norm)
        self.head = None if clip or not pooled else AttentionPool(config.encoder, rngs=rngs, **kinds)

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Patch embeddings with positions (CLIP: the class token first, then normed): what layer 1 reads."""
        x = self.patch_embedding(patchify(images, self.config.patch_size))
        if self.class_embedding is not None:
            token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.position_embedding[...].astype(self.dtype)
        return x if self.pre_layernorm is None else self.pre_layernorm(x)

    def features(
        self, images: Float[Array, "b h w 3"], layers: tuple[int, ...], *, remat: str = "none"
    ) -> Float[Array, "b n d"]:
        """Hidden states after `layers`, concatenated along the width, class token included.

        Indices follow Hugging Face's `hidden_states`: 0 is the embedding, -1 the last layer's output, and no
        final norm is applied. Layers above the highest one asked for do not run.
        """
        total = self.config.encoder.num_layers
        wanted = [layer if layer >= 0 else total + 1 + layer for layer in layers]
        x = self.embed(images)
        everything = Bidirectional(jnp.ones(x.shape[:2], bool), self.config.encoder.attention)
        last, states = self.encoder(x, everything, num_layers=max(wanted), remat=remat)
        if len(wanted) == 1:
            return last if wanted[0] else x
        return jnp.concatenate([states[i - 1] if i else x for i in wanted], axis=-1)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, remat: str = "none"
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
        """All tokens after the last layer (SigLIP: normed) and the pooled vector."""
        x = self.embed(images)
        everything = Bidirectional(jnp.ones(x.shape[:2], bool), self.config.encoder.attention)
        x, _ = self.encoder(x, everything, remat=remat)
        if self.config.kind == "clip":
            return x, self.post_layernorm(x[:, 0])
        x = self.post_layernorm(x)
        return x, self.head(x) if self.head is not None else x.mean(axis=1)
