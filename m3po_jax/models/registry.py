"""Model families: how one is found from its ``config.json``, built and loaded.

To add a family, write its configuration, model and tensor map in files of its own and append one `Family`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from m3po_jax.config import ModelConfig
from m3po_jax.data.tokenizer import read_vocabulary
from m3po_jax.errors import UserError, nearest
from m3po_jax.models import dual_encoder, dual_encoder_weights
from m3po_jax.models.causal_lm import model as causal_lm
from m3po_jax.models.causal_lm import weights as causal_lm_weights
from m3po_jax.models.config_fields import Fields, check_fields, shown
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.gemma3 import config as gemma3_config
from m3po_jax.models.gemma3 import model as gemma3
from m3po_jax.models.gemma3 import weights as gemma3_weights
from m3po_jax.models.gemma3.images import GEMMA3_IMAGES
from m3po_jax.models.hub import HUB_ID, fetch, listed_tensors, pinned, snapshot_of
from m3po_jax.models.idefics3 import config as idefics3_config
from m3po_jax.models.idefics3 import model as idefics3
from m3po_jax.models.idefics3 import weights as idefics3_weights
from m3po_jax.models.idefics3.images import IDEFICS3_IMAGES
from m3po_jax.models.image_family import ImageFamily
from m3po_jax.models.kernels.choice import attention_note, check_attention, with_attention
from m3po_jax.models.llava import config as llava_config
from m3po_jax.models.llava import model as llava
from m3po_jax.models.llava import weights as llava_weights
from m3po_jax.models.llava.images import LLAVA_IMAGES
from m3po_jax.models.llava.processor_files import write_processor_files
from m3po_jax.models.quantization import check_quantization
from m3po_jax.models.quantized_base import quantize_base
from m3po_jax.models.qwen2_5_vl import config as qwen25_vl_config
from m3po_jax.models.qwen2_5_vl import model as qwen25_vl
from m3po_jax.models.qwen2_5_vl import weights as qwen25_vl_weights
from m3po_jax.models.qwen2_5_vl.images import QWEN3_VL_IMAGES, QWEN25_VL_IMAGES
from m3po_jax.models.qwen3_vl import config as qwen3_vl_config
from m3po_jax.models.qwen3_vl import model as qwen3_vl
from m3po_jax.models.qwen3_vl import weights as qwen3_vl_weights
from m3po_jax.models.safetensors_io import (
    StoredTensor,
    has_weights,
    open_directory,
    read_json,
    same_values,
)
from m3po_jax.models.tensor_map import TensorMap, check_tensors, parameters
from m3po_jax.models.text_decoders import TEXT_DECODERS
from m3po_jax.models.weights import check_memory, initialise_parameters, load_parameters, replace_parameters
from m3po_jax.reading import check_value


@dataclass(frozen=True)
class Tower:
    """What lets a family take its vision tower from another directory.

    Args:
        default: The tower that a ``config.json`` refers to without containing it, or "".
        configure: ``(config.json, the tower's or None, where, reader of the tokenizer's ids by token)`` to the
            model's ``config.json`` with the tower's put in.
        canonical_name: The family's name of a tensor of the tower's directory; None: not the tower's.
        prefix: Canonical names under it are the tower's.
        write_files: ``(exported config.json, the tower's directory, output)``: writes there what processors of the
            model read, where they read more than the base's own files.
        stored_rows: Rows of vocabulary on disk, where `configure` rounds a ``config.json``'s up; else None.
    """

    default: Callable[[dict[str, Any]], str]
    configure: Callable[[dict[str, Any], dict[str, Any] | None, str, Callable[[], Mapping[str, int]]], dict[str, Any]]
    canonical_name: Callable[[str], str | None]
    prefix: str
    write_files: Callable[[Mapping[str, Any], Path, Path], None]
    stored_rows: Callable[[dict[str, Any]], int | None] = lambda raw: None


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: For messages and manifests.
        task: The hub's word for what its models do.
        model_types: Values of `model_type` in ``config.json``.
        model_class: The class that `build` returns.
        sections: ``config.json -> {section: its fields}``, "" for the top; what `check_fields` judges it by.
        read_config: ``(checked config.json, where) -> config``; raises UserError for what the family does not cover.
        build: ``(config, dtype=, param_dtype=, seed=) -> model``.
        tensor_map: ``config -> {parameter path: Source}`` in the layout that export writes.
        canonical_name: A stored tensor's name in that layout, from any published one; None: skip it.
        lora_scope: First part of the paths of layers that may be adapted.
        images: Set where its models answer about images.
        projector: What `train_projector` trains, by its canonical module name.
        other_names: (canonical beginning of module names, that of another version of transformers): PEFT looks up
            those of the version that runs.
        module_root: The part of a canonical module name, by its place, that tells the decoder's layers from the
            tower's in every version of transformers.
        tower: Set where the vision tower can come from elsewhere.
        normalize: ``(config.json, where) -> config.json`` in the layout that `sections` describes.
        has_decoder: A configuration's `text` is a `DecoderConfig`.
    """

    name: str
    task: str
    model_types: tuple[str, ...]
    model_class: type
    sections: Callable[[Mapping[str, Any]], Mapping[str, Fields]]
    read_config: Callable[[dict[str, Any], str], Any]
    build: Callable[..., Any]
    tensor_map: Callable[[Any], TensorMap]
    canonical_name: Callable[[str], str | None]
    lora_scope: str = "decoder"
    images: ImageFamily | None = None
    projector: str = ""
    other_names: tuple[tuple[str, str], ...] = ()
    module_root: int = 0
    tower: Tower | None = None
    normalize: Callable[[dict[str, Any], str], dict[str, Any]] = lambda raw, where: raw
    has_decoder: bool = True

    def decoder(self, config: Any) -> DecoderConfig | None:
        """The specification of the decoder; None where there is none."""
        return config.text if self.has_decoder else None


FAMILIES = (
    Family(
        name="llava",
        task="image-text-to-text",
        model_types=("llava", "llava_llama"),
        model_class=llava.Llava,
        sections=llava_config.llava_sections,
        read_config=llava_config.llava_config,
        build=llava.build,
        tensor_map=llava_weights.tensor_map,
        canonical_name=llava_weights.canonical_name,
        images=LLAVA_IMAGES,
        projector="multi_modal_projector",
        other_names=(("multi_modal_projector", "model.multi_modal_projector"),),
        tower=Tower(
            default=llava_weights.default_tower,
            configure=llava_weights.with_tower,
            canonical_name=llava_weights.tower_name,
            prefix="vision_tower.",
            write_files=write_processor_files,
            stored_rows=llava_weights.stored_rows,
        ),
    ),
    Family(
        name="qwen2_5_vl",
        task="image-text-to-text",
        model_types=("qwen2_5_vl",),
        model_class=qwen25_vl.Qwen25VL,
        sections=qwen25_vl_config.sections_of(
            qwen25_vl_config.TOP_FIELDS, qwen25_vl_config.TEXT_FIELDS, qwen25_vl_config.TOWER_FIELDS
        ),
        read_config=qwen25_vl_config.qwen25_vl_config,
        build=qwen25_vl.build,
        tensor_map=qwen25_vl_weights.tensor_map,
        canonical_name=qwen25_vl_weights.canonical_name,
        images=QWEN25_VL_IMAGES,
        projector="visual.merger",
        other_names=(("visual", "model.visual"), ("model.layers", "model.language_model.layers")),
        module_root=1,
        normalize=qwen25_vl_config.normalized,
    ),
    Family(
        name="qwen3_vl",
        task="image-text-to-text",
        model_types=("qwen3_vl",),
        model_class=qwen3_vl.Qwen3VL,
        sections=qwen25_vl_config.sections_of(
            qwen3_vl_config.TOP_FIELDS, qwen3_vl_config.TEXT_FIELDS, qwen3_vl_config.TOWER_FIELDS
        ),
        read_config=qwen3_vl_config.qwen3_vl_config,
        build=qwen3_vl.build,
        tensor_map=qwen3_vl_weights.tensor_map,
        canonical_name=qwen3_vl_weights.canonical_name,
        images=QWEN3_VL_IMAGES,
        projector="model.visual.merger",
        module_root=2,
    ),
    Family(
        name="gemma3",
        task="image-text-to-text",
        model_types=("gemma3",),
        model_class=gemma3.Gemma3,
        sections=gemma3_config.gemma3_sections,
        read_config=gemma3_config.gemma3_config,
        build=gemma3.build,
        tensor_map=gemma3_weights.tensor_map,
        canonical_name=llava_weights.canonical_name,
        images=GEMMA3_IMAGES,
        projector="multi_modal_projector",
        other_names=(("multi_modal_projector", "model.multi_modal_projector"),),
    ),
    Family(
        name="idefics3",
        task="image-text-to-text",
        model_types=("idefics3", "smolvlm"),
        model_class=idefics3.Idefics3,
        sections=idefics3_config.idefics3_sections,
        read_config=idefics3_config.idefics3_config,
        build=idefics3.build,
        tensor_map=idefics3_weights.tensor_map,
        canonical_name=idefics3_weights.canonical_name,
        images=IDEFICS3_IMAGES,
        projector="model.connector",
        module_root=1,
    ),
    Family(
        name="causal_lm",
        task="text-generation",
        model_types=tuple(TEXT_DECODERS),
        model_class=causal_lm.CausalLM,
        sections=lambda raw: {"": TEXT_DECODERS[raw["model_type"]].fields},
        read_config=causal_lm.causal_lm_config,
        build=causal_lm.build,
        tensor_map=causal_lm_weights.tensor_map,
        canonical_name=causal_lm_weights.canonical_name,
    ),
    Family(
        name="dual_encoder",
        task="zero-shot-image-classification",
        model_types=("clip", "siglip"),
        model_class=dual_encoder.DualEncoder,
        sections=dual_encoder.dual_encoder_sections,
        read_config=dual_encoder.dual_encoder_config,
        build=dual_encoder.build,
        tensor_map=dual_encoder_weights.tensor_map,
        canonical_name=dual_encoder_weights.canonical_name,
        lora_scope="text_tower",
        normalize=dual_encoder.normalized,
        has_decoder=False,
    ),
)


def family_of(raw_config: Mapping[str, Any], where: str) -> Family:
    """The family of a ``config.json``.

    Raises:
        UserError: no family reads this `model_type`.
    """
    kind = raw_config.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    # Nothing is suggested: a model_type that reads like another one is another architecture (mllama is no llama).
    supported = "; ".join(f"{task}: {', '.join(kinds)}" for task, kinds in supported_types().items())
    raise UserError(f"model_type {shown(kind)} is not supported", where=where, remedy=f"supported are {supported}")


def supported_types() -> dict[str, list[str]]:
    """Every `model_type` that a family reads, by the hub's word for what its models do."""
    kinds: dict[str, list[str]] = {}
    for family in FAMILIES:
        kinds.setdefault(family.task, []).extend(family.model_types)
    return kinds


def family_of_model(model: nnx.Module) -> Family:
    """The family that built `model`."""
    return next(family for family in FAMILIES if isinstance(model, family.model_class))


_BUILTIN = "builtin:"


def resolve_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: a path, ``builtin:NAME`` or a Hugging Face hub id (fetched and cached).

    Args:
        weights: Of a hub id they are fetched too; else only what is read beside them.

    Raises:
        UserError: nothing is there, or the hub cannot be reached.
    """
    text = str(path)
    if not text:
        raise UserError("no model was given", where="model.path", remedy="set it to a directory or a hub id")
    if text.startswith(_BUILTIN):
        root = Path(str(resources.files("m3po_jax"))) / "quickstart" / "checkpoints"
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        name = text.removeprefix(_BUILTIN)
        if name not in names:
            raise UserError(f"no checkpoint of that name ships{nearest(name, names)}", where=text)
        return root / name
    if re.match(r"[a-z0-9]+://", text):
        raise UserError(
            "bucket paths are not read in place",
            where=text,
            remedy="mount the bucket (gcsfuse, mountpoint-s3) or copy the directory, and give the local path",
        )
    local = Path(text).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UserError("a file, not a model directory", where=text)
    if not HUB_ID.fullmatch(text):
        raise UserError("no such directory", where=text, remedy="give a model directory or a hub id like owner/name")
    return fetch(text, weights=weights)


@dataclass(frozen=True)
class Description:
    """What a model directory says, before any weight is read.

    Attributes:
        raw_config: In Hugging Face layout, also where the directory's own is not; the tower's put in.
        tower: The directory of the vision tower, if it is not `directory`.
        tower_replaces: Its weights are taken although `directory` may hold a tower itself.
        stored_rows: Rows of vocabulary on disk, where they are fewer than the configuration's; see `Tower`.
        listed: Weights that are on the hub alone are described, not read; see `describe`.
        notes: What a user should know, a line each.
    """

    family: Family
    config: Any
    raw_config: dict[str, Any]
    directory: Path
    tower: Path | None = None
    tower_replaces: bool = True
    stored_rows: int | None = None
    listed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def directories(self) -> tuple[Path, ...]:
        """All that the model is read from."""
        return (self.directory,) if self.tower is None else (self.directory, self.tower)


def describe(
    directory: str | Path, *, vision_tower: str | Path = "", weights: bool = True, download: bool = True
) -> Description:
    """Reads ``config.json`` (and the tower's, if it comes from elsewhere).

    Args:
        vision_tower: A directory whose tower replaces the model's own.
        weights: Those of the directory count: where ``config.json`` ties the output layer to the embeddings and the
            weights hold both with different values, both are kept, as transformers 5 keeps them.
        download: The weights of a hub id are fetched. Else they stay there unless they were fetched before, the
            values of an output layer are not compared, and `stored_tensors` lists what cannot be read.

    Raises:
        UserError: no such directory, no or bad ``config.json``, an unsupported model.
    """
    directory = resolve_directory(directory, weights=download)
    where = str(directory / "config.json")
    if not (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        raise UserError(
            "is a PEFT adapter, not a model",
            where=str(directory),
            remedy=f"merge it into its base, `m3po merge --adapter {directory} --output MERGED`, and name MERGED",
        )
    raw = read_json(directory / "config.json")
    family = family_of(raw, where)
    tower: Path | None = None
    rows: int | None = None
    try:
        if family.tower is not None:
            name = str(vision_tower) or family.tower.default(raw)
            if name:
                tower = _tower_directory(name, chosen=bool(vision_tower), weights=download)
            tower_raw = read_json(tower / "config.json") if tower is not None else None
            rows = family.tower.stored_rows(raw)
            raw = family.tower.configure(raw, tower_raw, where, partial(read_vocabulary, directory))
        elif vision_tower:
            raise UserError(
                f"a {family.name} model takes no vision tower", where="model.vision_tower", remedy="remove it"
            )
        raw = family.normalize(raw, where)
        notes = check_fields(family.sections(raw), raw, where)
        config = family.read_config(raw, where)
        if (
            weights
            and (download or _is_here(directory))
            and _head_differs(family.tensor_map(config), family, directory)
        ):
            raw = _untied(raw)
            config = family.read_config(raw, where)
            notes += (
                f"{where}: tie_word_embeddings is true, but the weights hold an output layer of their own, which is "
                "used as it is stored (set tie_word_embeddings to false)",
            )
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"a value has the wrong type ({error})", where=where) from None
    return Description(family, config, raw, directory, tower, bool(vision_tower), rows, not download, notes)


def _tower_directory(name: str, *, chosen: bool, weights: bool) -> Path:
    """The directory of a vision tower, which the recipe names or, where it is not `chosen`, ``config.json``."""
    try:
        return resolve_directory(name, weights=weights)
    except UserError as error:
        if chosen:
            raise
        raise UserError(
            f"config.json takes the vision tower from there: {error.what}",
            where=error.where,
            remedy="set model.vision_tower to a CLIP directory or hub id, or correct mm_vision_tower",
        ) from None


def _is_here(directory: Path) -> bool:
    """Whether a model's weights lie in its directory, and not on the hub alone."""
    if snapshot_of(directory) is None:
        return True
    try:
        return has_weights(directory)
    except UserError:  # the index names files that were not fetched
        return False


def _tensors_of(directory: Path, *, listed: bool) -> dict[str, StoredTensor]:
    """Every tensor of a directory by its name there; with `listed` what the hub says of those that it alone has."""
    snapshot = snapshot_of(directory) if listed and not _is_here(directory) else None
    return open_directory(directory) if snapshot is None else listed_tensors(snapshot)


def _head_differs(tensor_map: TensorMap, family: Family, directory: Path) -> bool:
    """Whether a tensor that the configuration calls a copy of another is stored with other values."""
    tied = [(source.name, copy) for source in tensor_map.values() for copy in source.copies]
    if not tied or not has_weights(directory):
        return False
    tensors = {family.canonical_name(tensor.name): tensor for tensor in open_directory(directory).values()}
    return any(
        name in tensors and copy in tensors and not same_values(tensors[name], tensors[copy]) for name, copy in tied
    )


def _untied(raw: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` without tied embeddings, wherever it says that they are."""
    text = raw.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**raw, **nested, "tie_word_embeddings": False}


def describe_policy(model: ModelConfig, *, download: bool = True) -> Description:
    """What a recipe's model is, without its weights; see `describe` for `download`.

    Raises:
        UserError: as `describe`; a revision of something that has none.
    """
    path, weights = pinned(model.path, model.revision), model.init == "pretrained"
    return describe(path, vision_tower=model.vision_tower, weights=weights, download=download)


@dataclass(frozen=True)
class Loaded:
    """A model and what its directory says; `pretrained` if its weights are that directory's (and its `tower`'s)."""

    model: Any
    description: Description
    config: Any  # the description's, with the attention that the model runs on
    pretrained: bool = True

    @property
    def tower(self) -> Path | None:
        """The directory of the vision tower, if it is not `directory`."""
        return self.description.tower

    @property
    def raw_config(self) -> dict[str, Any]:
        return self.description.raw_config

    @property
    def directory(self) -> Path:
        return self.description.directory

    @property
    def family(self) -> Family:
        return self.description.family


def stored_tensors(description: Description) -> dict[str, StoredTensor]:
    """Everything on disk by canonical name, checked against the configuration (names, shapes and types).

    Raises:
        UserError: see `open_directory`, `hub.listed_tensors` and `check_tensors`.
    """
    family, where = description.family, str(description.directory)
    tensors: dict[str, StoredTensor] = {}
    of_model = _tensors_of(description.directory, listed=description.listed).values()
    named = [(family.canonical_name(tensor.name), tensor) for tensor in of_model]
    sources = [(description.directory, named)]
    if description.tower is not None:
        assert family.tower is not None
        in_release = {name for name, _ in named if name is not None and name.startswith(family.tower.prefix)}
        if description.tower_replaces or not in_release:
            # A release that trained its tower holds it; what it was trained from would be another.
            sources[0] = (description.directory, [pair for pair in named if pair[0] not in in_release])
            canonical_name = family.tower.canonical_name
            of_tower = _tensors_of(description.tower, listed=description.listed).values()
            sources.append((description.tower, [(canonical_name(tensor.name), tensor) for tensor in of_tower]))
    for directory, pairs in sources:
        for name, tensor in pairs:
            if name is None:
                continue
            if name in tensors:
                raise UserError(f"{tensor.name} and {tensors[name].name} are the same tensor", where=str(directory))
            tensors[name] = tensor
    leaves = parameters(abstract_model(description), family.tensor_map(description.config))
    for leaf in leaves.values():
        for copy in leaf.source.copies:
            other = tensors.pop(copy, None)
            if other is not None and leaf.source.name is not None:
                tensors.setdefault(leaf.source.name, other)  # tied the other way round: the copy alone is stored
    check_tensors(leaves, tensors, where, stored_rows=description.stored_rows)
    return tensors


def tower_tensors(description: Description) -> dict[str, StoredTensor]:
    """The vision tower's tensors, by the canonical names of the family that borrows it."""
    assert description.tower is not None and description.family.tower is not None
    named = description.family.tower.canonical_name
    by_name = {named(tensor.name): tensor for tensor in open_directory(description.tower).values()}
    return {name: tensor for name, tensor in by_name.items() if name is not None}


def abstract_model(description: Description, *, dtype: Any = "float32", param_dtype: Any = "float32") -> nnx.Module:
    """The model's tree of shapes, types and axes, without memory."""
    build = partial(description.family.build, description.config, dtype=dtype, param_dtype=param_dtype)
    return nnx.eval_shape(build)


def load_model(
    directory: str | Path,
    *,
    dtype: Any = "bfloat16",
    param_dtype: Any = "bfloat16",
    mesh: Mesh | None = None,
    init: str = "pretrained",
    seed: int = 0,
    vision_tower: str | Path = "",
    attention: str = "xla",
    quantization: str = "none",
) -> Loaded:
    """A model from a directory, ``builtin:NAME`` or hub id, its weights streamed into their device shards.

    Args:
        dtype: Of computation.
        param_dtype: Of the parameters in memory; stored values are cast.
        mesh: None keeps everything on the first device.
        init: ``pretrained``, or ``random`` to draw weights from `seed` and read ``config.json`` alone (and
            `vision_tower`, where it is given).
        vision_tower: A CLIP directory whose tower replaces the model's own.
        attention: ``xla``, or the kernels that attention runs on, see `models/kernels`.
        quantization: ``int8`` or ``nf4``: how the language model's stacked kernels lie in memory, frozen. They are
            quantised from the stored values while these stream in.

    Raises:
        UserError: anything missing, unreadable, unknown or of another shape, in one line each.
    """
    import jax
    import jax.numpy as jnp

    check_value(ModelConfig, "init", init, "model")
    for key, name in (("dtype", dtype), ("param_dtype", param_dtype)):
        check_value(ModelConfig, key, name if isinstance(name, str) else jnp.dtype(name).name, "model")
    description = describe(directory, vision_tower=vision_tower, weights=init == "pretrained")
    family = description.family
    platform = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
    decoder = family.decoder(description.config)
    check_attention(attention, platform=platform, dtype=dtype, decoder=decoder)
    if note := attention_note(attention, decoder):
        description = dataclasses.replace(description, notes=(*description.notes, note))
    check_quantization(quantization)
    config = with_attention(description.config, attention)

    def build() -> Any:
        model = family.build(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), seed=seed)
        if quantization != "none":
            quantize_base(model, quantization, scope=family.lora_scope)
        return model

    if init == "random":
        check_memory(nnx.eval_shape(build), mesh, str(description.directory / "config.json"))
        model = initialise_parameters(build, mesh)
        if description.tower is not None:
            replace_parameters(
                model, family.tensor_map(config), tower_tensors(description), mesh, str(description.tower)
            )
    else:
        tensors = stored_tensors(description)
        model = load_parameters(nnx.eval_shape(build), family.tensor_map(config), tensors, mesh)
    return Loaded(model, description, config, init == "pretrained")
