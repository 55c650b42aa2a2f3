"""Batches of similar lengths: an order that loses no row, few shapes, little padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches, sft_batches
from m3po_jax.data.collation import TreeBatch
from m3po_jax.data.lengths import Lengths, Order, cheapest, padding_share, partition, plan_shapes, rounded
from m3po_jax.data.schema import Prompt, PromptTokens
from m3po_jax.recipes import load_recipe

# What the recipes train with.
WINDOW, SHAPES = TrainConfig().length_window, TrainConfig().max_shapes

counts = st.integers(1, 40)
sizes = st.integers(1, 9)
windows = st.integers(1, 6)
seeds = st.integers(0, 99)


def draw_lengths(count: int, seed: int, branches: int = 2) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(1, 30, count), rng.integers(1, 60, count), branches)


@settings(max_examples=30, deadline=None)
@given(counts, sizes, windows, seeds)
def test_every_row_once_an_epoch(count: int, size: int, window: int, seed: int) -> None:
    order = Order(count, seed, size, window, draw_lengths(count, seed))
    batches = [order.rows(number) for number in range(-(-3 * count // size))]
    assert all(len(batch) == size for batch in batches)
    stream = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=20, deadline=None)
@given(counts, sizes, windows, seeds, st.lists(st.integers(0, 30), max_size=8))
def test_batch_i_is_a_function_of_the_seed_and_i(count: int, size: int, window: int, seed: int, asked: Any) -> None:
    lengths = draw_lengths(count, seed)
    whole = Order(count, seed, size, window, lengths)
    expected = [whole.rows(number) for number in range(31)]
    other = Order(count, seed, size, window, lengths)
    assert [other.rows(number) for number in asked] == [expected[number] for number in asked]


@settings(max_examples=25, deadline=None)
@given(counts, sizes, seeds)
def test_a_window_of_one_batch_is_plain_shuffling(count: int, size: int, seed: int) -> None:
    plain = grain.MapDataset.range(count).seed(seed).shuffle().repeat(200).batch(size)
    order = Order(count, seed, size, 1, draw_lengths(count, seed))
    for number in range(6):
        assert order.rows(number) == plain[number].tolist()


@settings(max_examples=25, deadline=None)
@given(counts, sizes, windows, seeds)
def test_a_window_keeps_its_rows(count: int, size: int, window: int, seed: int) -> None:
    """Rows move within their window only: what comes when stays as random as the window is short."""
    grouped = Order(count, seed, size, window, draw_lengths(count, seed))
    plain = Order(count, seed, size)
    inside = range(0, count // size - count // size % window, window)  # whole windows of the first epoch
    for first in inside:
        numbers = range(first, first + window)
        kept, given_rows = ([row for number in numbers for row in order.rows(number)] for order in (grouped, plain))
        assert sorted(kept) == sorted(given_rows)


def test_length_tells_nothing_about_time() -> None:
    """Over windows, the batches' lengths rank without a trend."""
    lengths = Lengths(np.full(8 * 400, 7), np.random.default_rng(0).integers(1, 1000, 8 * 400), 2)
    order = Order(len(lengths.prefix), 0, 4, 8, lengths)
    means = np.array([lengths.branch[order.rows(number)].mean() for number in range(800)]).reshape(100, 8)
    ranks = means.argsort(axis=1).argsort(axis=1).mean(axis=0)
    assert np.abs(ranks - 3.5).max() < 0.9  # 4 standard errors; sorted batches would show 0 … 7
    # And the batches do differ: the window is divided by length.
    assert means.std() > 0.9 * lengths.branch.std()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), seeds)
def test_partition_has_the_asked_sizes_and_all_rows(sizes: list[int], seed: int) -> None:
    sides = draw_lengths(sum(sizes), seed).sides
    groups = partition(sides, sizes, np.array([1, 2]))
    assert [len(group) for group in groups] == sizes
    assert sorted(np.concatenate(groups)) == list(range(sum(sizes)))


def test_partition_divides_by_the_width_that_matters() -> None:
    short, long = [3, 100], [3, 900]
    groups = partition(np.array([short, long, short, long]), [2, 2], np.array([1, 2]))
    assert [group.tolist() for group in groups] == [[0, 2], [1, 3]]
    groups = partition(np.array([[9, 5], [600, 5], [9, 6], [600, 6]]), [2, 2], np.array([1, 2]))
    assert [group.tolist() for group in groups] == [[0, 2], [1, 3]]


@settings(max_examples=25, deadline=None)
@given(counts, sizes, windows, seeds, st.integers(1, 5), st.integers(1, 3))
def test_shapes_are_few_and_hold_every_batch(
    count: int, size: int, window: int, seed: int, limit: int, branches: int
) -> None:
    lengths = draw_lengths(count, seed, branches)
    order = Order(count, seed, size, window, lengths)
    shapes = plan_shapes(order, lengths, limit)
    assert 1 <= len(shapes) <= limit
    for number in range(8):
        prefix, branch = lengths.sides[order.rows(number)].max(axis=0)
        shape = cheapest(shapes, prefix, branch, branches)
        assert shape[0] >= prefix and shape[1] >= branch
        fits = [p + branches * t for p, t in shapes if p >= prefix and t >= branch]
        assert shape[0] + branches * shape[1] == min(fits)


@given(st.integers(1, 20_000))
def test_rounding_adds_little(length: int) -> None:
    assert length <= rounded(length) <= 1.0625 * length
    assert length <= 128 or rounded(length) % 8 == 0


class Counted:
    """Prompts and answers of given lengths; a prompt's instruction is its length."""

    eos_token_ids = (6,)
    image_buckets = None

    def tokenise(self, prompt: Prompt) -> PromptTokens:
        return PromptTokens(np.zeros(0, np.int32), "")

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        return np.full(int(prompt.instruction), 5)

    def encode_answer(self, text: str) -> np.ndarray:
        return np.full(int(text), 6)

    def images(self, prompt: Prompt) -> tuple[()]:
        raise AssertionError("there are no images")

    def image_keys(self, prompt: Prompt) -> list[str]:
        return []


def source_of(
    lengths: np.ndarray, *, batch_size: int = 32, window: int = WINDOW, shapes: int = SHAPES
) -> BatchSource:
    """Pairs with these (prefix, chosen, rejected) token counts."""
    rows = [
        {
            "id": str(i),
            "images": [],
            "prompt": [{"role": "user", "content": str(prefix)}],
            "chosen": [{"role": "assistant", "content": str(chosen)}],
            "rejected": [{"role": "assistant", "content": str(rejected)}],
        }
        for i, (prefix, chosen, rejected) in enumerate(lengths.tolist())
    ]
    return pair_batches(
        rows, Counted(), batch_size=batch_size, seed=0, max_answer_tokens=300, length_window=window, max_shapes=shapes
    )


def long_tailed(count: int) -> np.ndarray:
    """Log-normal answers of 20 to 300 tokens (median 80), the rejected one 0.5 to 2 times the chosen one (uniform in
    its logarithm), prompts of an image and 20 to 80 tokens."""
    rng = np.random.default_rng(0)
    chosen = np.clip(np.exp(rng.normal(np.log(80), 0.7, count)), 20, 300)
    rejected = np.clip(chosen * np.exp(rng.uniform(-np.log(2), np.log(2), count)), 20, 300)
    return np.stack([576 + rng.integers(20, 81, count), chosen.astype(int), rejected.astype(int)], axis=1)


def quickstart_pairs() -> np.ndarray:
    """Token counts of the pairs that `m3po run --config configs/quickstart.yaml` makes, in random order."""
    counted = json.loads((Path(__file__).parent / "quickstart_lengths.json").read_text())
    rows = np.array([row for *row, count in counted for _ in range(count)])
    return np.random.default_rng(0).permutation(rows)


def stream_padding(source: BatchSource, epochs: int) -> tuple[float, int]:
    """(share of padding, distinct shapes) over whole epochs, from the batches themselves."""
    slots = real = 0
    shapes = set()
    for number in range(source.steps(epochs)):
        batch = source.dataset[number]
        total = batch.prefix_mask.size + batch.branch_mask.size
        slots += total
        real += round(total * (1 - padding_share(batch)))
        shapes.add((batch.prefix_ids.shape, batch.branch_ids.shape))
    return 1 - real / slots, len(shapes)


QUICKSTART = load_recipe(Path(__file__).parents[2] / "configs" / "quickstart.yaml").train


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        (long_tailed(3200), TrainConfig(batch_size=32)),
        (long_tailed(1600), TrainConfig(batch_size=8)),
        (quickstart_pairs(), QUICKSTART),
    ],
    ids=["long-tailed", "long-tailed-8", "quickstart"],
)
def test_less_than_a_tenth_is_padding(lengths: np.ndarray, settings: TrainConfig) -> None:
    """With what the recipes ship."""
    widths = {"batch_size": settings.batch_size, "shapes": settings.max_shapes}
    share, shapes = stream_padding(source_of(lengths, window=settings.length_window, **widths), 3)
    print(f"padding {share:.4f} in {shapes} shapes")
    assert share < 0.1
    assert shapes <= settings.max_shapes
    # What shuffling alone costs in as many shapes: the grouping is what does it.
    plain, _ = stream_padding(source_of(lengths, window=1, **widths), 1)
    print(f"without grouping {plain:.4f}")
    assert plain > 2 * share


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), windows, st.integers(0, 5))
def test_a_restored_iterator_goes_on_alike(count: int, size: int, window: int, stop: int) -> None:
    make = lambda: source_of(long_tailed(count), batch_size=size, window=window, shapes=3)  # noqa: E731
    whole, source = iter(make()), make()
    for number in range(stop):
        assert next(whole).row_index.tolist() == source.dataset[number].row_index.tolist()
    resumed = iter(source)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    for number in range(stop, stop + 3):
        batch, again = next(whole), next(resumed)
        assert batch.row_index.tolist() == again.row_index.tolist() == source.dataset[number].row_index.tolist()
        assert batch.branch_ids.shape == again.branch_ids.shape


def test_sft_is_grouped_and_taken_rows_have_a_known_shape() -> None:
    prompts = [Prompt(str(i), (), "9", reference=str(1 + i % 8)) for i in range(64)]
    source = sft_batches(prompts, Counted(), batch_size=8, seed=0, length_window=8, max_shapes=8)
    assert stream_padding(source, 1)[0] < 0.01
    assert source.take is not None
    assert source.take([0, 3]).branch_ids.shape == (2, 1, 4)
    one = sft_batches(prompts, Counted(), batch_size=8, seed=0)
    assert one.shapes == ((9, 8),)


def test_padding_share_counts_prompts_once_and_every_answer() -> None:
    mask = lambda *lengths: np.arange(4) < np.array(lengths)[..., None]  # noqa: E731
    prefix, branch = mask(4, 2), mask([1, 4], [3, 0])
    batch = TreeBatch(prefix, prefix, None, branch, branch, np.zeros((2, 2)), np.arange(2))
    assert padding_share(batch) == pytest.approx(1 - 14 / 24)
