"""Run by test_gemma3.py with eight simulated devices: Gemma 3 with images on one device and on two meshes."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_gemma3 import RANK, Pair, inputs

from m3po_jax.config import MeshConfig
from m3po_jax.hosts.sharding import make_mesh, shard_batch, use_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.forward import branch_log_probs, encode_images
from m3po_jax.models.layers import LoRAParam
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import load_model

assert jax.device_count() == 8
folder = sys.argv[1]
processor = Processor.from_pretrained(folder, "chat", "pad", pan_and_scan=True)
batch = inputs(Pair(None, None, processor), (0, 1, 2, 3, 2, 1, 0, 3))  # type: ignore[arg-type]
batch.ids = [f"{name}-{place}" for place, name in enumerate(batch.ids)]
answers = np.random.default_rng(0).integers(10, 340, (8, 2, 5)).astype(np.int32)


@nnx.jit
def gradients(model: Any, ids: Any, mask: Any, images: Any, branches: Any) -> Any:
    def loss(model: Any) -> Any:
        encoded = encode_images(model, images)
        log_probs = branch_log_probs(model, ids, mask, encoded, branches, jnp.ones(branches.shape, bool))
        return jnp.sum(log_probs * jnp.array([1.0, -1.0])[None, :, None])

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam))(model)


results = []
for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model = load_model(folder, dtype="float32", param_dtype="float32", mesh=mesh).model
    generator = Generator(
        model,
        eos_token_id=processor.eos_token_ids,
        pad_token_id=processor.pad_token_id,
        mesh=mesh,
        sampling=SamplingConfig(max_new_tokens=6, num_candidates=2, seed=3),
        batch_size=8,
        tokenizer_size=processor.text.size,
    )
    drawn = generator(batch)
    lora.attach(model, RANK, scope="decoder", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for linear in lora.adapters(model).values():
        linear.lora_b[...] = jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32)
    with use_mesh(mesh):
        given = shard_batch((batch.token_ids, batch.mask, batch.images, answers), mesh)
        value, slopes = gradients(model, *given)
    results.append((drawn, value, jax.tree.leaves(slopes)))
    if len(results) > 1:
        (first, value_of_one, slopes_of_one), (other, value, slopes) = results[0], results[-1]
        np.testing.assert_array_equal(other.token_ids, first.token_ids)
        np.testing.assert_allclose(other.log_probs, first.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(value, value_of_one, rtol=1e-5)
        for x, y in zip(slopes, slopes_of_one, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(float(np.abs(y).max()), 1.0))
        assert max(float(np.abs(y).max()) for y in slopes_of_one) > 1e-2
        print("equal on", sizes)
