"""Composed scenes: 64x64 pictures of two to five emoji, with the exact list of what they show.

Everything about a scene follows from (seed, split, index): its theme, its objects, the art chosen for each,
layout, background and noise. The art and the names are real, the scenes are composed. Only integer arithmetic
touches pixels, so that a scene has the same bytes on every platform.
"""

from __future__ import annotations

import bisect
import functools
import json
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from statistics import NormalDist

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from m3po_jax.errors import UserError, nearest
from m3po_jax.quickstart.objects import INDEX, OBJECTS, THEMES, theme_weights

SIDE = 64
MIN_SIZE, MAX_SIZE = 13, 16
OFF_THEME = 0.12
COUNT_PROBABILITY = ((2, 0.2), (3, 0.3), (4, 0.3), (5, 0.2))
NOISE_SIGMA = 12.0
# Objects stand in different cells of a loose grid, at most SPILL pixels over a cell's edge. A tiny patch transformer
# learns to see from thousands of such scenes; without the grid it needs hundreds of thousands.
CELL = 16
SPILL = 1

# The position names the random stream: append, never reorder.
SPLITS: tuple[str, ...] = ("sft", "scorer", "prompts", "validation", "test")

_THEME_NAMES = tuple(THEMES)
# A Gaussian by table look-up of random bytes: fast, and exact on every platform.
_NOISE = np.array(
    [round(NormalDist(0.0, NOISE_SIGMA).inv_cdf((level + 0.5) / 256)) for level in range(256)], dtype=np.int32
)


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it.

    Attributes:
        image: RGB pixels.
        objects: What it shows, each once, in the order of `objects.OBJECTS`.
        theme: The theme that most of the objects were drawn from.
    """

    image: UInt8[np.ndarray, "64 64 3"]
    objects: tuple[str, ...]
    theme: str


@dataclass(frozen=True)
class Artwork:
    """One piece of art: the class it stands for, and its pixels cropped to what is visible."""

    name: str
    object: str
    art: Image.Image


def stream(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The random stream of one scene; `purpose` separates pixels (0) from texts about them (1 and up).

    Raises:
        UserError: for an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}", where="quickstart scenes")
    if index < 0 or seed < 0:
        raise UserError(f"seed {seed} and index {index} must not be negative", where="quickstart scenes")
    return np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), index, purpose]))


@functools.cache
def pictures() -> dict[str, tuple[Artwork, ...]]:
    """The art of every object, read once from the package."""
    folder = resources.files("m3po_jax.quickstart") / "assets" / "emoji"
    by_object: dict[str, list[Artwork]] = {name: [] for name in OBJECTS}
    for entry in json.loads((folder / "index.json").read_text(encoding="utf-8")):
        with (folder / entry["file"]).open("rb") as file, Image.open(file) as opened:
            art = opened.convert("RGBA").crop(tuple(entry["bbox"]))
        by_object[entry["object"]].append(Artwork(entry["name"], entry["object"], art))
    return {name: tuple(art) for name, art in by_object.items()}


@functools.cache
def _sprite(
    name: str, variant: int, size: int, flip: bool
) -> tuple[Int32[np.ndarray, "h w 3"], Int32[np.ndarray, "h w 1"]]:
    """Art scaled so that its longer side has `size` pixels: colour times alpha, and 255 − alpha."""
    art = pictures()[name][variant].art
    scale = size / max(art.size)
    art = art.resize((max(1, round(art.width * scale)), max(1, round(art.height * scale))), Image.Resampling.BOX)
    if flip:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(art, dtype=np.int32)
    alpha = pixels[..., 3:]
    return pixels[..., :3] * alpha, 255 - alpha


@functools.cache
def _cumulative(theme: str) -> tuple[tuple[str, ...], list[float]]:
    weights = theme_weights(theme)
    return tuple(weights), list(accumulate(weights.values()))


def _draw_objects(rng: np.random.Generator) -> tuple[str, list[str]]:
    """A theme and two to five different objects: by theme weight, some from anywhere."""
    theme = _THEME_NAMES[int(rng.integers(len(_THEME_NAMES)))]
    position = rng.random()
    count = COUNT_PROBABILITY[-1][0]
    for value, probability in COUNT_PROBABILITY:
        if position < probability:
            count = value
            break
        position -= probability
    names, cumulative = _cumulative(theme)
    drawn: list[str] = []
    while len(drawn) < count:
        off_theme, where = rng.random(2)
        if off_theme < OFF_THEME:
            name = OBJECTS[int(where * len(OBJECTS))]
        else:
            name = names[min(bisect.bisect_right(cumulative, where), len(names) - 1)]
        if name not in drawn:
            drawn.append(name)
    return theme, drawn


def _place(rng: np.random.Generator, height: int, width: int, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """Top and left of an object in a free cell, which is added to `taken`."""
    across = SIDE // CELL
    free = [divmod(cell, across) for cell in range(across * across) if divmod(cell, across) not in taken]
    row, column = free[int(rng.integers(len(free)))]
    taken.add((row, column))

    def offset(cell: int, size: int) -> int:
        low = max(cell * CELL - SPILL, 0)
        high = min((cell + 1) * CELL + SPILL, SIDE) - size
        return int(rng.integers(low, high + 1))

    return offset(row, height), offset(column, width)


def _background(rng: np.random.Generator) -> Int32[np.ndarray, "64 64 3"]:
    """A gradient between two colours along a random direction through the corners or sides."""
    first, last = rng.integers(70, 226, size=(2, 3), dtype=np.int32)
    down, across = (int(value) for value in rng.integers(-4, 5, size=2))
    rows, columns = np.arange(SIDE, dtype=np.int32)[:, None], np.arange(SIDE, dtype=np.int32)[None, :]
    ramp = rows * down + columns * across
    ramp = ramp - ramp.min()
    span = max(int(ramp.max()), 1)
    return first + (last - first) * ramp[..., None] // span


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene number `index` of a split; the same arguments always give the same scene.

    Raises:
        UserError: for an unknown split or a negative seed or index.
    """
    rng = stream(seed, split, index)
    theme, drawn = _draw_objects(rng)
    canvas = np.ascontiguousarray(_background(rng))
    taken: set[tuple[int, int]] = set()
    for name in drawn:
        variant, size, flip = (
            int(rng.integers(len(pictures()[name]))),
            int(rng.integers(MIN_SIZE, MAX_SIZE + 1)),
            bool(rng.integers(2)),
        )
        colour, transparency = _sprite(name, variant, size, flip)
        height, width = colour.shape[:2]
        top, left = _place(rng, height, width, taken)
        region = canvas[top : top + height, left : left + width]
        region[...] = (colour + region * transparency + 127) // 255
    canvas += _NOISE[np.frombuffer(rng.bytes(canvas.size), dtype=np.uint8)].reshape(canvas.shape)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(sorted(drawn, key=INDEX.__getitem__)), theme)
