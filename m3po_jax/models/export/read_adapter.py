"""PEFT adapters onto a model: plain LoRA alone, checked field by field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import sharding_for
from m3po_jax.models import lora
from m3po_jax.models.export.model import modules
from m3po_jax.models.layers import LoRAParam
from m3po_jax.models.registry import family_of_model
from m3po_jax.models.safetensors_io import read_header, read_json
from m3po_jax.models.tensor_map import Parameter, parameters

# Every field of PEFT's LoraConfig is in one of these three.
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
# What the tensors in the file say themselves, what counts in training alone, and notes.
WITHOUT_EFFECT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("lora_dropout", "runtime_config", "megatron_core"),
        # Of methods that another field turns on.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)
# What changes the computation unless it has this value, and what it then is.
ONLY: dict[str, tuple[Any, str]] = {
    "fan_in_fan_out": (False, "transposed kernels"),
    "bias": ("none", "trained biases"),
    "rank_pattern": ({}, "per-layer ranks"),
    "alpha_pattern": ({}, "per-layer alphas"),
    "megatron_config": (None, "Megatron's layers"),
    "trainable_token_indices": (None, "trained token embeddings"),
    "use_dora": (False, "DoRA"),
    "velora_config": (None, "VeLoRA"),
    "alora_invocation_tokens": (None, "aLoRA"),
    "use_qalora": (False, "QALoRA"),
    "monteclora_config": (None, "MonteCLoRA"),
    "layer_replication": (None, "repeated layers"),
    "lora_bias": (False, "biases of the factors"),
    "target_parameters": (None, "adapted parameters that are no layers"),
    "use_bdlora": (None, "block-diagonal factors"),
    "arrow_config": (None, "Arrow's routing"),
    "kasa_config": (None, "KaSA"),
    "ensure_weight_tying": (False, "tied adapters"),
}
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part of every kernel out
# of the base (peft/tuners/lora/layer.py), and their factors belong to what is left.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Notes of other programs that write adapters (Unsloth, ms-swift).
_FOREIGN = frozenset({"unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"})
_EMPTY: tuple[Any, ...] = (None, False, {}, [], "")


def check_plain(raw: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        UserError: an ``adapter_config.json`` of anything but plain LoRA; the field is named.
    """

    def refuse(name: str, meaning: str) -> UserError:
        return UserError(
            f"only plain LoRA adapters are read, not {meaning} ({name}={raw.get(name)!r})",
            where=where,
            remedy="merge it into its base model with PEFT, and give the merged model",
        )

    if raw.get("peft_type") != "LORA":
        raise refuse("peft_type", "another method")
    start = raw.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in INITIALISATIONS:
        raise refuse("init_lora_weights", "factors that may belong to a base model which PEFT has rewritten")
    for name, value in raw.items():
        if name in READ or name in WITHOUT_EFFECT or name in _FOREIGN or value in _EMPTY:
            continue
        only, meaning = ONLY.get(name, (None, "a setting that is not known"))
        if value != only:
            raise refuse(name, meaning)


_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


def load_adapter(model: Any, directory: str | Path) -> LoRAConfig:
    """Puts a PEFT LoRA adapter (ours or PEFT's own, in any layout's names) onto `model`, in place.

    Layers that the file does not mention get B = 0, i.e. nothing is added there.

    Raises:
        UserError: not a plain LoRA adapter, unknown layers, or shapes that do not fit.
    """
    directory = Path(directory)
    raw = read_json(directory / "adapter_config.json")
    where = str(directory / "adapter_config.json")
    check_plain(raw, where)
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError("no adapter_model.safetensors", where=str(directory), remedy="pickled adapters are not read")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise UserError("r and lora_alpha must be numbers", where=where)
    if raw.get("use_rslora"):
        alpha = alpha * rank**0.5  # scale α/√r
    family = family_of_model(model)
    leaves = parameters(model, family.tensor_map(model.config))
    places = {
        name: (leaf, i)
        for leaf in leaves.values()
        if leaf.source.kind == "linear"
        for i, name in enumerate(leaf.stored())
    }
    factors: dict[tuple[str, ...], dict[tuple[int, str], np.ndarray]] = {}
    projector: dict[str, Any] = {}
    for key, tensor in read_header(file).items():
        match = _FACTOR.fullmatch(key)
        name = family.canonical_name(f"{match['module']}.weight" if match else key.removeprefix("base_model.model."))
        if match and name in places:
            leaf, index = places[name]
            fan_in, fan_out = leaf.layer_shape
            shape = (rank, fan_in) if match["letter"] == "A" else (fan_out, rank)
            if tensor.shape != shape:
                raise UserError(f"{key} has shape {list(tensor.shape)}, not {list(shape)}", where=str(file))
            factors.setdefault(leaf.path, {})[index, match["letter"]] = tensor.read().astype(np.float32).T
        elif not match and name and family.projector and name.startswith(f"{family.projector}."):
            projector[name] = tensor
        else:
            raise UserError(f"{key} names no layer of this model", where=str(file), remedy="check the base model")
    if not factors:
        raise UserError("holds no LoRA factors", where=str(file))
    _attach_factors(model, leaves, factors, rank, alpha / rank)
    if projector:
        _replace_leaves(model, leaves, projector, str(file))
    return LoRAConfig(
        lora_rank=rank,
        lora_alpha=float(alpha),
        target_modules=sorted({lora.target_name(path[:-1], family.lora_scope) for path in factors}),
        train_projector=bool(projector),
    )


def _place(value: np.ndarray, axes: tuple[str | None, ...], like: jax.Array) -> jax.Array:
    """`value` on the devices of `like`, sharded by its own axes."""
    mesh = getattr(like.sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):
        sharding = sharding_for(axes, value.shape, mesh)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.device_put(value, like.sharding)


def _attach_factors(
    model: Any,
    leaves: Mapping[tuple[str, ...], Parameter],
    factors: Mapping[tuple[str, ...], Mapping[tuple[int, str], np.ndarray]],
    rank: int,
    scale: float,
) -> None:
    owners = modules(model)
    for path, given in factors.items():
        leaf, linear = leaves[path], owners[path[:-1]]
        fan_in, fan_out = leaf.layer_shape
        count = leaf.layers or 1
        stacks = {
            "A": np.zeros((count, fan_in, rank), np.float32),
            "B": np.zeros((count, rank, fan_out), np.float32),
        }
        for (index, letter), value in given.items():
            stacks[letter][index] = value
        *prefix, in_axis, out_axis = leaf.axes
        placed = {}
        for letter, axes in (("A", (*prefix, in_axis, "lora")), ("B", (*prefix, "lora", out_axis))):
            value = stacks[letter] if leaf.layers is not None else stacks[letter][0]
            placed[letter] = LoRAParam(_place(value, axes, linear.kernel[...]), axes=axes)
        linear.lora_a, linear.lora_b, linear.lora_scale = placed["A"], placed["B"], scale


def _replace_leaves(
    model: nnx.Module, leaves: Mapping[tuple[str, ...], Parameter], tensors: Mapping[str, Any], where: str
) -> None:
    """Overwrites unstacked parameters whose stored tensors are given."""
    owners = modules(model)
    by_name = {leaf.source.name: leaf for leaf in leaves.values() if leaf.layers is None}
    for name, tensor in tensors.items():
        leaf = by_name.get(name)
        if leaf is None or leaf.stored()[name] != tensor.shape:
            raise UserError(f"{tensor.name} does not fit this model", where=where, remedy="check the base model")
        variable = getattr(owners[leaf.path[:-1]], leaf.path[-1])
        everything = (slice(None),) * len(leaf.shape)
        value = leaf.source.read(tensor, everything, leaf.shape).astype(leaf.dtype)
        variable[...] = _place(np.ascontiguousarray(value), leaf.axes, variable[...])
