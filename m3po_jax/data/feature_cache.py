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

from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import atomic_write
from m3po_jax.errors import UserError

_CRC_BYTES = 4


class FeatureCache:
    """Features [n, v] of single images under one folder per (tower, preprocessing, dtype).

    Args:
        folder: Shared by towers; this cache's files are in ``folder/identity[:16]/``.
        identity: A hash of the tower's weights, the preprocessing and the dtype.
        shape: (n, v).
        dtype: Of the features; bfloat16 is stored as its bits.
    """

    def __init__(self, folder: str | Path, identity: str, *, shape: tuple[int, int], dtype: Any):
        self.folder = Path(folder) / identity[:16]
        self.shape, self.dtype = shape, np.dtype(dtype)
        # NumPy's format has no bfloat16.
        self.stored = self.dtype if self.dtype.kind == "f" else np.dtype(f"u{self.dtype.itemsize}")
        self.corrupt = 0

    def path(self, key: str) -> Path:
        """Where the image with the content hash `key` is; 256 folders keep each of them short."""
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def __contains__(self, key: str) -> bool:
        """Whether there is a file of the right size; its bytes are checked when they are read."""
        try:
            return self.path(key).stat().st_size > int(np.prod(self.shape)) * self.stored.itemsize + _CRC_BYTES
        except OSError:
            return False

    def get(self, key: str) -> Float[np.ndarray, "n v"] | None:
        """The features, or None where there are none; a damaged file is removed and counts as none."""
        path = self.path(key)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            with path.open("rb") as file:
                file.seek(-_CRC_BYTES, 2)
                crc = int.from_bytes(file.read(), "little")
            if array.shape == self.shape and array.dtype == self.stored and zlib.crc32(array.data) == crc:
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
        if array.shape != self.shape:
            raise ValueError(f"features of shape {array.shape}, not {self.shape}")
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
        pixels: Prompt -> its images' pixels [m, H, W, 3].
        encode: Pixels of images [H, W, 3] -> features [i, n, v]. All processes must call it together; None stands
            for an image that another of them reads.
        own: Which images of a group this process reads, where the processes share them out.
        together: Several processes take part: what only one of them finds missing cannot be computed by it alone.
    """

    def __init__(
        self,
        cache: FeatureCache,
        *,
        image_keys: Callable[[Prompt], list[str]],
        pixels: Callable[[Prompt], np.ndarray],
        encode: Callable[[Sequence[np.ndarray | None] | np.ndarray], np.ndarray],
        blank: Float[np.ndarray, "1 n v"],
        own: Bool[np.ndarray, " i"] | None = None,
        together: bool = False,
    ):
        self.cache, self.image_keys, self.pixels, self.encode = cache, image_keys, pixels, encode
        self.blank, self.together = blank, together
        self.own = np.ones(1, bool) if own is None else own

    def missing(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int, str]]:
        """(prompt, image in it, key) of every image that is not stored, each key once."""
        seen: set[str] = set()
        for number, prompt in enumerate(prompts):
            for place, key in enumerate(self.image_keys(prompt) if prompt.images else ()):
                if key not in seen and key not in self.cache:
                    yield number, place, key
                seen.add(key)

    def absent(self, prompt: Prompt) -> Float[np.ndarray, "m n v"]:
        """Zeros that take no memory, where another host needs the features of the prompt's images."""
        return np.broadcast_to(np.zeros((), self.cache.dtype), (len(prompt.images), *self.cache.shape))

    def __call__(self, prompt: Prompt) -> Float[np.ndarray, "m n v"] | None:
        """The features of a prompt's images; None without images.

        Raises:
            UserError: a file went bad under a run of several processes.
        """
        if not prompt.images:
            return None
        keys = self.image_keys(prompt)
        found = [self.cache.get(key) for key in keys]
        if any(features is None for features in found):
            if self.together:
                raise UserError(
                    "a cached vision feature was damaged and is removed",
                    where=str(self.cache.folder),
                    remedy="the same command continues and computes it again",
                )
            made = self.encode(self.pixels(prompt))
            for place, key in enumerate(keys):
                if found[place] is None:
                    self.cache.put(key, made[place])
                    found[place] = np.asarray(made[place], self.cache.dtype)
        return np.stack([np.asarray(features) for features in found])
