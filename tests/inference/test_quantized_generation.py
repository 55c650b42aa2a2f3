"""Generation from a quantised base: the codes stay codes, and the record stays exact."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llava import make_generator, prompts, teacher_forced, tiny_config

from m3po_jax.config import LoRAConfig
from m3po_jax.models import lora
from m3po_jax.models.llava.model import build
from m3po_jax.models.quantized_base import quantize_base


def quantized(kind):
    """Grouped queries, adapters, biases, and inputs of whole blocks of 64."""
    config = tiny_config()
    config = replace(config, text=replace(config.text, hidden_size=64, head_dim=16, biases=("v_proj", "gate_proj")))
    model = build(config, dtype=jnp.float32, param_dtype=jnp.float32, seed=3)
    quantize_base(model, kind, scope="decoder")
    lora.attach(model, LoRAConfig(lora_rank=3, lora_alpha=6.0), scope="decoder", rngs=nnx.Rngs(7))
    for linear in (model.decoder.layers.attention.v_proj, model.decoder.layers.mlp.gate_proj):
        linear.bias[...] = jax.random.normal(jax.random.key(9), linear.bias.shape)
    for index, linear in enumerate(lora.adapters(model).values()):
        linear.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(index), linear.lora_b.shape)
    return model


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_recorded_log_probs_equal_teacher_forcing(kind):
    model, batch = quantized(kind), prompts()
    generator = make_generator(model, temperature=1.5, top_p=0.9)
    out = generator(batch)
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)
    assert out.log_probs.min() < -1.0
    # The decoder's own arrangement of the weights holds no kernel in full.
    for layer in generator.weights.layers:
        for weight in (layer.qkv_kernel, layer.out_kernel, layer.gate_up_kernel, layer.down_kernel):
            assert weight.codes.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
