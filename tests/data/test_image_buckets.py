"""Sizes that rows of images are padded to: few of them, the cheapest, little padding on pictures as people have."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.data.image_buckets import ImageBuckets, choose_buckets
from m3po_jax.data.model_images import ImagePlan, joined, stacked
from m3po_jax.models.qwen2_5_vl.images import scaled_size

# Of photographs by their shares: of phones and cameras, upright and not, and squares; COCO's long side is 640.
ASPECTS = ((4 / 3, 0.34), (3 / 4, 0.14), (3 / 2, 0.16), (2 / 3, 0.08), (16 / 9, 0.07), (9 / 16, 0.04), (1.0, 0.07))


def natural_mix(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(width, height) of pictures: 90 % of `ASPECTS` at COCO's size, the rest of any shape and size."""
    rng = np.random.default_rng(seed)
    shares = np.array([share for _, share in ASPECTS])
    sizes = []
    for _ in range(count):
        if rng.random() < 0.9:
            aspect, _ = ASPECTS[rng.choice(len(ASPECTS), p=shares / shares.sum())]
            long = 640
        else:
            aspect, long = np.exp(rng.uniform(-1.2, 1.2)), int(rng.integers(150, 2000))
        width, height = (long, long / aspect) if aspect >= 1 else (long * aspect, long)
        sizes.append((max(int(width), 16), max(int(height), 16)))
    return sizes


def tokens_of(sizes: list[tuple[int, int]], side: int) -> list[int]:
    scaled = [scaled_size(*size, factor=side, min_pixels=56 * 56, max_pixels=1280 * side**2) for size in sizes]
    return [width * height // side**2 for width, height in scaled]


def test_six_sizes_leave_little_padding_on_a_natural_mix(record_property):
    for side in (28, 32):  # of Qwen2.5-VL's image tokens, and of Qwen3-VL's
        tokens = tokens_of(natural_mix(2000), side)
        buckets = choose_buckets([[count] for count in tokens], 6)
        padded = [buckets.holding(count) for count in tokens]
        padding = 1 - sum(tokens) / sum(padded)
        record_property(f"padding_{side}", padding)
        assert len(buckets.tokens) <= 6 and padding < 0.15
        assert len(set(padded)) <= 6


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 4))
def test_no_choice_is_cheaper(totals, most):
    """Against every choice of ends, for sizes that `rounded` leaves alone."""
    totals = [total // 2 + 1 for total in totals]
    buckets = choose_buckets([[total] for total in totals], most)
    sizes = sorted(set(totals))
    cost = lambda ends: sum(min(end for end in ends if end >= total) for total in totals)  # noqa: E731
    choices = itertools.combinations(sizes[:-1], min(most, len(sizes)) - 1)
    assert buckets.tokens[-1] >= max(totals) and len(buckets.tokens) <= most
    assert cost(buckets.tokens) == min(cost((*choice, sizes[-1])) for choice in choices)


def test_rows_are_filled_up_to_their_bucket():
    """Float arrays by the token, layouts by the image; text and rows that nobody foresaw find a place too."""

    def row(*tokens: int):
        plans = [ImagePlan(n, {"patches": (4 * n, 3)}, {"grid": np.array([[2, 2 * n]])}) for n in tokens]
        return [plan.filled(patches=np.full((4 * plan.tokens, 3), plan.tokens, np.float32)) for plan in plans]

    buckets = choose_buckets([[3], [5, 2], [], [30]], 2)
    assert buckets == ImageBuckets((7, 30), 2)
    two = joined(row(2, 3), buckets)
    assert two["patches"].shape == (28, 3) and two["tokens"].tolist() == [2, 3]
    assert two["patches"][:20, 0].tolist() == [2.0] * 8 + [3.0] * 12 and not two["patches"][20:].any()
    one = joined(row(4), buckets)
    assert one["tokens"].tolist() == [4, 0] and one["grid"].tolist() == [[2, 8], [0, 0]]
    assert stacked([two, {}, one])["patches"].shape == (3, 28, 3)
    beyond = joined(row(20, 20, 3), buckets)
    assert len(beyond["patches"]) == 4 * 44 and len(beyond["tokens"]) == 4
    assert joined(row(2, 3))["patches"].shape == (20, 3)
