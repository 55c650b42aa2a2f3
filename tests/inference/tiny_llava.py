"""A LLaVA small enough to compile in seconds, with grouped queries and weights large enough to disagree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_inputs import shown

from m3po_jax.config import LoRAConfig, MeshConfig
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.padding import pad_prompts
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.encoder import EncoderConfig
from m3po_jax.models.forward import branch_log_probs, encode_images, reference_forward
from m3po_jax.models.layers import Linear
from m3po_jax.models.llava.config import LlavaConfig
from m3po_jax.models.llava.model import build
from m3po_jax.models.vit import ViTConfig

IMAGE, PAD, EOS, VOCAB = 120, 121, 2, 128


def tiny_config(kv_heads=2, **text):
    return LlavaConfig(
        text=DecoderConfig(VOCAB, 32, 64, num_layers=2, num_heads=4, num_kv_heads=kv_heads, head_dim=8, **text),
        vision=ViTConfig("clip", EncoderConfig(16, 32, num_layers=2, num_heads=2), image_size=12, patch_size=4),
        image_token_id=IMAGE,
    )


def tiny_model(kv_heads=2, adapters=False, scale=1.0, **text):
    """Weights are `scale` × the usual initialisation, so that attention and logits are far from uniform.

    `text` changes the decoder's configuration; its biases are random.
    """
    model = build(tiny_config(kv_heads, **text), dtype=jnp.float32, param_dtype=jnp.float32, seed=3)
    if adapters:
        lora.attach(model, LoRAConfig(lora_rank=3, lora_alpha=6.0), scope="decoder", rngs=nnx.Rngs(7))
        for index, linear in enumerate(lora.adapters(model).values()):
            b = linear.lora_b[...]
            linear.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(index), b.shape)
    for path, linear in nnx.iter_modules(model):
        if isinstance(linear, Linear):
            linear.kernel[...] = linear.kernel[...] * scale
            if path[0] == "decoder" and linear.bias is not None:
                linear.bias[...] = jax.random.normal(jax.random.key(len(str(path))), linear.bias.shape)
    return model


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def prompts(lengths=(3, 9, 6), images=1, seed=0):
    """Prompts of BOS, the image's 9 tokens and `length` words."""
    rng = np.random.default_rng(seed)
    rows = [[1] + [IMAGE] * (9 * images) + rng.integers(3, 100, n).tolist() for n in lengths]
    token_ids, mask = pad_prompts(rows, PAD)
    pixels = rng.normal(size=(len(rows), images, 12, 12, 3)).astype(np.float32) if images else None
    return PromptBatch([f"prompt-{n}-{i}" for i, n in enumerate(lengths)], token_ids, mask, shown(pixels, 9))


def take(batch, rows):
    images = jax.tree.map(lambda x: x[rows], batch.images)
    return PromptBatch([batch.ids[r] for r in rows], batch.token_ids[rows], batch.mask[rows], images)


def images_of(batch, place):
    """The images of one row of a batch."""
    return take(batch, [place]).images


def make_generator(model, mesh=None, batch_size=3, tokenizer_size=None, **sampling):
    sampling = {"num_candidates": 3, "max_new_tokens": 12, **sampling}
    return Generator(
        model,
        eos_token_id=EOS,
        pad_token_id=PAD,
        mesh=mesh or one_device(),
        sampling=SamplingConfig(**sampling),
        batch_size=batch_size,
        tokenizer_size=tokenizer_size,
    )


@partial(jax.jit, static_argnums=0)
def score(graph, state, prompt, images, answers):
    model = nnx.merge(graph, state)
    return branch_log_probs(model, *prompt, encode_images(model, images), *answers)


def teacher_forced(model, batch, out):
    """Log-probabilities of all answers [B, K, T] in one pass over given tokens; 0 after an answer's end."""
    mask = np.arange(out.token_ids.shape[-1]) < out.lengths[..., None]
    prompt, answers = (batch.token_ids, batch.mask), (out.token_ids, mask)
    return np.asarray(score(*nnx.split(model), prompt, batch.images, answers))


@partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens, count, images):
    """Logits after the first `count` of the padded tokens [1, 32]: a full causal pass without a cache."""
    model = nnx.merge(graph, state)
    mask = jnp.arange(tokens.shape[1])[None] < count
    return reference_forward(model, tokens, mask, encode_images(model, images))[0, count - 1]


def next_logits(model, tokens, images):
    """Logits [V] of the token after `tokens`, float64, with −inf where nothing is ever drawn."""
    padded = np.pad(np.int32([tokens]), ((0, 0), (0, 32 - len(tokens))))
    logits = np.float64(forward(*nnx.split(model), padded, len(tokens), images))
    logits[[IMAGE, PAD]] = -np.inf
    return logits
