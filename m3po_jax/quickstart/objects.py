"""Which objects a composed scene may hold, and which of them go together.

The names are COCO classes. The themes are written by hand after COCO's co-occurrence: a few objects dominate
a theme, as persons and cars dominate streets, and some belong to several. This is the language prior that a
model can lean on instead of looking.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np
from jaxtyping import Float

# Captions name objects in this order (COCO's category order).
OBJECTS: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("stop sign", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("backpack", "umbrella", "handbag", "suitcase", "sports ball", "kite", "skateboard"),
    *("bottle", "wine glass", "cup", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange"),
    *("broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "tv"),
    *("laptop", "mouse", "keyboard", "cell phone", "book", "clock", "scissors", "teddy bear"),
)
INDEX: dict[str, int] = {name: position for position, name in enumerate(OBJECTS)}

# Most frequent first: an object's weight in its theme is rank^-0.6.
THEMES: dict[str, tuple[str, ...]] = {
    "kitchen": (
        *("bowl", "knife", "spoon", "cup", "bottle", "carrot", "apple", "broccoli", "banana", "orange"),
        *("potted plant", "clock"),
    ),
    "restaurant": (
        *("pizza", "wine glass", "cup", "person", "sandwich", "cake", "bottle", "hot dog", "donut", "chair"),
        *("cell phone", "handbag"),
    ),
    "street": (
        *("car", "person", "traffic light", "bus", "truck", "bicycle", "motorcycle", "stop sign", "umbrella"),
        *("handbag", "dog", "clock"),
    ),
    "farm": ("horse", "cow", "sheep", "dog", "bird", "person", "truck", "cat", "apple"),
    "safari": ("elephant", "giraffe", "zebra", "bird", "bear", "person", "truck", "backpack"),
    "living room": (
        *(
            "couch",
            "tv",
            "chair",
            "cat",
            "book",
            "potted plant",
            "clock",
            "dog",
            "teddy bear",
            "laptop",
            "cup",
        ),
    ),
    "office": (
        *(
            "laptop",
            "keyboard",
            "mouse",
            "cell phone",
            "book",
            "chair",
            "cup",
            "scissors",
            "clock",
            "backpack",
        ),
        *("potted plant",),
    ),
    "sports": (
        *(
            "person",
            "sports ball",
            "skateboard",
            "kite",
            "bicycle",
            "backpack",
            "dog",
            "bottle",
            "bird",
            "car",
        ),
        *("banana",),
    ),
    "travel": (
        *("suitcase", "airplane", "person", "train", "backpack", "handbag", "boat", "umbrella", "bus"),
        *("cell phone", "teddy bear", "truck"),
    ),
}
RANK_EXPONENT = -0.6


@functools.cache
def theme_weights(theme: str) -> dict[str, float]:
    """Probability of each object as a theme's first draw, most frequent first; sums to 1."""
    weights = [(rank + 1) ** RANK_EXPONENT for rank in range(len(THEMES[theme]))]
    total = sum(weights)
    return {name: weight / total for name, weight in zip(THEMES[theme], weights, strict=True)}


@functools.cache
def cooccurrence() -> Float[np.ndarray, "objects objects"]:
    """Σ over themes of w(a)·w(b), symmetric with a zero diagonal: zero where no theme holds both."""
    table = np.zeros((len(OBJECTS), len(OBJECTS)))
    for theme in THEMES:
        vector = np.zeros(len(OBJECTS))
        for name, weight in theme_weights(theme).items():
            vector[INDEX[name]] = weight
        table += np.outer(vector, vector)
    np.fill_diagonal(table, 0.0)
    return table


@functools.cache
def by_popularity() -> tuple[str, ...]:
    """All objects, the one with the largest weight summed over themes first; ties in category order."""
    total = {name: sum(theme_weights(theme).get(name, 0.0) for theme in THEMES) for name in OBJECTS}
    return tuple(sorted(OBJECTS, key=lambda name: (-total[name], INDEX[name])))


def companions(present: Collection[str], *, absent_from: Collection[str]) -> tuple[str, ...]:
    """Objects that share a theme with one of `present`, most co-occurring first, without `absent_from`."""
    score = cooccurrence()[[INDEX[name] for name in present]].sum(axis=0)
    order = sorted(range(len(OBJECTS)), key=lambda index: (-score[index], index))
    return tuple(OBJECTS[i] for i in order if score[i] > 0 and OBJECTS[i] not in absent_from)
