"""Run by test_quantization.py with eight simulated devices: codes streamed into shards, and what they compute."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m3po_jax.config import MeshConfig
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.models.forward import reference_forward
from m3po_jax.models.quantization import Quantized
from m3po_jax.models.registry import load_model

assert jax.device_count() == 8
ids = np.random.default_rng(0).integers(1, 50, (8, 6)).astype(np.int32)


@jax.jit
def logits(state):
    return reference_forward(nnx.merge(graph, state), jnp.asarray(ids), np.ones(ids.shape, bool), None)


def codes_of(model):
    return dict(nnx.to_flat_state(nnx.state(model, Quantized)))


for kind in ("int8", "nf4"):
    kinds = {"dtype": "float32", "param_dtype": "float32", "quantization": kind}
    one = load_model(sys.argv[1], **kinds).model
    graph, state = nnx.split(one)
    expected = logits(state)
    for sizes in {"int8": [(1, 2, 4)], "nf4": [(2, 4, 1)]}[kind]:
        mesh = make_mesh(MeshConfig(*sizes))
        model = load_model(sys.argv[1], mesh=mesh, **kinds).model
        for path, variable in codes_of(model).items():
            np.testing.assert_array_equal(variable[...], codes_of(one)[path][...], err_msg=str(path))
        up = model.decoder.layers.mlp.up_proj.kernel[...]
        # Codes lie as the kernel would: inputs over fsdp, outputs over tensor.
        assert up.addressable_shards[0].data.size * sizes[1] * sizes[2] == up.size
        if kind == "nf4":
            drawn = codes_of(load_model(sys.argv[1], mesh=mesh, init="random", **kinds).model)
            assert all(drawn[path][...].sharding == v[...].sharding for path, v in codes_of(model).items())
        graph, state = nnx.split(model)
        with use_mesh(mesh):
            np.testing.assert_allclose(logits(state), expected, atol=1e-4)
        print("equal on", sizes)
