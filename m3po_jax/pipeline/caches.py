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

from m3po_jax.config import Recipe
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.feature_cache import FeatureCache, PromptFeatures
from m3po_jax.data.processing import Processor
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.models import Policy
from m3po_jax.pipeline.stopping import barrier
from m3po_jax.sharding import shard_batch, to_host, use_mesh
from m3po_jax.training.losses import tower_learns
from m3po_jax.training.reference import ReferenceCache, with_cached_reference

IMAGES_AT_ONCE = 16
_tower_identities: dict[str, str] = {}


def cache_folder(setting: str, recipe: Recipe, name: str) -> Path | None:
    """The folder that a setting of `cache` names; None where it is off.

    ``auto`` is beside the runs, not in one: the next run of the same model and images finds it.
    """
    if setting == "off":
        return None
    return Path(recipe.output_dir) / "cache" / name if setting == "auto" else Path(setting)


def tower_identity(model: Any) -> str:
    """A hash of the tower's weights and of what it hands over: an exported or continued model keeps its cache."""
    state = nnx.to_flat_state(nnx.state(model.vision_tower))
    leaves = [(".".join(map(str, path)), to_host(value[...])) for path, value in state]
    config = model.config
    return content_hash(
        repr((config.vision, config.vision_feature_layers, config.keep_class_token)),
        str(jnp.dtype(model.vision_tower.dtype)),
        *(part for name, array in leaves for part in (name, str(array.dtype), np.ascontiguousarray(array).tobytes())),
    )


@functools.partial(jax.jit, static_argnums=0)
def image_features(
    graph: nnx.GraphDef, state: nnx.State, pixels: Float[Array, "images height width 3"]
) -> Float[Array, "images tokens features"]:
    """The tower's features; a program of this module, so that every stage and run of one architecture shares it."""
    return nnx.merge(graph, state).image_features(pixels)


def vision_features(recipe: Recipe, policy: Policy, processor: Processor, mesh: Mesh) -> PromptFeatures | None:
    """Cached features of the policy's tower; None where the cache is off or the tower learns."""
    folder = cache_folder(recipe.cache.vision_features, recipe, "vision")
    model = policy.model
    if folder is None or tower_learns(recipe.train) or not hasattr(model, "vision_tower"):
        return None
    if policy.identity not in _tower_identities:
        _tower_identities[policy.identity] = tower_identity(model)
    identity = content_hash(_tower_identities[policy.identity], processor.preprocessing_key())
    graph, state = nnx.split(model)

    def encode(pixels: np.ndarray) -> np.ndarray:
        """Features of any number of images; always `IMAGES_AT_ONCE` at a time, so that one program is compiled."""
        done = []
        for start in range(0, len(pixels), IMAGES_AT_ONCE):
            part = pixels[start : start + IMAGES_AT_ONCE]
            padded = np.zeros((IMAGES_AT_ONCE, *part.shape[1:]), np.float32)
            padded[: len(part)] = part
            with use_mesh(mesh):
                done.append(to_host(image_features(graph, state, shard_batch(padded, mesh)))[: len(part)])
        return np.concatenate(done)

    size = (processor.image_processor.height, processor.image_processor.width)
    blank = encode(np.zeros((1, *size, 3), np.float32))
    cache = FeatureCache(folder, identity, shape=blank.shape[1:], dtype=blank.dtype)
    return PromptFeatures(
        cache,
        image_keys=processor.image_keys,
        pixels=processor.pixel_values,
        encode=encode,
        blank=blank,
        together=jax.process_count() > 1,
    )


def fill(features: PromptFeatures, prompts: Sequence[Prompt]) -> int:
    """Computes and stores what is missing for `prompts`, and returns for how many images; says what it holds.

    On several hosts all of them compute together, and each stores what its own disk lacks.
    """
    missing = list(features.missing(prompts))
    if jax.process_count() > 1:
        missing = _of_any_process(missing, prompts, features)
    for start in range(0, len(missing), IMAGES_AT_ONCE):
        part = missing[start : start + IMAGES_AT_ONCE]
        pixels = np.stack([features.pixels(prompts[number])[place] for number, place, _ in part])
        for (_, _, key), made in zip(part, features.encode(pixels), strict=True):
            if key not in features.cache:
                features.cache.put(key, made)
    barrier("vision features are stored")
    images, size = features.cache.size()
    say(f"vision features: {len(missing)} images computed; {images} in {features.cache.folder}, {size / 1e6:.1f} MB")
    return len(missing)


def _of_any_process(
    mine: list[tuple[int, int, str]], prompts: Sequence[Prompt], features: PromptFeatures
) -> list[tuple[int, int, str]]:
    """What at least one process misses, in the same order everywhere."""
    from jax.experimental import multihost_utils

    places = [(number, place) for number, prompt in enumerate(prompts) for place in range(len(prompt.images))]
    wanted = {(number, place) for number, place, _ in mine}
    flags = multihost_utils.process_allgather(np.array([place in wanted for place in places], bool))
    chosen = [place for place, flag in zip(places, np.any(flags, axis=0), strict=True) if flag]
    keys = {number: features.image_keys(prompts[number]) for number, _ in chosen}
    return [(number, place, keys[number][place]) for number, place in chosen]


def cached_reference(
    recipe: Recipe, batches: BatchSource, model: Any, identity: str, mesh: Mesh
) -> BatchSource | None:
    """The batches with the computed reference's sums, from the cache as far as it has them; None where it is off.

    Args:
        model: The reference model, and
        identity: a hash of its weights, template and dtype.
    """
    folder = cache_folder(recipe.cache.reference, recipe, "reference")
    config = recipe.train
    if folder is None or config.objective != "preference" or config.reference != "computed":
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
