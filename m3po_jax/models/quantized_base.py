"""The frozen base of a model in few bits: which layers, and how they are filled from stored tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from m3po_jax.hosts.sharding import Axes, sharding_for
from m3po_jax.models.layers import Linear
from m3po_jax.models.quantization import BLOCK, Codes, Quantized, applies, quantize
from m3po_jax.models.safetensors_io import StoredTensor
from m3po_jax.models.tensor_map import Parameter

LAYERS = "layers"


def _stacked(model: nnx.Module, scope: str) -> Iterator[Linear]:
    """The linear layers under `scope` that are scanned: nearly all weights, and neither embeddings nor the head."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and path and path[0] == scope:
            axes = module.kernel.get_metadata()["axes"]
            if axes[0] == LAYERS:
                yield module


def scale_axes(axes: Axes, kind: str) -> Axes:
    """Logical axes of a stacked kernel's scales, from the kernel's."""
    return (axes[0], *axes[2:]) if kind == "int8" else axes


def quantize_base(model: nnx.Module, kind: str, *, scope: str) -> None:
    """Replaces the stacked kernels under `scope` by codes and scales, in place; works on abstract models too."""
    for linear in _stacked(model, scope):
        if not applies(kind, linear.in_features):
            continue
        axes = linear.kernel.get_metadata()["axes"]
        codes, scale = jax.vmap(functools.partial(quantize, kind=kind))(linear.kernel[...])
        linear.kernel = Quantized(codes, axes=axes)
        linear.kernel_scale = Quantized(scale, axes=scale_axes(axes, kind))


def is_quantized(model: nnx.Module) -> bool:
    """Whether any kernel is codes."""
    return bool(jax.tree.leaves(nnx.state(model, Quantized)))


@functools.partial(jax.jit, static_argnames=("kind", "rows"), donate_argnums=0)
def _write(
    buffers: Codes, kernel: jax.Array, layer: jax.Array, start: tuple[jax.Array, jax.Array], *, kind: str, rows: Any
) -> Codes:
    """One layer's codes and scales, of which this device keeps `rows` from `start` on, put into its buffers."""
    written = []
    for buffer, whole, first, count in zip(buffers, quantize(kernel, kind), start, rows, strict=True):
        part = whole if count is None else jax.lax.dynamic_slice_in_dim(whole, first, count)
        written.append(jax.lax.dynamic_update_index_in_dim(buffer, part, layer, 0))
    return Codes(*written)


def load_quantized(leaf: Parameter, kind: str, tensors: Mapping[str, StoredTensor], mesh: Mesh | None) -> Codes:
    """One stacked kernel, quantised layer by layer on the devices that keep it.

    A scale is the greatest of many inputs, so a device quantises all inputs of its outputs and keeps its share; the
    host holds one layer's kernel at a time.
    """
    layers, fan_in, fan_out = leaf.shape
    shapes = {
        "int8": ((layers, fan_in, fan_out), (layers, fan_out)),
        "nf4": ((layers, fan_in // 2, fan_out), (layers, fan_in // BLOCK, fan_out)),
    }[kind]
    axes = (leaf.axes, scale_axes(leaf.axes, kind))
    one = SingleDeviceSharding(jax.devices()[0])
    shardings = [one if mesh is None else sharding_for(a, s, mesh) for a, s in zip(axes, shapes, strict=True)]
    types = (jnp.int8 if kind == "int8" else jnp.uint8, jnp.float32)
    places = [s.addressable_devices_indices_map(shape) for s, shape in zip(shardings, shapes, strict=True)]
    buffers, plans = {}, {}
    for device in places[0]:
        bounds = [
            [x.indices(n)[:2] for x, n in zip(place[device] or (), shape, strict=True)]
            for place, shape in zip(places, shapes, strict=True)
        ]
        local = [tuple(stop - start for start, stop in b) for b in bounds]
        buffers[device] = Codes(*(jnp.zeros(s, t, device=device) for s, t in zip(local, types, strict=True)))
        starts = tuple(np.int32(b[1][0]) if len(b) == 3 else np.int32(0) for b in bounds)
        rows = tuple(b[1][1] - b[1][0] if len(b) == 3 else None for b in bounds)
        plans[device] = (bounds[0][-1], starts, rows)
    for i in range(layers):
        parts: dict[tuple[int, ...], np.ndarray] = {}
        for device, (outputs, starts, rows) in plans.items():
            if outputs not in parts:
                index = (slice(0, fan_in), slice(*outputs))
                part = leaf.source.read(tensors[leaf.source.layer(i)], index, leaf.layer_shape)
                parts[outputs] = np.ascontiguousarray(part)
            with jax.set_mesh(None):  # as in `weights`: each write is one device's own
                kernel = jax.device_put(parts[outputs], device)
                buffers[device] = _write(buffers[device], kernel, np.int32(i), starts, kind=kind, rows=rows)
        jax.block_until_ready(list(buffers.values()))
    return Codes(
        *(
            jax.make_array_from_single_device_arrays(shape, sharding, [b[n] for b in buffers.values()])
            for n, (shape, sharding) in enumerate(zip(shapes, shardings, strict=True))
        )
    )
