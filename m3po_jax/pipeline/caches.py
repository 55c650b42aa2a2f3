"""Caches on disk that stages and runs share: features of a frozen vision tower, log-probs of a reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m3po_jax.config import CacheConfig, TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.feature_cache import FeatureCache, PromptFeatures
from m3po_jax.data.model_images import Images, ProcessedImage, joined, stacked
from m3po_jax.data.padding import bucket, pad_rows
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.hosts.agreement import barrier, gathered, load_shared
from m3po_jax.hosts.rows import own_rows
from m3po_jax.hosts.sharding import shard_batch, to_host, use_mesh
from m3po_jax.models.forward import VISION_TOWER
from m3po_jax.models.image_family import ImageFamily
from m3po_jax.models.processor import Processor
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.models import Policy
from m3po_jax.training.reference import ReferenceCache, with_cached_reference

IMAGES_AT_ONCE = 16
_tower_identities: dict[str, str] = {}


def cache_folder(setting: str, output_dir: str, name: str) -> Path | None:
    """The folder that a setting of `cache` names; None where it is off.

    ``auto`` is beside the runs, not in one: the next run of the same model and images finds it.
    """
    if setting == "off":
        return None
    return Path(output_dir) / "cache" / name if setting == "auto" else Path(setting)


def tower_identity(model: Any, images: ImageFamily) -> str:
    """A hash of the tower's weights and of what it hands over: an exported or continued model keeps its cache."""
    state = nnx.to_flat_state(nnx.state(model)[VISION_TOWER])
    leaves = [(".".join(map(str, path)), to_host(value[...])) for path, value in state]
    return content_hash(
        repr(images.feature_settings(model.config)),
        str(jnp.dtype(model.decoder.dtype)),
        *(part for name, array in leaves for part in (name, str(array.dtype), np.ascontiguousarray(array).tobytes())),
    )


@functools.partial(jax.jit, static_argnums=0)
def image_features(graph: nnx.GraphDef, state: nnx.State, images: Images) -> Float[Array, "b f v"]:
    """The tower's features; a program of this module, so that every stage and run of one architecture shares it."""
    return nnx.merge(graph, state).encode_images(images)


def vision_folder(cache: CacheConfig, train: TrainConfig, output_dir: str) -> Path | None:
    """Where a recipe keeps the features of its tower; None where the cache is off or the tower learns."""
    learns = objective_of(train).tower_learns
    return None if learns else cache_folder(cache.vision_features, output_dir, "vision")


def vision_features(folder: Path | None, policy: Policy, processor: Processor, mesh: Mesh) -> PromptFeatures | None:
    """Features of the policy's tower, cached in a folder; None without a folder or a tower."""
    model, family = policy.model, policy.loaded.family.images
    if folder is None or family is None:
        return None
    if policy.identity not in _tower_identities:
        _tower_identities[policy.identity] = tower_identity(model, family)
    identity = content_hash(_tower_identities[policy.identity], processor.image_reader.key())
    graph, state = nnx.split(model)

    at_once = bucket(IMAGES_AT_ONCE, mesh.shape["data"] * mesh.shape["fsdp"])

    def encode(images: Sequence[ProcessedImage]) -> list[np.ndarray]:
        """Features of any number of images; always `at_once` at a time, so that few programs are compiled."""
        done: list[np.ndarray] = []
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            rows = stacked([joined([image], processor.image_buckets) for image in part])
            padded = jax.tree.map(lambda x: pad_rows(x, at_once), rows)
            with use_mesh(mesh):
                features = to_host(image_features(graph, state, shard_batch(padded, mesh)))
            done += [row[: image.tokens] for image, row in zip(part, features, strict=False)]
        return done

    cache = FeatureCache(folder, identity, width=family.feature_width(model.config), dtype=model.decoder.dtype)
    return PromptFeatures(
        cache,
        image_keys=processor.image_keys,
        plans=processor.image_plans,
        images=processor.images,
        encode=encode,
        own_rows=own_rows(at_once, mesh),
        together=jax.process_count() > 1,
    )


def fill(features: PromptFeatures, prompts: Sequence[Prompt]) -> int:
    """Computes and stores what is missing for `prompts`, and returns for how many images; says what it holds.

    On several hosts each reads the images of its own devices' rows; all get the features, and each stores what its
    own disk lacks.

    Raises:
        UserError: an image that cannot be read, on all hosts; the features of the groups before it are stored.
    """
    missing = list(features.missing(prompts)) if jax.process_count() == 1 else _missing_anywhere(prompts, features)
    for start in range(0, len(missing), len(features.own_rows)):
        part = missing[start : start + len(features.own_rows)]

        def read(row: int, part: Sequence[tuple[int, int, str]] = part) -> ProcessedImage:
            number, place, _ = part[row]
            return features.images(prompts[number])[place]

        def absent(row: int, part: Sequence[tuple[int, int, str]] = part) -> ProcessedImage:
            number, place, _ = part[row]
            return features.plans(prompts[number])[place].absent

        shown = load_shared(read, absent, features.own_rows[: len(part)])
        for (_, _, key), image, encoded in zip(part, shown, features.encode(shown), strict=True):
            if not features.cache.has(key, image.tokens):
                features.cache.put(key, encoded)
    barrier("vision features are stored")
    images, size = features.cache.size()
    say(f"vision features: {len(missing)} images computed; {images} in {features.cache.folder}, {size / 1e6:.1f} MB")
    return len(missing)


def _missing_anywhere(prompts: Sequence[Prompt], features: PromptFeatures) -> list[tuple[int, int, str]]:
    """As `PromptFeatures.missing`: what any process misses; each hashes the images of its share of prompts."""
    own_prompts = np.arange(len(prompts)) % jax.process_count() == jax.process_index()

    def hashed(number: int) -> list[str]:
        return features.image_keys(prompts[number]) if prompts[number].images else []

    keys = load_shared(hashed, lambda _: [], own_prompts)
    rows = [(number, place, key) for number, of_prompt in enumerate(keys) for place, key in enumerate(of_prompt)]
    # Every process's rows, padded to the longest list: number, place and the bytes of the key.
    size = int(np.max(gathered(np.int32(len(rows)))))
    if size == 0:
        return []
    heads, hashes = np.full((size, 2), -1, np.int32), np.zeros((size, 32), np.uint8)
    for row, (number, place, key) in enumerate(rows):
        heads[row], hashes[row] = (number, place), np.frombuffer(bytes.fromhex(key), np.uint8)
    everywhere = zip(*(gathered(part).reshape(-1, part.shape[-1]) for part in (heads, hashes)), strict=True)
    places: dict[str, tuple[int, int]] = {}
    for first, second, key in sorted((*head.tolist(), digest.tobytes().hex()) for head, digest in everywhere):
        if first >= 0:
            places.setdefault(key, (first, second))
    plans = [features.plans(prompts[number])[place] for number, place in places.values()]
    absent = np.array(
        [not features.cache.has(key, plan.tokens) for key, plan in zip(places, plans, strict=True)], bool
    )
    absent = np.any(gathered(absent), axis=0)
    return [(*place, key) for (key, place), flag in zip(places.items(), absent, strict=True) if flag]


def cached_reference(
    folder: Path | None, config: TrainConfig, batches: BatchSource, model: Any, identity: str, mesh: Mesh
) -> BatchSource | None:
    """The batches with the computed reference's sums, from the cache as far as it has them; None where it is off.

    Args:
        folder: Of the cache, see `cache_folder`.
        model: The reference model, and
        identity: a hash of its weights, template and dtype.
    """
    if folder is None or not objective_of(config).computes_reference:
        return None
    cache = ReferenceCache(folder, identity)
    rows = max(1, config.batch_size // config.gradient_accumulation_steps)
    filled, computed = with_cached_reference(batches, model, mesh, cache, rows_at_once=rows)
    barrier("reference log-probs are stored")
    say(
        f"reference log-probs: {computed} of {len(batches.ids)} rows computed; "
        f"{cache.folder}, {cache.size() / 1e6:.1f} MB"
    )
    return filled
