"""Device mesh, and the one table of logical axes.

Model code names the *logical* axes of its parameters and activations; `RULES` maps them to the mesh axes
``data`` (replicas), ``fsdp`` (weights split by rows and gathered when used) and ``tensor`` (heads, MLP width and
vocabulary). A recipe chooses its parallelism by the sizes in `MeshConfig` alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m3po_jax.config import MeshConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. `None`: never split.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "lora": None,
    "norm": None,
    "position": None,
    "patch": None,
}

Axes = tuple[str | None, ...]


def check_mesh(config: MeshConfig) -> None:
    """UserError for sizes that make no mesh of any number of devices."""
    check_values(config, "mesh")
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise UserError(f"sizes {sizes} are not a mesh", where="mesh", remedy="at most one of them may be -1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    check_mesh(config)
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        fixed = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // fixed, 1)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"data × fsdp × tensor = {' × '.join(map(str, sizes))} does not make the {len(devices)} devices here",
            where="mesh",
            remedy="set mesh.data=-1 to take what the other two leave",
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(axes: Axes, shape: Sequence[int], mesh: Any) -> P:
    """The partition of an array with logical `axes`; a dimension that does not divide stays whole."""
    assert len(axes) == len(shape), (axes, shape)
    spec: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[name] if name is not None else None
        split = math.prod(mesh.shape[axis] for axis in mesh_axes) if mesh_axes else 1
        spec.append(mesh_axes if split > 1 and size % split == 0 else None)
    return P(*spec)


def sharding_for(axes: Axes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec_for` on a mesh: where an array with these logical axes lies."""
    return NamedSharding(mesh, spec_for(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes under the current mesh (`use_mesh`); a no-op without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that `constrain` and the kernels see while the block runs."""
    with jax.set_mesh(mesh):
        yield mesh


def state_shardings(state: nnx.State, mesh: Mesh) -> Any:
    """Shardings for every `nnx.Variable` of `state`, from the `axes` that its parameters carry."""

    def of(variable: nnx.Variable) -> Any:
        axes = variable.get_metadata().get("axes") or (None,) * len(variable.shape)
        return variable.replace(sharding_for(axes, variable.shape, mesh))

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def is_attached(mesh: Mesh) -> bool:
    """Whether the mesh's devices are there. For those of a topology programs are only compiled (`plan.py`)."""
    return mesh.devices.flat[0] in jax.devices()


def describe(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree` on their shardings, without memory: what programs are compiled for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _on_devices(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array on its devices; for devices that are not attached a description of it."""
    if not is_attached(sharding.mesh):  # type: ignore[arg-type]
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding)  # type: ignore[return-value]
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays, identical on every process, to device arrays split along their first axis.

    A first axis that does not divide over the mesh is replicated. Every process passes the whole (global)
    batch and keeps only the rows of its own devices.
    """

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        axes: Axes = ("batch",) + (None,) * (x.ndim - 1) if x.ndim else ()
        return _on_devices(x, sharding_for(axes, x.shape, mesh))

    return jax.tree.map(put, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole on every device."""

    def put(x: Any) -> jax.Array:
        return _on_devices(np.asarray(x), NamedSharding(mesh, P()))

    return jax.tree.map(put, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on this host, whatever its sharding."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
