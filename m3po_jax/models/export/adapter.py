"""Adapters as PEFT writes them, with the names that every version of it matches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.hosts.sharding import to_host
from m3po_jax.models import lora
from m3po_jax.models.export.directory import AUTO, atomic_directory, export_dtype
from m3po_jax.models.export.model import layer_of, loaded_tensors, pending_tensors
from m3po_jax.models.export.serving import vllm_hint
from m3po_jax.models.hub import HUB_ID, snapshot_of
from m3po_jax.models.layers import Linear
from m3po_jax.models.registry import Family, Loaded, family_of_model
from m3po_jax.models.safetensors_io import DTYPES, PendingTensor, write_file
from m3po_jax.models.tensor_map import Parameter, parameters


def _adapted(model: Any, family: Family) -> Iterator[tuple[Linear, Parameter]]:
    leaves = parameters(model, family.tensor_map(model.config))
    for path, linear in lora.adapters(model).items():
        yield linear, leaves[(*path.split("."), "kernel")]


def _module_name(leaf: Parameter, index: int | None) -> str:
    return leaf.source.layer(index).removesuffix(".weight")


def _names_of_module(name: str, family: Family) -> list[str]:
    """A module's names in all versions of transformers, as far as PEFT does not follow them by itself."""
    others = [
        other + name.removeprefix(here) for here, other in family.other_names if f"{name}.".startswith(f"{here}.")
    ]
    return [name, *others]


def _check_adapter(linear: Linear, config: LoRAConfig) -> None:
    """UserError where the factors are not of the rank and α that the settings say."""
    assert linear.lora_a is not None
    rank = linear.lora_a.shape[-1]
    if rank != config.lora_rank or not math.isclose(linear.lora_scale, config.lora_alpha / config.lora_rank):
        alpha = linear.lora_scale * rank
        raise UserError(
            f"the adapter has rank {rank} and alpha {alpha:g}, not {config.lora_rank} and {config.lora_alpha:g}",
            where="export",
            remedy="export with the train.lora that it was trained with",
        )


def _factors(linear: Linear, leaf: Parameter, family: Family, dtype: np.dtype) -> Iterator[PendingTensor]:
    """Both factors of every layer, in PEFT's orientation: A is (rank, in), B is (out, rank)."""
    assert linear.lora_a is not None and linear.lora_b is not None
    *_, rank = linear.lora_a.shape
    for index in [None] if leaf.layers is None else range(leaf.layers):
        for letter, factor, shape in (
            ("A", linear.lora_a, (rank, leaf.layer_shape[0])),
            ("B", linear.lora_b, (leaf.layer_shape[1], rank)),
        ):
            value = lambda f=factor, i=index: to_host(layer_of(f[...], i)).T  # noqa: E731
            for module in _names_of_module(_module_name(leaf, index), family):
                name = f"base_model.model.{module}.lora_{letter}.weight"
                yield PendingTensor(name, shape, dtype, value)


def export_adapter(
    model: Any,
    base_name_or_path: str,
    out_dir: str | Path,
    lora_config: LoRAConfig,
    *,
    dtype: str = AUTO,
    overwrite: bool = False,
    base: Loaded | None = None,
    texts: Mapping[str, str] | None = None,
) -> str | None:
    """``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT writes them.

    A projector that was trained too (`train_projector`) goes along under `modules_to_save`.

    Args:
        dtype: Of the factors and the projector; ``auto``: float32, as they were trained.
        base: What the model was loaded from: what training left alone of a projector is read there again.
        texts: Files to write beside them, by name.

    Returns:
        What one has to know to serve it by vLLM, or None.

    Raises:
        UserError: the model has no adapter, or one of another rank or α than `lora_config` says; `out_dir` holds
            files.
    """
    kind, out_dir = export_dtype(dtype) or DTYPES["F32"], Path(out_dir)
    family = family_of_model(model)
    tensors: list[PendingTensor] = []
    adapted: dict[str, set[str]] = {}  # the part of a model in its module names -> their last parts
    for linear, leaf in _adapted(model, family):
        _check_adapter(linear, lora_config)
        for index in [None] if leaf.layers is None else range(leaf.layers):
            name = _module_name(leaf, index)
            adapted.setdefault(name.split(".")[family.module_root], set()).add(name.split(".")[-1])
        tensors += _factors(linear, leaf, family, kind)
    if not tensors:
        raise UserError("the model has no adapter", where="export", remedy="export with --format huggingface")
    saved_modules = None
    if lora_config.train_projector and family.projector:
        saved = family.projector
        saved_modules = [saved]
        stored = loaded_tensors(base) if base is not None and base.pretrained else {}
        # PEFT looks these up under the running version's own module name, so every version's name is there.
        tensors += [
            PendingTensor(f"base_model.model.{name}", tensor.shape, kind, tensor.value)
            for tensor in pending_tensors(model, family, model.config, stored, kind)
            if tensor.name.startswith(f"{saved}.")
            for name in _names_of_module(tensor.name, family)
        ]
    # A plain list would also wrap the vision tower's layers of the same names.
    targets = [rf".*{root}.*\.({'|'.join(sorted(names))})" for root, names in sorted(adapted.items())]
    named = HUB_ID.fullmatch(str(base_name_or_path))
    snapshot = snapshot_of(base.directory) if named is not None and base is not None else None
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name_or_path) if snapshot is None else snapshot.repository,
        **({} if snapshot is None else {"revision": snapshot.commit}),
        "r": lora_config.lora_rank,
        "lora_alpha": lora_config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved_modules,
        "target_modules": targets[0] if len(targets) == 1 else f"({'|'.join(targets)})",
    }
    size = sum(tensor.nbytes for tensor in tensors)
    with atomic_directory(out_dir, overwrite=overwrite, size=size) as partial:
        write = is_writer()
        if write:
            (partial / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", "utf-8")
            for name, text in (texts or {}).items():
                (partial / name).write_text(text, "utf-8")
        write_file(partial / "adapter_model.safetensors", sorted(tensors, key=lambda t: t.name), write=write)
    parts = {path.split(".")[0] for path in lora.adapters(model)} - {family.lora_scope}
    return vllm_hint(lora_config.lora_rank, trained_projector=saved_modules is not None, parts=parts)
