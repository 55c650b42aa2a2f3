"""Models and adapters in Hugging Face's and PEFT's formats, written atomically, a tensor in memory at a time.

Full models are written in the transformers 4.x layout, the only one that every version reads with identical
logits; adapters with the names that every PEFT version matches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.models import lora
from m3po_jax.models.layers import Linear, LoRAParam
from m3po_jax.models.quantization import Quantized
from m3po_jax.models.quantized_base import is_quantized
from m3po_jax.models.registry import Description, Family, Loaded, describe, family_of_model
from m3po_jax.models.safetensors_io import (
    DTYPES,
    PendingTensor,
    StoredTensor,
    open_directory,
    read_header,
    read_json,
    write_directory,
    write_file,
)
from m3po_jax.models.tensor_map import Parameter, parameters
from m3po_jax.sharding import sharding_for, to_host

EXPORT_DTYPES = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}
VLLM_DEFAULT_RANK = 16  # vLLM's default of --max-lora-rank
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that it accepts
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"),
    *(".safetensors.index.json", ".bin.index.json"),
)


def _export_dtype(name: str) -> np.dtype:
    if name not in EXPORT_DTYPES:
        raise UserError(f"dtype {name!r}{nearest(name, EXPORT_DTYPES)}", where="export")
    return EXPORT_DTYPES[name]


@contextmanager
def _atomic_directory(out_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden sibling that becomes `out_dir` when the block succeeds and vanishes when it fails.

    On several hosts only process 0 writes; the others get a path that they must not touch.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError("a file is in the way", where=str(out_dir), remedy="choose another output directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise UserError("already holds files", where=str(out_dir), remedy="remove it or choose another directory")
    if jax.process_index() != 0:
        yield out_dir
        return
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        if out_dir.is_dir():
            previous = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
            os.replace(out_dir, previous)  # onto an empty directory: atomic
            os.replace(partial, out_dir)
            shutil.rmtree(previous)
        else:
            os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_other_files(base: Path, out_dir: Path) -> None:
    """Everything of the base directory that is not a weight or an adapter, byte for byte."""
    for file in sorted(base.rglob("*")):
        relative = file.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not file.is_file() or file.name.endswith(_WEIGHT_SUFFIXES) or file.name == "adapter_config.json":
            continue
        target = out_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """W + (α/r) A B in float32 (Hu et al., arXiv:2106.09685, section 4.1)."""
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product


def _layer(x: jax.Array, index: int | None) -> jax.Array:
    return x if index is None else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _value(
    variable: nnx.Variable,
    owner: Any,
    leaf: Parameter,
    index: int | None,
    originals: Mapping[str, StoredTensor],
) -> np.ndarray:
    """One parameter (of one layer) on the host in stored orientation, its adapter merged in.

    A quantised kernel is read again from the tensor that it was made of.
    """
    if isinstance(variable, Quantized):
        everything = (slice(None),) * len(leaf.layer_shape)
        x = jnp.asarray(leaf.source.read(originals[leaf.source.layer(index)], everything, leaf.layer_shape))
    else:
        x = _layer(variable[...], index)
    if leaf.path[-1] == "kernel" and isinstance(owner, Linear) and owner.lora_a is not None and owner.lora_scale:
        a, b = _layer(owner.lora_a[...], index), _layer(owner.lora_b[...], index)
        x = _merged(x, a, b, jnp.float32(owner.lora_scale))
    return leaf.source.to_stored(to_host(x))


def _modules(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    return {tuple(str(part) for part in path): module for path, module in nnx.iter_modules(model)}


def pending_tensors(
    model: nnx.Module, family: Family, config: Any, originals: Mapping[str, StoredTensor] | None = None
) -> list[PendingTensor]:
    """Every tensor of the exported checkpoint, in the order of names; values are computed on demand.

    Args:
        originals: What quantised kernels were made of, by canonical name.
    """
    leaves = parameters(model, family.tensor_map(config))
    variables = {
        tuple(str(part) for part in path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, Quantized)))
    }
    owners = _modules(model)
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
            found = [
                _value(variables[leaf.path], owners.get(leaf.path[:-1]), leaf, i, originals or {})
                for _, leaf, i in parts
            ]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return PendingTensor(name, shapes[name], value)

    return [tensor(name) for name in sorted(pieces)]


def _originals(base: Loaded | Description) -> dict[str, StoredTensor]:
    """The base directory's own tensors by canonical name.

    Raises:
        UserError: the quantised weights never were in a directory.
    """
    if isinstance(base, Loaded) and not base.pretrained:
        raise UserError(
            "the weights were drawn at random and quantised, so that no exact ones are left to export",
            where="model.quantization",
            remedy="export the adapter (--format peft), or run with model.quantization=none",
        )
    named = ((base.family.canonical_name(name), tensor) for name, tensor in open_directory(base.directory).items())
    return {name: tensor for name, tensor in named if name is not None}


def export_model(
    model: nnx.Module,
    base: Loaded | str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "float16",
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """A Hugging Face directory of `model`: weights in the 4.x layout and the base's other files unchanged.

    Adapters are merged in float32 before the cast to `dtype`; the caller's model keeps them. Where the model's base
    is quantised, they are merged into the base directory's own weights instead of what the codes stand for. Every
    process of a multi-host run must call this; process 0 writes.

    Args:
        model: A LLaVA, LLaMA or dual encoder, trained or not.
        base: What `load_model` returned, or the directory that the model came from.
        out_dir: Created, or replaced as a whole with `overwrite`.

    Raises:
        UserError: `out_dir` holds files, or a value is not finite or does not fit `dtype`.
    """
    kind, out_dir = _export_dtype(dtype), Path(out_dir)
    description = base if isinstance(base, Loaded) else describe(base)
    if out_dir.resolve() == description.directory.resolve():
        raise UserError("is the base model's own directory", where=str(out_dir), remedy="choose another one")
    originals = _originals(description) if is_quantized(model) else None
    tensors = pending_tensors(model, description.family, description.config, originals)
    with _atomic_directory(out_dir, overwrite=overwrite) as partial:
        write = jax.process_index() == 0
        if write:
            _copy_other_files(description.directory, partial)
            config = partial / "config.json"
            if read_json(description.directory / "config.json") != description.raw_config:
                # The base is an original release, or got another vision tower: its own file describes neither.
                config.write_text(json.dumps(description.raw_config, indent=2) + "\n", "utf-8")
        write_directory(partial, tensors, kind, shard_bytes=shard_bytes, write=write)
    return out_dir


def vllm_hint(rank: int) -> str | None:
    """The flag that vLLM needs for an adapter of this rank; None where its default suffices."""
    if rank <= VLLM_DEFAULT_RANK:
        return None
    needed = next((known for known in _VLLM_RANKS if known >= rank), None)
    if needed is None:
        return f"vLLM serves no adapter of rank {rank}: export the merged model"
    return f"vLLM needs --enable-lora --max-lora-rank {needed} for this adapter"


def _adapted(model: nnx.Module, family: Family, config: Any) -> Iterator[tuple[Linear, Parameter]]:
    leaves = parameters(model, family.tensor_map(config))
    for path, linear in lora.adapters(model).items():
        yield linear, leaves[(*path.split("."), "kernel")]


def _module_name(leaf: Parameter, index: int | None) -> str:
    return leaf.source.layer(index).removesuffix(".weight")


def _names_of_module(name: str, family: Family) -> list[str]:
    """A module's names in all versions of transformers: PEFT follows the decoder and the tower, not the projector."""
    for root in family.projector[:1]:
        if name.startswith(f"{root}."):
            return [module + name.removeprefix(root) for module in family.projector]
    return [name]


def export_adapter(
    model: Any,
    base_name_or_path: str,
    out_dir: str | Path,
    lora_config: LoRAConfig,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> str | None:
    """``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT writes them.

    A projector that was trained too (`train_projector`) goes along under `modules_to_save`.

    Returns:
        The flag that vLLM needs for this rank, or None.

    Raises:
        UserError: the model has no adapter, or `out_dir` holds files.
    """
    kind, out_dir = _export_dtype(dtype), Path(out_dir)
    family, config = family_of_model(model), model.config
    tensors: list[PendingTensor] = []
    adapted: dict[str, set[str]] = {}  # first part of the module names -> their last parts
    for linear, leaf in _adapted(model, family, config):
        assert linear.lora_a is not None and linear.lora_b is not None
        *_, rank = linear.lora_a.shape
        for index in [None] if leaf.layers is None else range(leaf.layers):
            name = _module_name(leaf, index)
            adapted.setdefault(name.split(".")[0], set()).add(name.split(".")[-1])
            for letter, factor, shape in (
                ("A", linear.lora_a, (rank, leaf.layer_shape[0])),
                ("B", linear.lora_b, (leaf.layer_shape[1], rank)),
            ):
                value = lambda f=factor, i=index: to_host(_layer(f[...], i)).T  # noqa: E731
                tensors += [
                    PendingTensor(f"base_model.model.{module}.lora_{letter}.weight", shape, value)
                    for module in _names_of_module(name, family)
                ]
    if not tensors:
        raise UserError("the model has no adapter", where="export", remedy="export the full model instead")
    saved_modules = None
    if lora_config.train_projector and family.projector:
        saved = family.projector[0]
        saved_modules = [saved]
        # PEFT looks these up under the running version's own module name, so every version's name is there.
        tensors += [
            PendingTensor(f"base_model.model.{module}{tensor.name.removeprefix(saved)}", tensor.shape, tensor.value)
            for tensor in pending_tensors(model, family, config)
            if tensor.name.startswith(f"{saved}.")
            for module in family.projector
        ]
    # A plain list would also wrap the vision tower's layers of the same names.
    targets = [rf".*{root}.*\.({'|'.join(sorted(names))})" for root, names in sorted(adapted.items())]
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name_or_path),
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
    with _atomic_directory(out_dir, overwrite=overwrite) as partial:
        write = jax.process_index() == 0
        if write:
            (partial / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", "utf-8")
        write_file(partial / "adapter_model.safetensors", sorted(tensors, key=lambda t: t.name), kind, write=write)
    return vllm_hint(lora_config.lora_rank)


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
    if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("fan_in_fan_out"):
        raise UserError("only plain LoRA adapters are read", where=where, remedy="merge it into its base model first")
    if raw.get("bias", "none") != "none" or raw.get("rank_pattern") or raw.get("alpha_pattern"):
        raise UserError("biases and per-layer ranks are not read", where=where, remedy="merge it into its base model")
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
        elif not match and name and family.projector and name.startswith(f"{family.projector[0]}."):
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
    owners = _modules(model)
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
    owners = _modules(model)
    by_name = {leaf.source.name: leaf for leaf in leaves.values() if leaf.layers is None}
    for name, tensor in tensors.items():
        leaf = by_name.get(name)
        if leaf is None or leaf.stored()[name] != tensor.shape:
            raise UserError(f"{tensor.name} does not fit this model", where=where, remedy="check the base model")
        variable = getattr(owners[leaf.path[:-1]], leaf.path[-1])
        everything = (slice(None),) * len(leaf.shape)
        value = leaf.source.read(tensor, everything, leaf.shape).astype(leaf.dtype)
        variable[...] = _place(np.ascontiguousarray(value), leaf.axes, variable[...])
