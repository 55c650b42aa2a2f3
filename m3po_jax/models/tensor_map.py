"""How a family's parameters correspond to stored tensors.

A family states one `Source` per parameter; reading, writing, adapters and checks all follow from that map and
from the abstract parameter tree (`nnx.eval_shape`), the single source of shapes, types and axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from m3po_jax.errors import UserError
from m3po_jax.models.layers import LoRAParam
from m3po_jax.models.quantization import Quantized, kernel_shape
from m3po_jax.models.safetensors_io import StoredTensor

Path = tuple[str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The stored tensor of one parameter.

    Args:
        name: Its canonical name; ``{}`` stands for the layer of a stacked parameter. None: it is not stored
            and always equals `value`.
        kind: ``same``; ``linear``: stored (out, in), ours (in, out); ``conv``: stored (out, 3, p, p), ours
            (p·p·3, out) in (row, column, channel) order, see `vit.patchify`; ``flat``: a convolution stored as
            `shape`, ours (in, out) with channels and the window's axes in one, in the order of the stored tensor.
        part: (i, n) where the stored tensor holds n parameters side by side along its first axis.
        pad_rows: Its rows are the vocabulary's, of which an original release stores fewer than the model has; the
            others get the rows' mean, as Hugging Face's resizing centres them.
        copies: Names under which some writers store it once more, or instead (tied embeddings).
        shape: The stored shape where it is not implied (a scalar that we keep as a vector).
    """

    name: str | None
    kind: str = "same"
    part: tuple[int, int] = (0, 1)
    pad_rows: bool = False
    copies: tuple[str, ...] = ()
    shape: Shape | None = None
    value: float = 0.0

    def layer(self, index: int | None) -> str:
        """The stored name of layer `index`; None: of a parameter that is not stacked."""
        assert self.name is not None
        return self.name if index is None else self.name.format(index)

    def stored_shape(self, shape: Shape) -> Shape:
        """The stored tensor's shape for a parameter of `shape` (without the layer axis)."""
        if self.shape is not None:
            return self.shape
        if self.kind == "linear":
            shape = (shape[1], shape[0])
        elif self.kind == "conv":
            patch = math.isqrt(shape[0] // 3)
            shape = (shape[1], 3, patch, patch)
        return (shape[0] * self.part[1], *shape[1:])

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """Our value in stored orientation (one part of it, where the stored tensor holds several)."""
        if self.shape is not None:
            return (value.T if self.kind == "flat" else value).reshape(self.shape)
        if self.kind == "linear":
            return value.T
        if self.kind == "conv":
            patch = math.isqrt(value.shape[0] // 3)
            return value.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
        return value

    def read(self, tensor: StoredTensor, index: tuple[slice, ...], shape: Shape) -> np.ndarray:
        """The slice `index` of the parameter of `shape`, read from nothing more than it needs."""
        if self.shape is not None:
            x = tensor.read()
            return (x.reshape(shape[::-1]).T if self.kind == "flat" else x.reshape(shape))[index]
        rows = self.stored_shape(shape)[0]
        axis = 1 if self.kind in ("linear", "conv") else 0
        start, stop, _ = index[axis].indices(shape[axis])
        offset = self.part[0] * (rows // self.part[1])
        if self.kind == "conv":
            x = tensor.read((slice(start + offset, stop + offset),))
            return x.transpose(2, 3, 1, 0).reshape(shape[0], -1)[index[0]]
        rest = (index[0],) if self.kind == "linear" else index[1:]
        stored_rows = tensor.shape[0]
        x = tensor.read((slice(start + offset, min(stop + offset, stored_rows)), *rest))
        if stop > stored_rows and self.pad_rows:
            missing = (stop - start) - len(x)
            x = np.concatenate([x, np.broadcast_to(_row_mean(tensor, rest), (missing, *x.shape[1:])).astype(x.dtype)])
        return x.T if self.kind == "linear" else x


TensorMap = Mapping[Path, Source]


def _row_mean(tensor: StoredTensor, rest: tuple[slice, ...], chunk: int = 4096) -> np.ndarray:
    total = sum(
        tensor.read((slice(i, i + chunk), *rest)).astype(np.float64).sum(axis=0)
        for i in range(0, tensor.shape[0], chunk)
    )
    return np.asarray(total) / tensor.shape[0]


@dataclass(frozen=True)
class Parameter:
    """One leaf of the abstract tree."""

    path: Path
    shape: Shape
    dtype: Any
    axes: tuple[str | None, ...]
    source: Source

    @property
    def layers(self) -> int | None:
        """How many layers are stacked in it; None: it is not stacked."""
        return self.shape[0] if self.axes[:1] == ("layers",) else None

    @property
    def layer_shape(self) -> Shape:
        """The shape without the layer axis."""
        return self.shape[1:] if self.layers is not None else self.shape

    def stored(self) -> dict[str, Shape]:
        """Names and shapes of the tensors that hold it."""
        if self.source.name is None:
            return {}
        shape = self.source.stored_shape(self.layer_shape)
        indices = [None] if self.layers is None else range(self.layers)
        return {self.source.layer(i): shape for i in indices}


def parameters(abstract: nnx.Module, tensor_map: TensorMap) -> dict[Path, Parameter]:
    """The leaves of an abstract (or concrete) model with their sources; adapters are left out.

    A quantised kernel is one leaf of the kernel's shape; its scales are none.

    The map must cover the tree and name nothing else: a mismatch is a defect of the family, not of its user.
    """
    parameters = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract, (nnx.Param, Quantized))):
        key = tuple(str(part) for part in path)
        if isinstance(variable, LoRAParam) or key[-1] == "kernel_scale":
            continue
        assert key in tensor_map, f"{key} has no source"
        axes = variable.get_metadata()["axes"]
        shape = kernel_shape(variable) if isinstance(variable, Quantized) else tuple(variable.shape)
        parameters[key] = Parameter(key, shape, variable.dtype, axes, tensor_map[key])
    assert set(parameters) == set(tensor_map), f"no parameter for {set(tensor_map) - set(parameters)}"
    return parameters


def expected_tensors(leaves: Mapping[Path, Parameter]) -> dict[str, Shape]:
    """Canonical names and shapes of everything a checkpoint of this model stores."""
    return {name: shape for leaf in leaves.values() for name, shape in leaf.stored().items()}


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_tensors(
    leaves: Mapping[Path, Parameter],
    tensors: Mapping[str, StoredTensor],
    where: str,
    *,
    stored_rows: int | None = None,
) -> None:
    """Names, shapes and types on disk (canonical names) against what the configuration says.

    Args:
        stored_rows: Of a vocabulary that is stored with fewer rows than the model has; None: it has all.

    Raises:
        UserError: tensors are missing, unknown, of another shape or of a type that does not load.
    """
    expected = expected_tensors(leaves)
    padded = {name for leaf in leaves.values() if leaf.source.pad_rows for name in leaf.stored()}
    missing = expected.keys() - tensors.keys()
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing: {_some(missing)}",
            where=where,
            remedy="the download may be incomplete, or config.json may belong to another model",
        )
    unknown = tensors.keys() - expected.keys()
    if unknown:
        stored = _some(tensors[name].name for name in unknown)
        raise UserError(
            f"{len(unknown)} tensors have no place in the model: {stored}",
            where=where,
            remedy="config.json may belong to another model or family",
        )
    for name, shape in expected.items():
        actual, vocabulary = tensors[name].shape, name in padded
        wanted = (stored_rows, *shape[1:]) if vocabulary and stored_rows is not None else shape
        if actual != wanted:
            resized = "or the vocabulary was resized and vocab_size was not, or the other way round"
            raise UserError(
                f"{tensors[name].name} has shape {list(actual)}, config.json says {list(wanted)}",
                where=str(tensors[name].file),
                remedy=f"config.json may belong to another model{f', {resized}' if vocabulary else ''}",
            )
        tensors[name].check_type()
