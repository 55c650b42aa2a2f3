"""What a frozen vision tower makes of an image, kept on disk under a hash of its content.

One file an image: an array in NumPy's format, memory-mapped when it is read, and the CRC of its bytes behind it.
Files appear whole (`tables.atomic_write`) and never change, so any number of processes and runs may share a folder
without a lock: two that miss the same image write the same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from m3po_jax.data.model_images import FEATURES, ImagePlan, ProcessedImage
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError

_CRC_BYTES = 4


class FeatureCache:
    """Features [n, v] of single images, one for each image token, under one folder per (tower, preprocessing, dtype).

    Args:
        folder: Shared by towers; this cache's files are in ``folder/identity[:16]/``.
        identity: A hash of the tower's weights, the preprocessing and the dtype.
        width: v.
        dtype: Of the features; bfloat16 is stored as its bits.
    """

    def __init__(self, folder: str | Path, identity: str, *, width: int, dtype: Any):
        self.folder = Path(folder) / identity[:16]
        self.width, self.dtype = width, np.dtype(dtype)
        # NumPy's format has no bfloat16.
        self.stored = self.dtype if self.dtype.kind == "f" else np.dtype(f"u{self.dtype.itemsize}")
        self.corrupt = 0

    def path(self, key: str) -> Path:
        """Where the image with the content hash `key` is; 256 folders keep each of them short."""
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def has(self, key: str, tokens: int) -> bool:
        """Whether there is a file of the right size; its bytes are checked when they are read."""
        try:
            return self.path(key).stat().st_size > tokens * self.width * self.stored.itemsize + _CRC_BYTES
        except OSError:
            return False

    def get(self, key: str, tokens: int) -> Float[np.ndarray, "n v"] | None:
        """The features of an image of so many tokens; None where there are none: a damaged file is removed first."""
        path = self.path(key)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            with path.open("rb") as file:
                file.seek(-_CRC_BYTES, 2)
                crc = int.from_bytes(file.read(), "little")
            if array.shape == (tokens, self.width) and array.dtype == self.stored and zlib.crc32(array.data) == crc:
                return array.view(self.dtype)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            pass
        self.corrupt += 1
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, features: Float[np.ndarray, "n v"]) -> None:
        array = np.ascontiguousarray(features, self.dtype).view(self.stored)
        if array.ndim != 2 or array.shape[1] != self.width:
            raise ValueError(f"features of shape {array.shape}, and they are {self.width} wide")
        with atomic_write(self.path(key)) as file:
            np.save(file, array, allow_pickle=False)
            file.write(zlib.crc32(array.data).to_bytes(_CRC_BYTES, "little"))

    def size(self) -> tuple[int, int]:
        """(images, bytes) on disk."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*.npy")]
        return len(sizes), sum(sizes)


class PromptFeatures:
    """Features of prompts' images, from a cache, or computed and stored where they are missing.

    Args:
        image_keys: Prompt -> content hashes of its images.
        plans: Prompt -> what the sizes of its images say.
        images: Prompt -> its images.
        encode: Images -> the features [n, v] of each. All processes must call it together; images that another of
            them reads are absent ones.
        own_rows: Which images of a group this process reads, where the processes share them out.
        together: Several processes take part: what only one of them finds missing cannot be computed by it alone.
    """

    def __init__(
        self,
        cache: FeatureCache,
        *,
        image_keys: Callable[[Prompt], list[str]],
        plans: Callable[[Prompt], list[ImagePlan]],
        images: Callable[[Prompt], Sequence[ProcessedImage]],
        encode: Callable[[Sequence[ProcessedImage]], Sequence[np.ndarray]],
        own_rows: Bool[np.ndarray, " i"] | None = None,
        together: bool = False,
    ):
        self.cache, self.image_keys, self.encode = cache, image_keys, encode
        self.plans, self.images, self.together = plans, images, together
        self.own_rows = np.ones(1, bool) if own_rows is None else own_rows

    def missing(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int, str]]:
        """(prompt, image in it, key) of every image that is not stored, each key once."""
        asked: set[str] = set()
        for number, prompt in enumerate(prompts):
            if not prompt.images:
                continue
            for place, (key, plan) in enumerate(zip(self.image_keys(prompt), self.plans(prompt), strict=True)):
                if key not in asked and not self.cache.has(key, plan.tokens):
                    yield number, place, key
                asked.add(key)

    def absent(self, prompt: Prompt) -> tuple[ProcessedImage, ...]:
        """Zeros that take no memory, where another host needs the features of the prompt's images."""
        zero = np.zeros((), self.cache.dtype)
        return tuple(
            plan.filled(**{FEATURES: np.broadcast_to(zero, (plan.tokens, self.cache.width))})
            for plan in self.plans(prompt)
        )

    def __call__(self, prompt: Prompt) -> tuple[ProcessedImage, ...]:
        """A prompt's images, with features in place of pixels.

        Raises:
            UserError: a file went bad under a run of several processes.
        """
        if not prompt.images:
            return ()
        keys, plans = self.image_keys(prompt), self.plans(prompt)
        stored = [self.cache.get(key, plan.tokens) for key, plan in zip(keys, plans, strict=True)]
        if any(features is None for features in stored):
            if self.together:
                raise UserError(
                    "a cached vision feature was damaged and is removed",
                    where=str(self.cache.folder),
                    remedy="the same command continues and computes it again",
                )
            computed = self.encode(self.images(prompt))
            for place, key in enumerate(keys):
                if stored[place] is None:
                    self.cache.put(key, computed[place])
                    stored[place] = np.asarray(computed[place], self.cache.dtype)
        return tuple(
            plan.filled(**{FEATURES: np.asarray(features)}) for plan, features in zip(plans, stored, strict=True)
        )
