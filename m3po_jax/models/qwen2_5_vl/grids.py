"""Where patches and image tokens lie, computed in programs from the images' grids alone.

Images of a row stand end to end. An image of h × w patches has h/m · w/m *units* of m × m neighbouring patches, one
image token each, in raster order; a unit's patches follow each other, in raster order too. Grids of zeros fill rows
up.

Shape suffixes: B rows, M images of a row, U units of a row, N = U·m² patches, S tokens of a prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.models.decoder_layer import Rotary
from m3po_jax.models.forward import Positions, text_positions


class Units(NamedTuple):
    """The place of every unit of a row; of what fills rows up, `valid` is false and the rest of no meaning.

    Attributes:
        first: The first unit of its image, by its number in the row.
        row, column: In its image, counted in units.
        height, width: Of its image, in units.
    """

    valid: Bool[Array, "b u"]
    first: Int[Array, "b u"]
    row: Int[Array, "b u"]
    column: Int[Array, "b u"]
    height: Int[Array, "b u"]
    width: Int[Array, "b u"]


def units_of(grid: Int[Array, "b m 2"], count: int, merge: int) -> Units:
    """The places of a row's first `count` units.

    Args:
        grid: Patches of every image, (height, width).
        merge: Patches along a unit's side.
    """
    sizes = grid[..., 0] * grid[..., 1] // merge**2
    ends = jnp.cumsum(sizes, axis=1)
    number = jnp.arange(count)
    image = jnp.sum(number[None, :, None] >= ends[:, None, :], axis=2)  # M: none
    at = lambda x: jnp.take_along_axis(x, jnp.minimum(image, grid.shape[1] - 1), axis=1)  # noqa: E731
    height, width, first = at(grid[..., 0] // merge), at(grid[..., 1] // merge), at(ends - sizes)
    within, across = number[None, :] - first, jnp.maximum(width, 1)
    return Units(image < grid.shape[1], first, within // across, within % across, height, width)


def patch_places(units: Units, merge: int) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """Row and column of every patch in its image."""
    inside = jnp.arange(merge**2)
    spread = lambda x, more: (x[..., None] * merge + more).reshape(x.shape[0], -1)  # noqa: E731
    return spread(units.row, inside // merge), spread(units.column, inside % merge)


def patch_segments(units: Units, number: Int[Array, "b u"], merge: int) -> Int[Array, "b n"]:
    """The number of each patch's unit, −1 for what fills up."""
    return jnp.repeat(jnp.where(units.valid, number, -1), merge**2, axis=1)


class Windows(NamedTuple):
    """Units in the order in which windows follow each other, so that each is without gaps.

    Attributes:
        place: Of every unit in that order.
        unit: The unit in every place.
        window: The place that the window of the unit in every place begins at, −1 for what fills up.
    """

    place: Int[Array, "b u"]
    unit: Int[Array, "b u"]
    window: Int[Array, "b u"]


def windows_of(units: Units, side: int) -> Windows:
    """Squares of `side` units from the image's upper left corner on; those at the other edges are smaller."""
    high, across = units.row // side, units.column // side  # the window's row and column
    # Rows of windows above have `side` rows of units, and windows on the left `side` columns.
    height = jnp.minimum(side, units.height - high * side)
    width = jnp.minimum(side, units.width - across * side)
    begin = units.first + high * side * units.width + across * side * height
    place = begin + units.row % side * width + units.column % side
    number = jnp.broadcast_to(jnp.arange(place.shape[1]), place.shape)
    place, begin = jnp.where(units.valid, place, number), jnp.where(units.valid, begin, -1)
    unit = jnp.argsort(place, axis=1)
    return Windows(place, unit, jnp.take_along_axis(begin, unit, axis=1))


def axial_rotary(rows: Int[Array, "b n"], columns: Int[Array, "b n"], head_dim: int, theta: float) -> Rotary:
    """cos and sin of positions with two axes: half of the frequencies turn by the row, half by the column."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    turned = lambda x: x[..., None].astype(jnp.float32) * frequencies  # noqa: E731
    angles = jnp.concatenate([turned(rows), turned(columns)] * 2, axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def grid_positions(
    is_image: Bool[Array, "b s"], mask: Bool[Array, "b s"], grid: Int[Array, "b m 2"] | None, merge: int
) -> Positions:
    """Rotary positions (time, height, width) of prompts with images, as section 3.1 of arXiv:2409.12191 has them.

    Text counts one by one on all axes. An image stands at one time; its units count from there by row and by column,
    and what follows it goes on behind the longer of its sides.
    """
    if grid is None:
        counted = text_positions(mask)
        return Positions(jnp.broadcast_to(counted.of_prompt[..., None], (*mask.shape, 3)), counted.following)
    is_image = is_image & mask
    sizes = grid[..., 0] * grid[..., 1] // merge**2
    extents = jnp.max(grid, axis=2) // merge
    text = (mask & ~is_image).astype(jnp.int32)
    words = jnp.cumsum(text, axis=1) - text  # before each token
    order = jnp.cumsum(is_image, axis=1) - is_image
    # Images that ended before the token: an image token's own has not.
    over = order[..., None] >= jnp.cumsum(sizes, axis=1)[:, None, :]
    begin = words + jnp.sum(jnp.where(over, extents[:, None, :], 0), axis=2)
    units = units_of(grid, is_image.shape[1], merge)
    at = lambda x: jnp.where(is_image, jnp.take_along_axis(x, order, axis=1), 0)  # noqa: E731
    places = jnp.stack([begin, begin + at(units.row), begin + at(units.column)], axis=-1)
    return Positions(
        jnp.where(mask[..., None], places, 0), jnp.sum(text, axis=1) + jnp.sum(extents, axis=1, dtype=jnp.int32)
    )


def sections_axes(sections: tuple[int, ...]) -> tuple[int, ...]:
    """`DecoderConfig.rotary_axes` of Qwen2-VL: the first frequencies turn by time, then height, then width."""
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
