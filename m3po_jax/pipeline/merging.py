"""What the `merge` verb writes: a model with a PEFT adapter, ours or another program's, merged into it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from m3po_jax.config import MeshConfig, ModelConfig
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.models.export import export_model, load_adapter
from m3po_jax.models.export.model import RECORD
from m3po_jax.models.hub import pinned
from m3po_jax.models.identity import tree_identity
from m3po_jax.models.registry import Loaded, describe, load_model
from m3po_jax.models.safetensors_io import read_json
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.exporting import check_output
from m3po_jax.pipeline.models import model_identity

_CARD = """---
base_model: {base}
---

The model `{base}` with the LoRA adapter `{adapter}` merged into it by m3po_jax.
"""


def _base_of(adapter: Path) -> str:
    """The model that an adapter says it was trained on.

    Raises:
        UserError: no adapter there, or it does not say.
    """
    file = adapter / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError("does not name its base model", where=str(file), remedy="name it: model.path=...")
    return base


def merge(
    model: ModelConfig, mesh: MeshConfig, adapter: Path, output: Path, *, dtype: str = "auto", overwrite: bool = False
) -> Path:
    """Writes `model` with an adapter merged into it as a Hugging Face directory, which `model.path` can then name.

    Merged in float32 into the tensors that the directory stores, as `export_model` merges what was trained here.

    Args:
        model: Its `path` may be empty: then it is the base model that the adapter names.
        adapter: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``, plain LoRA alone.
        dtype: One of `EXPORT_DTYPES`.

    Raises:
        UserError: no such model, an adapter of something else, an output that is in the way.
    """
    if not model.path:
        model = replace(model, path=_base_of(adapter))
        say(f"{adapter} names {model.path} as its base model")
    path = pinned(model.path, model.revision)
    # Before any weight is read: a large base takes its time.
    description = describe(path, vision_tower=model.vision_tower)
    record = {"base": model_identity(description), "adapter": tree_identity(adapter), "dtype": dtype}
    check_output(output, record, (*description.directories, adapter), overwrite)
    with use_mesh(make_mesh(mesh)) as place:
        base: Loaded = load_model(
            path, dtype=model.dtype, param_dtype=model.param_dtype, mesh=place, vision_tower=model.vision_tower
        )
        load_adapter(base.model, adapter)
        texts = {
            "README.md": _CARD.format(base=model.path, adapter=adapter.name),
            RECORD: json.dumps(record, indent=2) + "\n",
        }
        return export_model(base.model, base, output, dtype=dtype, overwrite=True, texts=texts)
