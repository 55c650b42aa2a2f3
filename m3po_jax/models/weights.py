"""Streaming a model's parameters from stored tensors into their shards, layer by layer; random initialisation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import sharding_for, state_shardings
from m3po_jax.models.quantization import Quantized, kind_of
from m3po_jax.models.quantized_base import load_quantized
from m3po_jax.models.safetensors_io import StoredTensor
from m3po_jax.models.tensor_map import Parameter, TensorMap, check_tensors, parameters

_write_layer = jax.jit(lambda buffer, x, i: jax.lax.dynamic_update_index_in_dim(buffer, x, i, 0), donate_argnums=0)


def _load_leaf(leaf: Parameter, tensors: Mapping[str, StoredTensor], sharding: Sharding) -> jax.Array:
    """One parameter, layer by layer into each device's shard; the host holds one layer's slice at a time."""
    groups: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        groups.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in groups.items():
        index = tuple(slice(*pair) for pair in bounds)
        shape = tuple(stop - start for start, stop in bounds)
        if leaf.source.name is None:
            whole = np.full(shape, leaf.source.value, leaf.dtype)
            shards += [jax.device_put(whole, device) for device in devices]
        elif leaf.layers is None:
            whole = leaf.source.read(tensors[leaf.source.name], index, leaf.shape).astype(leaf.dtype)
            shards += [jax.device_put(np.ascontiguousarray(whole), device) for device in devices]
        else:
            buffers = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
            for i in range(*bounds[0]):
                part = leaf.source.read(tensors[leaf.source.layer(i)], index[1:], leaf.layer_shape)
                part = np.ascontiguousarray(part.astype(leaf.dtype))
                # Each write is one device's own; a mesh in context would claim it for all its devices.
                with jax.set_mesh(None):
                    buffers = [
                        _write_layer(buffer, jax.device_put(part, device), i - bounds[0][0])
                        for buffer, device in zip(buffers, devices, strict=True)
                    ]
                jax.block_until_ready(buffers)  # or pending transfers would pile up on the host
            shards += buffers
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def load_parameters(
    abstract: nnx.Module, tensor_map: TensorMap, tensors: Mapping[str, StoredTensor], mesh: Mesh | None
) -> nnx.Module:
    """A model from stored tensors (canonical names, checked by `check_tensors`), sharded by `RULES`."""
    leaves = parameters(abstract, tensor_map)
    graph, state = nnx.split(abstract)
    loaded, codes = [], {}
    for path, variable in nnx.to_flat_state(state):
        *owner, name = (str(part) for part in path)
        leaf = leaves[(*owner, "kernel" if name == "kernel_scale" else name)]
        if isinstance(variable, Quantized):
            if leaf.path not in codes:  # the codes come first, their scales next
                codes[leaf.path] = load_quantized(leaf, kind_of(variable), tensors, mesh)
            loaded.append((path, variable.replace(codes[leaf.path][name == "kernel_scale"])))
            continue
        sharding = (
            SingleDeviceSharding(jax.devices()[0]) if mesh is None else sharding_for(leaf.axes, leaf.shape, mesh)
        )
        loaded.append((path, variable.replace(_load_leaf(leaf, tensors, sharding))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def replace_parameters(
    model: nnx.Module,
    tensor_map: TensorMap,
    tensors: Mapping[str, StoredTensor],
    mesh: Mesh | None,
    where: str,
) -> None:
    """Overwrites, in place, the parameters that `tensors` (canonical names) hold, and no others.

    Raises:
        UserError: a tensor has another shape than the model's, or belongs to a parameter that is not complete.
    """
    stored = {
        path: leaf
        for path, leaf in parameters(model, tensor_map).items()
        if any(name in tensors for name in leaf.stored())
    }
    check_tensors(stored, tensors, where)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf = stored.get(tuple(str(part) for part in path))
        if leaf is not None:
            sharding = (
                SingleDeviceSharding(jax.devices()[0]) if mesh is None else sharding_for(leaf.axes, leaf.shape, mesh)
            )
            variable[...] = _load_leaf(leaf, tensors, sharding)


def check_memory(abstract: nnx.Module, mesh: Mesh | None, where: str) -> None:
    """Refuses to draw a model of which one device's share does not fit into a device's memory.

    Raises:
        UserError: says how much it would take.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    needed = 0
    for _, variable in nnx.to_flat_state(nnx.state(abstract)):
        shape = tuple(variable.shape)
        if mesh is not None:
            shape = sharding_for(variable.get_metadata()["axes"], shape, mesh).shard_shape(shape)
        needed += math.prod(shape) * jnp.dtype(variable.dtype).itemsize
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > limit:
        raise UserError(
            f"the model's weights take {needed / 2**30:,.0f} GiB a device, which has {limit / 2**30:,.0f}",
            where=where,
            remedy="check the sizes, take a smaller model or more devices (mesh.fsdp)",
        )


def initialise_parameters(build: Callable[[], nnx.Module], mesh: Mesh | None) -> nnx.Module:
    """A randomly initialised model, each device computing its own shards."""
    abstract = nnx.eval_shape(build)
    graph, state = nnx.split(abstract)
    if mesh is None:
        return nnx.merge(graph, jax.jit(lambda: nnx.state(build()))())
    return nnx.merge(graph, jax.jit(lambda: nnx.state(build()), out_shardings=state_shardings(state, mesh))())
