"""Safetensors directories: read slices in place, write tensor by tensor. Nothing here unpickles.

The library's NumPy slices lack bfloat16 and its writer wants whole files in memory, so tensors are mapped and
written by the format's own description: 8 bytes of header length (little endian), a JSON header, raw data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from m3po_jax.errors import UserError

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: its place and type; `read` maps it and copies the slice asked for."""

    name: str
    file: Path
    shape: tuple[int, ...]
    code: str  # the format's name of its type, e.g. BF16
    offset: int

    def check_type(self) -> None:
        """UserError where the values have a type that does not load."""
        if self.code not in DTYPES:
            raise UserError(
                f"{self.name} is stored as {self.code}",
                where=str(self.file),
                remedy="only float32, float16 and bfloat16 load; use a checkpoint that is not quantised",
            )

    @property
    def dtype(self) -> np.dtype:
        """
        Raises:
            UserError: a type that does not load.
        """
        self.check_type()
        return DTYPES[self.code]

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of the slice; the mapping is dropped at once, so that memory holds no file pages."""
        dtype = self.dtype
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)[index]
        try:
            mapped = np.memmap(self.file, dtype, "r", self.offset, self.shape or (1,))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", where=str(self.file)) from None
        return np.array(mapped.reshape(self.shape)[index])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory.

    Raises:
        UserError: the file is missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise UserError(
            f"no {path.name}",
            where=str(path.parent),
            remedy="a model directory holds config.json and safetensors",
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, validated against its size.

    Raises:
        UserError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks the header, the offsets and the file's length
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(
            f"truncated or not a safetensors file ({error})",
            where=str(file),
            remedy="download or copy it again",
        ) from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(name, file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def weight_files(directory: Path, present: Collection[str] | None = None) -> list[Path]:
    """The files that hold a model's weights: those of the index, ``model.safetensors``, or all that are there.

    Args:
        present: Names of all files of which `directory` has the index; None: what lies in it.

    Raises:
        UserError: the index is broken, or names a file that is missing.
    """
    if present is None:
        present = [file.name for file in directory.iterdir() if file.is_file()]
    index = directory / _INDEX
    if not index.is_file():
        if "model.safetensors" in present:
            return [directory / "model.safetensors"]
        names = sorted(name for name in present if name.endswith(".safetensors"))
        return [directory / name for name in names if not name.startswith("adapter_")]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError("no weight_map of tensor names to files", where=str(index))
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"names {name!r}, not a safetensors file of this directory", where=str(index))
        if name not in present:
            raise UserError(f"names {name}, which is missing", where=str(index), remedy="download or copy it again")
        files.append(directory / name)
    return files


def has_weights(directory: Path) -> bool:
    """Whether there are safetensors; UserError where their index is broken."""
    return bool(weight_files(directory))


def same_values(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Whether two stored tensors hold the same values, a few rows in memory at a time."""
    if a.shape != b.shape:
        return False
    parts = [(slice(i, i + rows),) for i in range(0, a.shape[0], rows)] if a.shape else [()]
    return all(np.array_equal(a.read(part).astype(np.float32), b.read(part).astype(np.float32)) for part in parts)


def no_weights(where: str, present: Collection[str]) -> UserError:
    """What is wrong with a model whose files, `present`, are no safetensors."""
    unsafe = sorted({Path(name).suffix for name in present}.intersection(_UNSAFE))
    if "adapter_model.safetensors" in present:
        what, remedy = "holds a PEFT adapter, not a model", "give the base model and load the adapter onto it"
    elif unsafe:
        what = f"holds {', '.join(unsafe)} weights only, which run code when loaded"
        remedy = "convert them to safetensors, e.g. with transformers' save_pretrained"
    else:
        what = "holds no weights"
        remedy = "put *.safetensors there, or set model.init=random to start from a seed"
    return UserError(what, where=where, remedy=remedy)


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name: ``model.safetensors`` or the shards of its index.

    Raises:
        UserError: no safetensors there, a missing or truncated shard, a name that occurs twice.
    """
    files = weight_files(directory)
    if not files:
        raise no_weights(str(directory), [file.name for file in directory.iterdir()])
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(f"{name} is also in {tensors[name].file.name}", where=str(file))
            tensors[name] = tensor
    return tensors


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to write as `dtype`; `value` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Iterable[PendingTensor], *, write: bool = True) -> None:
    """One safetensors file with ``{"format": "pt"}``, a tensor in memory at a time.

    A value that has its tensor's type already is written as it is, to the bit; any other is rounded once.

    With `write` False every value is still computed (a collective on several hosts) but nothing is written.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        size = tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if not write:
        for tensor in tensors:
            tensor.value()
        return
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            value = np.asarray(tensor.value())
            assert value.shape == tensor.shape, (tensor.name, value.shape, tensor.shape)
            stream.write(np.ascontiguousarray(_cast(value, tensor.dtype, tensor.name)).tobytes())


def _cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        finite = np.isfinite(value.astype(np.float32)).all()
        wider = "bfloat16" if dtype == DTYPES["F16"] else "float32"
        raise UserError(
            f"a value does not fit {dtype.name}" if finite else "not every value is finite",
            where=name,
            remedy=f"export with --dtype {wider}" if finite else "training has diverged: take an earlier checkpoint",
        )
    return cast


def write_directory(
    directory: Path,
    tensors: Sequence[PendingTensor],
    *,
    shard_bytes: int = 5_000_000_000,
    write: bool = True,
) -> None:
    """``model.safetensors``, or shards of at most `shard_bytes` (one tensor at least) with their index."""
    shards: list[list[PendingTensor]] = [[]]
    total = held = 0
    for tensor in tensors:
        size = tensor.nbytes
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
        total += size
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0], write=write)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, write=write)
        weight_map |= {tensor.name: name for tensor in shard}
    if write:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
