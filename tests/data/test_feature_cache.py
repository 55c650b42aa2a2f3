"""The cache of vision features: what is stored comes back, whatever happens to the files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.data.feature_cache import FeatureCache, PromptFeatures
from m3po_jax.data.model_images import ImagePlan, ProcessedImage
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError

SHAPE = (3, 5)
PLAN = ImagePlan(3, {"pixels": (1,)})
KEYS = [content_hash(i) for i in range(6)]


def cache(folder: Path, dtype: Any = np.float32) -> FeatureCache:
    return FeatureCache(folder, "tower", width=SHAPE[1], dtype=dtype)


def features(seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_bit_comes_back(tmp_path: Path, dtype: Any) -> None:
    store = cache(tmp_path, dtype)
    assert not store.has(KEYS[0], 3) and store.get(KEYS[0], 3) is None
    store.put(KEYS[0], features(0, dtype))
    again = cache(tmp_path, dtype)
    assert again.has(KEYS[0], 3)
    found = again.get(KEYS[0], 3)
    assert found is not None and found.dtype == dtype and found.tobytes() == features(0, dtype).tobytes()
    images, size = again.size()
    assert images == 1 and size == next(tmp_path.rglob("*.npy")).stat().st_size
    # Another tower, preprocessing or dtype has another identity, and finds nothing.
    assert FeatureCache(tmp_path, "other", width=SHAPE[1], dtype=dtype).get(KEYS[0], 3) is None


@given(st.data())
def test_a_damaged_file_counts_as_none(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, or with any bit of the features or the checksum turned over."""
    store = cache(tmp_path_factory.mktemp("cache"))
    store.put(KEYS[1], features(1))
    path = store.path(KEYS[1])
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1), "length")])
    else:
        payload = features(1).nbytes + 4
        bit = data.draw(st.integers(0, 8 * payload - 1), "bit")
        content[len(content) - payload + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    assert store.get(KEYS[1], 3) is None and store.corrupt == 1
    assert not path.exists()
    store.put(KEYS[1], features(1))
    np.testing.assert_array_equal(store.get(KEYS[1], 3), features(1))


def test_a_foreign_file_is_not_taken(tmp_path: Path) -> None:
    store = cache(tmp_path)
    store.path(KEYS[2]).parent.mkdir(parents=True)
    np.save(store.path(KEYS[2]), np.array([{"pickled": 1}], dtype=object), allow_pickle=True)
    assert store.get(KEYS[2], 3) is None
    with pytest.raises(ValueError, match="shape"):
        store.put(KEYS[2], np.zeros((3, 4)))


def _fill(folder: str, rounds: int) -> int:
    store, wrong = cache(Path(folder)), 0
    for _ in range(rounds):
        for number, key in enumerate(KEYS):
            found = store.get(key, 3)
            if found is None:
                store.put(key, features(number))
            elif found.tobytes() != features(number).tobytes():
                wrong += 1
    return wrong + store.corrupt


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Several writers and readers at once: nothing torn is ever seen."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_fill, [(str(tmp_path), 40)] * 3) == [0, 0, 0]
    assert cache(tmp_path).size()[0] == len(KEYS)
    assert not list(tmp_path.rglob("*.tmp"))


class Encoder:
    """Counts what it computes; an image's only pixel is the seed of its features."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Sequence[ProcessedImage]) -> list[np.ndarray]:
        self.images += len(images)
        return [features(int(image.arrays["pixels"][0])) for image in images]


def prompt_features(folder: Path, *, together: bool = False) -> tuple[PromptFeatures, Encoder]:
    encode = Encoder()
    made = PromptFeatures(
        cache(folder),
        image_keys=lambda prompt: [content_hash(image.path) for image in prompt.images],
        plans=lambda prompt: [PLAN for _ in prompt.images],
        images=lambda prompt: [PLAN.filled(pixels=np.array([float(image.path)])) for image in prompt.images],
        encode=encode,
        together=together,
    )
    return made, encode


def assert_features(images: Sequence[ProcessedImage], *seeds: int) -> None:
    assert [image.tokens for image in images] == [3] * len(seeds)
    for image, seed in zip(images, seeds, strict=True):
        np.testing.assert_array_equal(image.arrays["features"], features(seed))


def test_prompts_with_any_number_of_images(tmp_path: Path) -> None:
    prompts = [Prompt("a", (Image(path="1"), Image(path="2")), "x"), Prompt("b", (), "x")]
    prompts.append(Prompt("c", (Image(path="2"),), "x"))
    made, encode = prompt_features(tmp_path)
    assert [(number, place) for number, place, _ in made.missing(prompts)] == [(0, 0), (0, 1)]  # each image once
    assert_features(made(prompts[0]), 1, 2)
    assert made(prompts[1]) == ()
    assert_features(made(prompts[2]), 2)
    assert encode.images == 2 and not list(made.missing(prompts))
    again, encode = prompt_features(tmp_path)
    again.cache.path(content_hash("1")).write_bytes(b"damaged")
    assert_features(again(prompts[0]), 1, 2)
    assert encode.images == 2 and again.cache.corrupt == 1  # the prompt's images once more, then never again
    assert_features(again(prompts[0]), 1, 2)
    assert encode.images == 2


def test_one_of_several_processes_computes_nothing_alone(tmp_path: Path) -> None:
    made, encode = prompt_features(tmp_path, together=True)
    with pytest.raises(UserError, match=r"damaged.*the same command continues"):
        made(Prompt("a", (Image(path="1"),), "x"))
    assert encode.images == 0
