"""Units, windows and positions of images of any size, computed in programs, against transformers' loops on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import torch_and_transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.models.packed_attention import local_attention, packed_attention
from m3po_jax.models.qwen2_5_vl.grids import grid_positions, patch_places, units_of, windows_of

IMAGES, UNITS, TOKENS, MERGE = 3, 72, 100, 2
GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=IMAGES).filter(
    lambda grids: sum(height * width for height, width in grids) <= UNITS
)


def padded(grids: list[tuple[int, int]]) -> np.ndarray:
    """Grids of one row, in patches, filled up with zeros."""
    grid = np.zeros((1, IMAGES, 2), np.int32)
    grid[0, : len(grids)] = np.array(grids) * MERGE
    return grid


@jax.jit
def places(grid):
    units = units_of(grid, UNITS, MERGE)
    return units, jnp.stack(patch_places(units, MERGE), axis=-1), [windows_of(units, side) for side in (2, 4)]


@settings(max_examples=60)
@given(GRIDS)
def test_patches_and_windows_lie_as_transformers_has_them(grids):
    torch, _ = torch_and_transformers()
    from transformers import vision_utils

    grid = padded(grids)
    units, patches, windows = places(grid)
    count = sum(height * width for height, width in grids)
    shown = torch.tensor([[1, *one] for one in grid[0, : len(grids)].tolist()])
    wanted = vision_utils.get_vision_position_ids(shown, MERGE).numpy()
    np.testing.assert_array_equal(patches[0, : len(wanted)], wanted)
    assert np.asarray(units.valid[0]).tolist() == [True] * count + [False] * (UNITS - count)
    for side, found in zip((2, 4), windows, strict=True):
        order, ends = vision_utils.get_vision_window_index(shown, MERGE, side * MERGE * 7, 7)
        np.testing.assert_array_equal(found.unit[0, :count], order)
        np.testing.assert_array_equal(found.place[0, found.unit[0]], np.arange(UNITS))
        of_place = np.searchsorted(ends.numpy() // MERGE**2, np.arange(count), side="right")
        begins = (ends.numpy() // MERGE**2)[of_place - 1]
        np.testing.assert_array_equal(found.window[0], [*begins, *[-1] * (UNITS - count)])


@jax.jit
def positions(is_image, mask, grid):
    return grid_positions(is_image, mask, grid, MERGE)


@settings(max_examples=40)
@given(GRIDS, st.lists(st.integers(1, 4), min_size=IMAGES + 1, max_size=IMAGES + 1), st.booleans())
def test_positions_are_transformers_own(grids, words, left):
    torch, transformers = torch_and_transformers()
    kinds = [0] * words[0]
    for (height, width), text in zip(grids, words[1:], strict=False):
        kinds += [1] * (height * width) + [0] * text
    row, mask = np.zeros((2, TOKENS), int), np.zeros((2, TOKENS), bool)
    place = slice(TOKENS - len(kinds), None) if left else slice(0, len(kinds))
    row[0, place], mask[0, place], mask[1, :5] = kinds, True, True
    model = transformers.Qwen2_5_VLModel
    grid = np.concatenate([padded(grids), np.zeros((1, IMAGES, 2), np.int32)])
    found = positions(row.astype(bool), mask, grid)
    shell = type("Shell", (), {"get_vision_position_ids": model.get_vision_position_ids})()
    shell.config = transformers.Qwen2_5_VLConfig(vision_config={"spatial_merge_size": MERGE})
    shown = torch.tensor([[1, *one] for one in grid[0, : len(grids)].tolist()])
    tensors = (torch.tensor(row), torch.tensor(row), shown)
    wanted, delta = model.get_rope_index(shell, *tensors, attention_mask=torch.tensor(mask.astype(int)))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found.of_prompt), -1, 0)[:, mask], wanted[:, mask])
    np.testing.assert_array_equal(found.following, delta[:, 0].numpy() + mask.sum(axis=1))
    text = grid_positions(row > 1, mask, None, MERGE)
    np.testing.assert_array_equal(text.of_prompt[1], np.broadcast_to(np.maximum(np.cumsum(mask[1]) - 1, 0)[:, None], (TOKENS, 3)))


@jax.jit
def attended(q, k, v, segments):
    return packed_attention(q, k, v, segments), local_attention(q, k, v, segments, 5)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=8, max_size=11), st.integers(0, 9))
def test_segments_see_themselves_alone(lengths, seed):
    """Against each segment by itself; what fills up gives zeros and is seen by nobody."""
    segments = np.repeat(np.arange(len(lengths)), lengths)[:37]
    row = np.full(37, -1)
    row[: len(segments)] = segments
    q, k, v = np.random.default_rng(seed).normal(size=(3, 1, 37, 2, 4)).astype(np.float32)
    packed, local = attended(q, k, v, row[None])
    np.testing.assert_allclose(packed, local, rtol=0, atol=1e-5)
    for number in range(-1, len(lengths)):
        own = row == number
        if number < 0:
            assert not np.asarray(packed)[0, own].any()
            continue
        scores = np.einsum("qhd,khd->hqk", q[0, own], k[0, own]) / 2
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(packed[0, own], np.einsum("hqk,khd->qhd", weights, v[0, own]), rtol=0, atol=1e-5)
