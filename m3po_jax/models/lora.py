"""Low-rank adapters (Hu et al., arXiv:2106.09685) on any linear layer, stacked ones included.

Adapters are parameters of their own type, `LoRAParam`, attached beside frozen kernels: they scan and shard with
their layer, `nnx.split(model, LoRAParam, ...)` separates them, and the reference model is the same weights with
`set_scale(model, 0.0)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError
from m3po_jax.models.layers import Linear, LoRAParam


def _linears(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], Linear]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield tuple(str(part) for part in path), module


def target_name(path: tuple[str, ...], scope: str) -> str:
    """How `target_modules` names the layer at `path`."""
    return path[-1] if path[0] == scope else f"{path[0]}.{path[-1]}"


MAX_RANK = 2**16


def check(config: LoRAConfig) -> None:
    """
    Raises:
        UserError: an adapter of no possible size; names the key.
    """
    if not 0 <= config.lora_rank <= MAX_RANK:
        raise UserError(
            f"{config.lora_rank} is not from 0 (full fine-tuning) to {MAX_RANK}", where="train.lora.lora_rank"
        )
    if not math.isfinite(config.lora_alpha) or config.lora_alpha <= 0:
        raise UserError(f"{config.lora_alpha} is not a positive number", where="train.lora.lora_alpha")
    if config.lora_rank and not config.target_modules:
        raise UserError("no layer is named", where="train.lora.target_modules", remedy="name some, e.g. [q_proj]")


def attach(model: nnx.Module, config: LoRAConfig, *, scope: str, rngs: nnx.Rngs) -> list[str]:
    """Adds factors A ~ N(0, 1/in) and B = 0 to the linear layers named in `config.target_modules` under `scope`.

    A layer is a target when the last part of its path is in the list, e.g. ``q_proj``. `scope` is the first part
    of the path (``decoder``), so that a vision tower's layers of the same name stay untouched; layers elsewhere are
    named with their part, ``vision_tower.q_proj`` or ``projector.linear_1``. Works on abstract models under
    `nnx.eval_shape` too.

    Returns:
        The paths of the adapted layers, dotted.

    Raises:
        UserError: a target matches no layer (nothing would be trained there).
    """
    check(config)
    adapted, missing = [], set(config.target_modules)
    for path, linear in _linears(model):
        name = target_name(path, scope)
        if name not in config.target_modules:
            continue
        *layers, _, fan_out = linear.kernel.shape
        fan_in = linear.in_features
        *prefix, in_axis, out_axis = linear.kernel.get_metadata()["axes"]
        a = jax.random.normal(rngs.params(), (*layers, fan_in, config.lora_rank), jnp.float32) * fan_in**-0.5
        b = jnp.zeros((*layers, config.lora_rank, fan_out), jnp.float32)
        linear.lora_a = LoRAParam(a, axes=(*prefix, in_axis, "lora"))
        linear.lora_b = LoRAParam(b, axes=(*prefix, "lora", out_axis))
        linear.lora_scale = config.lora_alpha / config.lora_rank
        adapted.append(".".join(path))
        missing.discard(name)
    if missing:
        linears = sorted({target_name(path, scope) for path, _ in _linears(model)})
        raise UserError(
            f"no layer is named {', '.join(sorted(missing))}",
            where="train.lora.target_modules",
            remedy=f"the linear layers here are {', '.join(linears)}",
        )
    return adapted


def set_scale(model: nnx.Module, scale: float) -> None:
    """Sets α/r of every adapter; 0 turns the model into its own reference, at no cost."""
    for _, linear in _linears(model):
        linear.lora_scale = scale


def merge(model: nnx.Module) -> None:
    """Folds every adapter into its kernel, W + (α/r) A B computed in float32, and removes the factors.

    Raises:
        UserError: a kernel is quantised; the sum has no place among its codes.
    """
    for path, linear in _linears(model):
        if linear.lora_a is None:
            continue
        if linear.kernel_scale is not None:
            raise UserError(
                f"{'.'.join(path)} is quantised, and an adapter cannot be merged into it",
                where="model.quantization",
                remedy="export the model: that merges into the original weights",
            )
        product = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision=jax.lax.Precision.HIGHEST)
        kernel = linear.kernel[...]
        linear.kernel[...] = (kernel.astype(jnp.float32) + linear.lora_scale * product).astype(kernel.dtype)
        linear.lora_a = linear.lora_b = nnx.data(None)
        linear.lora_scale = 0.0


def adapters(model: nnx.Module) -> dict[str, Linear]:
    """The adapted layers by dotted path."""
    return {".".join(path): linear for path, linear in _linears(model) if linear.lora_a is not None}
