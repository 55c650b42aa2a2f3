"""A LLaVA small enough to compile in seconds, with grouped queries and weights large enough to disagree."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m3po_jax.config import LoRAConfig, MeshConfig
from m3po_jax.generation.engine import Generator, PromptBatch, SamplingConfig, right_pad
from m3po_jax.models import lora
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.layers import Linear
from m3po_jax.models.llama import LlamaConfig
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import build
from m3po_jax.models.vit import ViTConfig
from m3po_jax.sharding import make_mesh

IMAGE, PAD, EOS, VOCAB = 120, 121, 2, 128


def tiny_config(kv_heads=2):
    return LlavaConfig(
        text=LlamaConfig(VOCAB, 32, 64, num_layers=2, num_heads=4, num_kv_heads=kv_heads, head_dim=8),
        vision=ViTConfig("clip", EncoderConfig(16, 32, num_layers=2, num_heads=2), image_size=12, patch_size=4),
        image_token_id=IMAGE,
    )


def tiny_model(kv_heads=2, adapters=False, scale=1.0):
    """Weights are `scale` × the usual initialisation, so that attention and logits are far from uniform."""
    model = build(tiny_config(kv_heads), dtype=jnp.float32, param_dtype=jnp.float32, seed=3)
    if adapters:
        lora.attach(model, LoRAConfig(lora_rank=3, lora_alpha=6.0), scope="decoder", rngs=nnx.Rngs(7))
        for index, linear in enumerate(lora.adapters(model).values()):
            b = linear.lora_b[...]
            linear.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(index), b.shape)
    for _, linear in nnx.iter_modules(model):
        if isinstance(linear, Linear):
            linear.kernel[...] = linear.kernel[...] * scale
    return model


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def prompts(lengths=(3, 9, 6), images=1, seed=0):
    """Prompts of BOS, the image's 9 tokens and `length` words."""
    rng = np.random.default_rng(seed)
    rows = [[1] + [IMAGE] * (9 * images) + rng.integers(3, 100, n).tolist() for n in lengths]
    token_ids, mask = right_pad(rows, PAD)
    pixels = rng.normal(size=(len(rows), images, 12, 12, 3)).astype(np.float32) if images else None
    return PromptBatch([f"prompt-{n}-{i}" for i, n in enumerate(lengths)], token_ids, mask, pixels)


def take(batch, rows):
    pixels = None if batch.pixel_values is None else batch.pixel_values[rows]
    return PromptBatch([batch.ids[r] for r in rows], batch.token_ids[rows], batch.mask[rows], pixels)


def make_generator(model, mesh=None, batch_size=3, **sampling):
    sampling = {"num_candidates": 3, "max_new_tokens": 12, **sampling}
    return Generator(
        model,
        eos_token_id=EOS,
        pad_token_id=PAD,
        mesh=mesh or one_device(),
        sampling=SamplingConfig(**sampling),
        batch_size=batch_size,
    )
