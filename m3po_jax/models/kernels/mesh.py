"""Kernels under a mesh: each device runs the kernel on its own rows and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from m3po_jax.hosts.sharding import Axes, spec_for


def head_axis(kv_heads: int) -> str | None:
    """The logical axis of query and key heads alike: split over ``tensor`` only where both stay grouped.

    Query heads that divide while their fewer key/value heads do not would meet the wrong ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or kv_heads % mesh.shape["tensor"]
    return None if whole else "kv_heads"


def per_device(
    kernel: Callable[..., Any], args: Sequence[jax.Array], axes: Sequence[Axes], out: Sequence[tuple[Axes, Any]]
) -> Any:
    """`kernel(*args)`, mapped over the current mesh by the logical `axes` of its arguments.

    XLA cannot see inside a kernel, so it cannot split one by itself: without this it would gather every operand.

    Args:
        out: (axes, shape) of every result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(*args)
    in_specs = tuple(spec_for(a, x.shape, mesh) for a, x in zip(axes, args, strict=True))
    out_specs = tuple(spec_for(a, shape, mesh) for a, shape in out)
    return jax.shard_map(
        kernel, in_specs=in_specs, out_specs=out_specs if len(out) > 1 else out_specs[0], check_vma=False
    )(*args)
