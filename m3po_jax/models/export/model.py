"""Full models in the transformers 4.x layout, the only one that every version reads with identical logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.hosts.sharding import to_host
from m3po_jax.models.export.directory import AUTO, atomic_directory, export_dtype
from m3po_jax.models.layers import Linear
from m3po_jax.models.quantization import Quantized
from m3po_jax.models.quantized_base import is_quantized
from m3po_jax.models.registry import Description, Family, Loaded, describe, stored_tensors
from m3po_jax.models.safetensors_io import DTYPES, PendingTensor, StoredTensor, read_json, write_directory
from m3po_jax.models.tensor_map import Parameter, parameters

RECORD = "m3po_export.json"  # what an export was made of, see pipeline/exporting.py
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"),
    *(".safetensors.index.json", ".bin.index.json"),
)
_TIED = "tie_word_embeddings"
_DTYPE_KEYS = ("torch_dtype", "dtype")  # transformers 4.x, and since 4.56


def _copy_other_files(base: Path, out_dir: Path) -> None:
    """The base directory's other files, byte for byte: no weight, no adapter, and nothing that speaks of the base."""
    for file in sorted(base.rglob("*")):
        relative = file.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        about_base = file.name in ("adapter_config.json", RECORD) or file.name.lower().startswith("readme")
        if hidden or about_base or not file.is_file() or file.name.endswith(_WEIGHT_SUFFIXES):
            continue
        target = out_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """W + (α/r) A B in float32 (Hu et al., arXiv:2106.09685, section 4.1)."""
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product


def layer_of(x: jax.Array, index: int | None) -> jax.Array:
    """One layer of a stacked array; the array itself where it is not stacked."""
    return x if index is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def modules(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    """Every module of a model by its path."""
    return {tuple(str(part) for part in path): module for path, module in nnx.iter_modules(model)}


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    bits = f"u{first.dtype.itemsize}"
    return bool(np.array_equal(first.view(bits), second.view(bits)))


def _is_loaded(value: np.ndarray, stored: np.ndarray) -> bool:
    """Whether `value` is what loading makes of `stored`: cast, through a narrower type where training widened it."""
    with np.errstate(over="ignore", invalid="ignore"):
        ways = [stored.astype(value.dtype)]
        if value.dtype == np.float32:
            ways += [stored.astype(DTYPES[narrow]).astype(np.float32) for narrow in ("BF16", "F16")]
    return any(_same_bits(value, way) for way in ways)


def _value(
    variable: nnx.Variable, owner: Any, leaf: Parameter, index: int | None, stored: Mapping[str, StoredTensor]
) -> np.ndarray:
    """One parameter (of one layer) on the host in stored orientation, its adapter merged in.

    A parameter that nothing has changed is read again from the tensor that it was made of, which memory may hold in
    another type or in few bits; and so is the kernel under an adapter.
    """
    base: np.ndarray | None = None
    if stored:
        everything = (slice(None),) * len(leaf.layer_shape)
        base = leaf.source.read(stored[leaf.source.layer(index)], everything, leaf.layer_shape)
    if isinstance(variable, Quantized):
        assert base is not None
        value = base
    else:
        value = to_host(layer_of(variable[...], index))
        if base is not None and _is_loaded(value, base):
            value = base
    if leaf.path[-1] == "kernel" and isinstance(owner, Linear) and owner.lora_a is not None and owner.lora_scale:
        a, b = layer_of(owner.lora_a[...], index), layer_of(owner.lora_b[...], index)
        if np.any(to_host(b)):  # else even the sign of a zero stays
            value = to_host(_merged(jnp.asarray(value), a, b, jnp.float32(owner.lora_scale)))
    return leaf.source.to_stored(value)


def pending_tensors(
    model: nnx.Module,
    family: Family,
    config: Any,
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype | None,
) -> list[PendingTensor]:
    """Every tensor of the exported checkpoint, in the order of names; values are computed on demand.

    Args:
        stored: What the parameters were loaded from, by canonical name; empty: they never were stored.
        dtype: Of every tensor; None: as it is stored, or as it lies in memory where it is not.
    """
    leaves = parameters(model, family.tensor_map(config))
    variables = {
        tuple(str(part) for part in path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, Quantized)))
    }
    owners = modules(model)
    pieces: dict[str, list[tuple[int, Parameter, int | None]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in leaves.values():
        if leaf.source.name is None:
            if bool(jnp.any(variables[leaf.path][...] != leaf.source.value)):
                raise UserError(
                    f"{'.'.join(leaf.path)} was trained, and this layout has no place for it", where="export"
                )
            continue
        for index in [None] if leaf.layers is None else range(leaf.layers):
            pieces.setdefault(leaf.source.layer(index), []).append((leaf.source.part[0], leaf, index))
        shapes |= leaf.stored()

    def tensor(name: str) -> PendingTensor:
        parts = sorted(pieces[name], key=lambda piece: piece[0])

        def value() -> np.ndarray:
            values = [
                _value(variables[leaf.path], owners.get(leaf.path[:-1]), leaf, i, stored) for _, leaf, i in parts
            ]
            if len(values) == 1:
                return values[0]
            same = len({part.dtype for part in values}) == 1
            return np.concatenate(values if same else [part.astype(np.float32) for part in values])

        natural = stored[name].dtype if stored else np.dtype(variables[parts[0][1].path].dtype)
        return PendingTensor(name, shapes[name], natural if dtype is None else dtype, value)

    return [tensor(name) for name in sorted(pieces)]


def loaded_tensors(base: Loaded | Description) -> dict[str, StoredTensor]:
    """The tensors that a model was loaded from, by canonical name."""
    return stored_tensors(base.description if isinstance(base, Loaded) else base)


def _loads_right(dtypes: Collection[np.dtype]) -> str:
    """The type by which transformers loads tensors of `dtypes` without losing any of their values."""
    if len(dtypes) == 1:
        return next(iter(dtypes)).name
    return "float64" if DTYPES["F64"] in dtypes else "float32"


def _saying(config: Mapping[str, Any], dtype: str, *, always: bool) -> dict[str, Any]:
    """``config.json`` with the weights' type wherever it (or a sub-configuration) states one.

    Args:
        always: The top states it even where the base's does not.
    """

    def stated(section: Mapping[str, Any]) -> dict[str, Any]:
        return {key: dtype for key in _DTYPE_KEYS if section.get(key) is not None}

    parts = {
        name: {**section, **stated(section)}
        for name, section in config.items()
        if name.endswith("_config") and isinstance(section, dict)
    }
    top = stated(config)
    if always and not top:
        top = {key: dtype for key in _DTYPE_KEYS if key in config} or {_DTYPE_KEYS[0]: dtype}
    return {**config, **parts, **top}


def _untied(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``config.json`` that ties no embeddings where an output head is written: transformers 4 would drop the head."""
    if not any(name.endswith("lm_head.weight") for name in names):
        return dict(config)
    parts = {
        name: {**section, _TIED: False}
        for name, section in config.items()
        if isinstance(section, dict) and section.get(_TIED)
    }
    return {**config, **parts, **({_TIED: False} if config.get(_TIED) else {})}


def export_model(
    model: nnx.Module,
    base: Loaded | str | Path,
    out_dir: str | Path,
    *,
    dtype: str = AUTO,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """A Hugging Face directory of `model`: weights in the 4.x layout and the base's other files unchanged.

    Tensors that training left alone come from the base directory, bit by bit where `dtype` is theirs. Adapters are
    merged in float32 into what the base directory holds (not into what memory holds of it, which may be rounded or
    quantised) and rounded once, so that the base with the adapter is the merged model; the caller's model keeps them.
    ``config.json`` says the written type. Every process of a multi-host run must call this; process 0 writes.

    Args:
        model: A LLaVA, text decoder or dual encoder, trained or not.
        base: What `load_model` returned, or the directory that the model came from.
        out_dir: Created, or replaced as a whole with `overwrite`.
        dtype: ``auto``: each tensor's as the base stores it; else one for all.
        texts: Files to write beside the weights, by name (a model card, say). The base's README is not copied.

    Raises:
        UserError: `out_dir` holds files, or a value is not finite or does not fit its type.
    """
    kind, out_dir = export_dtype(dtype), Path(out_dir)
    description = base if isinstance(base, Loaded) else describe(base)
    if out_dir.resolve() == description.directory.resolve():
        raise UserError("is the base model's own directory", where=str(out_dir), remedy="choose another one")
    drawn = isinstance(description, Loaded) and not description.pretrained
    if drawn and is_quantized(model):
        raise UserError(
            "the weights were drawn at random and quantised, so that no exact ones are left to export",
            where="model.quantization",
            remedy="export the adapter (--format peft), or run with model.quantization=none",
        )
    stored = {} if drawn else loaded_tensors(description)
    tensors = pending_tensors(model, description.family, description.config, stored, kind)
    size = sum(tensor.nbytes for tensor in tensors)
    with atomic_directory(out_dir, overwrite=overwrite, size=size) as partial:
        write = is_writer()
        if write:
            _copy_other_files(description.directory, partial)
            written = {tensor.dtype for tensor in tensors}
            # A base that states no type loads as its tensors are stored, which need not be so any more.
            changed = len(written) > 1 or written != {tensor.dtype for tensor in stored.values()}
            config = _saying(description.raw_config, _loads_right(written), always=changed)
            config = _untied(config, [tensor.name for tensor in tensors])
            if read_json(description.directory / "config.json") != config:
                # Another type, an original release, or another vision tower: the base's own file describes neither.
                (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            if description.tower is not None and description.family.tower is not None:
                description.family.tower.write_files(config, description.tower, partial)
            for name, text in (texts or {}).items():
                (partial / name).write_text(text, "utf-8")
        write_directory(partial, tensors, shard_bytes=shard_bytes, write=write)
    return out_dir
