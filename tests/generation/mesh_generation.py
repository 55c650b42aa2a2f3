"""Run by test_generation_mesh.py in a process with eight simulated devices: one device against two meshes."""

import jax
import numpy as np
from flax import nnx
from tiny_llava import make_generator, one_device, prompts, take, tiny_model

from m3po_jax.config import MeshConfig
from m3po_jax.scoring.engine import Scorer
from m3po_jax.sharding import make_mesh, state_shardings


def on_mesh(model, mesh):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state, state_shardings(state, mesh)))


def main():
    assert jax.device_count() == 8
    model = tiny_model(adapters=True)
    batch = take(prompts((3, 9, 6, 1, 4, 2)), [5, 4, 3, 2, 1, 0])
    expected = make_generator(model, batch_size=6)(batch)
    mask = np.arange(12) < expected.lengths[..., None]
    scores = Scorer(model, one_device(), batch_size=6).log_probs(batch, expected.token_ids, mask)
    np.testing.assert_allclose(scores, expected.log_probs, atol=1e-4)
    pool = {
        "temperature": (0.0, 1.0, 1.5),
        "repetition_penalty": 1.3,
        "min_p": 0.02,
        "repetition_penalty_prompt": True,
    }
    pooled = make_generator(model, batch_size=6, **pool)(batch)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        placed = on_mesh(model, mesh)
        out = make_generator(placed, mesh, batch_size=6)(batch)
        np.testing.assert_array_equal(out.token_ids, expected.token_ids)
        np.testing.assert_allclose(out.log_probs, expected.log_probs, atol=1e-5)
        out = make_generator(placed, mesh, batch_size=6, **pool)(batch)
        np.testing.assert_array_equal(out.token_ids, pooled.token_ids)
        again = Scorer(placed, mesh, batch_size=6).log_probs(batch, expected.token_ids, mask)
        np.testing.assert_allclose(again, scores, atol=1e-5)
        print("equal on", sizes)


main()
