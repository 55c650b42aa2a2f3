"""What a model sees of images, whatever its family: a few named arrays an image, packed alike for all families.

An image becomes arrays whose first axis counts the family's own units (images, tiles, patches); those of one image
are joined end to end along it with those of the row's other images, and rows are filled up with zeros, to sizes of
`image_buckets` where images differ. *Float* arrays are read from pixels, normalised, so that zero is the mean colour;
*integer* arrays (the *layout*) say how an image lies, and follow from its size alone. Two names are everybody's:
``tokens``, how many image tokens each image takes in the prompt (0 for what fills up), and ``features``, what the
vision tower makes of images, one for each image token, which stands in for all other float arrays.

In the prompt an image is one run of image tokens or several of them, with whatever text and marks its family writes
around and between them (`ImagePlan.written`); where runs are cut says nothing of how an image's features lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image as PILImage

from m3po_jax.data.image_buckets import ImageBuckets
from m3po_jax.data.templates import Marker, Piece

# Of a batch: arrays with a leading axis for rows, NumPy's on the host and JAX's in a program.
Images = dict[str, Any]
Size = Callable[[], tuple[int, int]]  # (width, height), read from the header when it is called

TOKENS, FEATURES = "tokens", "features"


class ProcessedImage(NamedTuple):
    """One image as a model takes it: its arrays, and how many image tokens it takes in the prompt."""

    tokens: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class ImagePlan:
    """What an image's size alone says.

    Attributes:
        tokens: Image tokens that it takes in the prompt, in all of its runs.
        shapes: Of the float arrays that its pixels become.
        layout: Its integer arrays.
        written: What stands for it in the prompt: texts, special tokens, and runs of so many image tokens; (): one
            run and nothing else. Texts are tokenised together with those of the template beside them.
    """

    tokens: int
    shapes: dict[str, tuple[int, ...]]
    layout: dict[str, np.ndarray] = field(default_factory=dict)
    written: tuple[Piece | int, ...] = ()

    @property
    def runs(self) -> tuple[int, ...]:
        """Image tokens of each run."""
        return tuple(part for part in self.written if isinstance(part, int)) if self.written else (self.tokens,)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is written, with one marker for each run."""
        if not self.written:
            return (Marker.IMAGE,)
        return tuple(Marker.IMAGE if isinstance(part, int) else part for part in self.written)

    def filled(self, **arrays: np.ndarray) -> ProcessedImage:
        """The image with float arrays that were read or computed elsewhere."""
        return ProcessedImage(self.tokens, {**self.layout, **arrays})

    @property
    def absent(self) -> ProcessedImage:
        """Zeros that take no memory, for an image that another host reads; the blank image, too."""
        return self.filled(**{name: np.broadcast_to(np.float32(0), shape) for name, shape in self.shapes.items()})


class ImageReader(Protocol):
    """How a family reads images; picklable, for loader processes."""

    def plan(self, size: Size) -> ImagePlan:
        """What is known before pixels are read; a family whose images all take the same does not call `size`.

        Raises:
            UserError: an image that cannot be fitted.
        """

    def read(self, image: PILImage.Image) -> dict[str, np.ndarray]:
        """The float arrays of an image, of the shapes that its plan says, float32.

        Raises:
            UserError: an image that cannot be fitted.
        """

    def key(self) -> str:
        """A hash of everything between an image's encoded bytes and its arrays."""


def layout_of(images: Mapping[str, Any] | None) -> Images:
    """The integer arrays of a batch's images."""
    return {name: x for name, x in (images or {}).items() if np.issubdtype(x.dtype, np.integer)}


def joined(images: Sequence[ProcessedImage], buckets: ImageBuckets | None = None) -> Images:
    """The arrays of one row: those of its images end to end; {} without images.

    Args:
        buckets: Sizes that the row is filled up to; None: it is not.
    """
    if not images:
        return {}
    counts = np.array([image.tokens for image in images], np.int32)
    row = {TOKENS: counts}
    for name, first in images[0].arrays.items():
        row[name] = first if len(images) == 1 else np.concatenate([image.arrays[name] for image in images])
    if buckets is None:
        return row
    tokens = int(counts.sum())
    return {name: _filled_up(x, buckets.length(len(x), tokens, len(images))) for name, x in row.items()}


def _filled_up(x: np.ndarray, length: int) -> np.ndarray:
    """An array with zeros behind it."""
    if len(x) == length:
        return x
    return np.concatenate([x, np.zeros((length - len(x), *x.shape[1:]), x.dtype)])


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> Images | None:
    """The arrays of a batch, of rows as `joined` gives them, filled up with zeros; None without images."""
    given = [row for row in rows if row]
    if not given:
        return None
    images: Images = {}
    for name, first in given[0].items():
        longest = max(len(row[name]) for row in given)
        images[name] = np.zeros((len(rows), longest, *first.shape[1:]), first.dtype)
        for place, row in enumerate(rows):
            if row:
                images[name][place, : len(row[name])] = row[name]
    return images


def spoilt(images: Images) -> Images:
    """The arrays of images that could not be read: NaN in the place of pixels and features."""
    return {name: x if np.issubdtype(x.dtype, np.integer) else np.full_like(x, np.nan) for name, x in images.items()}
