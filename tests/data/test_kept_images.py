"""Images that are kept in memory: decoded once, as long as there is room and the same picture is meant."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from m3po_jax.data.kept_images import KeptImages
from m3po_jax.data.schema import Image
from m3po_jax.errors import UserError

ROOT = Path(".")


def test_threads_that_ask_for_one_image_wait_for_it() -> None:
    kept, read = KeptImages(), list[bytes | None]()

    def slowly(image: Image) -> dict[str, np.ndarray]:
        read.append(image.bytes)
        time.sleep(0.02)
        return {"pixels": np.frombuffer(image.bytes or b"", np.uint8).copy()}

    with ThreadPoolExecutor(8) as pool:
        asked = [Image(bytes=bytes([number % 4])) for number in range(64)]
        found = list(pool.map(lambda image: kept.get(image, ROOT, 100, slowly), asked))
    assert sorted(read) == [b"\0", b"\1", b"\2", b"\3"]  # type: ignore[type-var]
    assert [int(arrays["pixels"][0]) for arrays in found] == [number % 4 for number in range(64)]
    with pytest.raises(ValueError, match="read-only"):
        found[0]["pixels"][0] = 1
    assert pickle.loads(pickle.dumps(kept)).limit == kept.limit


def test_they_take_no_more_room_than_they_may() -> None:
    kept, read = KeptImages(limit=3000), list[bytes | None]()

    def arrays(image: Image) -> dict[str, np.ndarray]:
        read.append(image.bytes)
        return {"pixels": np.zeros(1000 if image.bytes != b"huge" else 9000, np.uint8)}

    def get(data: bytes) -> None:
        kept.get(Image(bytes=data), ROOT, 100, arrays)

    for data in (b"a", b"b", b"c", b"a", b"d", b"a", b"b"):  # b is the one that nobody asked for the longest
        get(data)
    assert read == [b"a", b"b", b"c", b"d", b"b"]
    get(b"huge")
    read.clear()
    get(b"huge")
    assert read == [b"huge"] and kept._bytes == 0


def test_another_picture_in_its_place_is_read(tmp_path: Path) -> None:
    kept, path = KeptImages(), tmp_path / "a"
    path.write_bytes(b"one")

    def content(image: Image) -> dict[str, np.ndarray]:
        return {"pixels": np.frombuffer((tmp_path / str(image.path)).read_bytes(), np.uint8).copy()}

    def text() -> bytes:
        return kept.get(Image(path="a"), tmp_path, 100, content)["pixels"].tobytes()

    assert text() == b"one"
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert text() == b"two"
    calls: list[int] = []

    def refuse(image: Image) -> dict[str, np.ndarray]:
        calls.append(1)
        raise UserError("too many pixels")

    # A lower limit of pixels asks anew; what cannot be read is not kept, and every row that asks is told.
    for _ in range(2):
        with pytest.raises(UserError, match="too many pixels"):
            kept.get(Image(path="a"), tmp_path, 10, refuse)
    with pytest.raises(UserError, match="too many pixels"):
        kept.get(Image(path="gone"), tmp_path, 100, refuse)
    assert len(calls) == 3 and text() == b"two"
