"""Run by test_kernels.py with eight simulated devices: the kernels under a mesh equal those without one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from m3po_jax.config import MeshConfig
from m3po_jax.hosts.sharding import make_mesh, sharding_for, use_mesh
from m3po_jax.models.kernels.choice import decode_kernel, self_attention
from m3po_jax.models.kernels.fused_gpu import fused_attention

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731


def on_mesh(mesh, run, *args, head_axis):
    """`run` with its arguments split over rows and, where they divide, heads; nothing is gathered on the way."""
    if mesh is None:
        return run(*args)
    axes = [tuple({0: "batch", head_axis: "kv_heads"}.get(i) for i in range(x.ndim)) for x in args]
    args = [jax.device_put(x, sharding_for(a, x.shape, mesh)) for a, x in zip(axes, args, strict=True)]
    with use_mesh(mesh):
        compiled = jax.jit(run).lower(*args).compile()
        # Three key/value heads do not divide over two devices: then the queries' heads are gathered too.
        assert groups % mesh.shape["tensor"] or "all-gather" not in compiled.as_text()
        return compiled(*args)


# Four key/value heads split over `tensor` with their queries; three stay whole, and so do their queries.
for groups in (4, 3):
    tokens = 20
    q, k, v = draw(4, tokens, 2 * groups, 8), draw(4, tokens, groups, 8), draw(4, tokens, groups, 8)
    mask = jnp.asarray(np.arange(tokens) < np.array([[20], [13], [1], [8]]))
    decode = (
        draw(4, groups, 6, 8),
        draw(4, groups, 140, 8),
        draw(4, groups, 140, 8),
    )

    def gradients(attend, q, k, v, mask=mask):
        loss = lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)) * mask[:, :, None, None])  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    kernels = {
        "splash": partial(self_attention, mask=mask, causal=True, kind="pallas_interpret"),
        "fused": partial(fused_attention, mask=mask, causal=True, implementation="xla"),
    }
    meshes = [None, make_mesh(MeshConfig(2, 2, 2)), make_mesh(MeshConfig(1, 8, 1))]  # four rows do not divide over 8
    for name, kernel in kernels.items():
        results = [on_mesh(mesh, partial(gradients, kernel), q, k, v, head_axis=2) for mesh in meshes]
        for other in results[1:]:
            jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5, err_msg=name), other, results[0])
    attend = partial(decode_kernel("pallas_interpret"), length=jnp.array([140, 13, 0, 80]))
    results = [on_mesh(mesh, attend, *decode, head_axis=1) for mesh in meshes]
    for other in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), other, results[0])
