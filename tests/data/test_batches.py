"""Batches: order, resumption, padding, labels, and errors that name the row."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import SquareImages

from m3po_jax.data.batches import pair_batches, prompt_batches, sft_batches
from m3po_jax.data.contrastive import contrastive_batches
from m3po_jax.data.padding import LENGTHS, padded_length
from m3po_jax.data.pair_rows import TableRows, pair_prompt
from m3po_jax.data.schema import PAIR, Image, Prompt, message
from m3po_jax.errors import UserError


class Letters(SquareImages):
    """Letters as ids; an image path is the seed of its pixels; ``broken`` does not decode."""

    eos_token_ids = (2, 3)
    image_shape, tokens_per_image = (4, 4, 3), 1

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [1] + [99] * len(prompt.images) + [3 + ord(letter) for letter in prompt.instruction]

    def encode_answer(self, text: str) -> list[int]:
        return [3 + ord(letter) for letter in text] + [2]

    def pixel_values(self, prompt: Prompt) -> np.ndarray:
        if any(image.path == "broken" for image in prompt.images):
            raise OSError("truncated file")
        return np.stack([np.full((4, 4, 3), float(image.path or 0), np.float32) for image in prompt.images])


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"row-{i}",
            "images": [{"bytes": None, "path": str(i)}],
            "prompt": message("user", "q" * (1 + i % 4), images=1),
            "chosen": message("assistant", "a" * (i % 5)),
            "rejected": message("assistant", "b" * (i % 3)),
        }
        for i in range(count)
    ]


class Pictures(Letters):
    """As a dual encoder's processor gives images."""

    def images(self, prompt: Prompt) -> np.ndarray:
        return self.pixel_values(prompt)


def equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@given(st.integers(1, 20_000))
def test_padded_length_fits_with_little_waste(length: int) -> None:
    padded = padded_length(length)
    assert padded >= length
    assert padded <= max(8, math.ceil(length * 1.5))
    assert len(LENGTHS) < 30


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99), st.integers(1, 3))
def test_resumes_anywhere_and_visits_every_row_once_an_epoch(
    count: int, size: int, stop: int, seed: int, window: int
) -> None:
    make = lambda: pair_batches(  # noqa: E731
        pairs(count), Letters(), batch_size=size, seed=seed, length_window=window, max_shapes=2
    )
    source = make()
    whole = iter(source)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = iter(make())
    resumed.set_state(state)
    for _ in range(2):
        equal(next(whole), next(resumed))
    stream = np.concatenate([batch.row_index for batch, _ in zip(make(), range(2 * count), strict=False)])
    for epoch in range(2):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert source.steps(1.0) == math.ceil(count / size)


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    def order(seed: int) -> list[int]:
        source = pair_batches(pairs(30), Letters(), batch_size=30, seed=seed)
        return [batch.row_index.tolist() for batch, _ in zip(source, range(2), strict=False)]

    assert order(0) == order(0) != order(1)
    first, second = order(0)
    assert first != second


def test_pairs_hold_their_tokens() -> None:
    rows = pairs(3)
    rows[1] |= {
        "chosen_token_ids": [7, 8, 2],
        "rejected_token_ids": [9, 2],
        "reference_chosen_logprobs": [-1.0, -2.0, -0.5],
        "reference_rejected_logprobs": [-3.0, -0.25],
    }
    source = pair_batches(pa.Table.from_pylist(rows, schema=PAIR), Letters(), batch_size=3, seed=0)
    batch = next(iter(source))
    equal(batch, next(iter(pair_batches(rows, Letters(), batch_size=3, seed=0))))
    assert not source.has_reference
    assert source.row_ids(batch.row_index) == [f"row-{i}" for i in batch.row_index]
    for place, i in enumerate(batch.row_index):
        prefix = batch.prefix_ids[place][batch.prefix_mask[place]]
        np.testing.assert_array_equal(prefix, Letters().encode_prompt(pair_prompt(rows[i])))
        assert (batch.images["pixels"][place] == i).all()
        expected = [[7, 8, 2], [9, 2]] if i == 1 else [[100] * (i % 5) + [2], [101] * (i % 3) + [2]]
        for branch in range(2):
            answer = batch.branch_ids[place, branch][batch.branch_mask[place, branch]]
            np.testing.assert_array_equal(answer, expected[branch])
        if i == 1:
            np.testing.assert_array_equal(batch.reference[place], [-3.5, -3.25])
        else:
            assert np.isnan(batch.reference[place]).all()
    # Padding is behind the tokens.
    assert (np.diff(batch.branch_mask.astype(int), axis=-1) <= 0).all()


def test_table_rows_are_whole() -> None:
    rows = TableRows(pa.Table.from_pylist(pairs(3), schema=PAIR))
    assert [row["images"] for row in rows] == [row["images"] for row in pairs(3)]
    assert [row["id"] for row in rows[1:]] == ["row-1", "row-2"] and rows[-1]["id"] == "row-2"
    assert [row["id"] for row in rows.without_images()] == ["row-0", "row-1", "row-2"]


def test_fingerprint_tells_data_apart() -> None:
    def fingerprint(rows: Any, **changes: Any) -> str:
        return pair_batches(rows, Letters(), **{"batch_size": 2, "seed": 0, **changes}).fingerprint

    rows = pairs(4)
    other = [*rows[:3], rows[3] | {"chosen": message("assistant", "else")}]
    assert fingerprint(rows) == fingerprint(pairs(4))
    assert len({fingerprint(rows), fingerprint(other), fingerprint(rows, seed=1)}) == 3
    assert len({fingerprint(rows), fingerprint(rows, length_window=2), fingerprint(rows, max_shapes=2)}) == 3


def test_several_turns_and_images() -> None:
    row = pairs(1)[0]
    row["images"] = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "1"}]
    row["prompt"] = message("user", "one", 2) + message("assistant", "two") + message("user", "three")
    prompt = pair_prompt(row)
    assert prompt.instruction == "three" and prompt.metadata == {"history": [["one", "two"]]}
    assert prompt.images == (Image(bytes=b"x"), Image(path="1"))


def test_ragged_image_counts_are_padded_at_the_end() -> None:
    prompts = [Prompt("a", (Image(path="5"),), "x"), Prompt("b", (Image(path="6"), Image(path="7")), "x")]
    batch = next(iter(prompt_batches([*prompts, Prompt("c", (), "x")], Letters(), batch_size=3)))
    assert batch.images["pixels"].shape == (3, 2, 4, 4, 3)
    np.testing.assert_array_equal(batch.images["pixels"][..., 0, 0, 0], [[5, 0], [6, 7], [0, 0]])
    np.testing.assert_array_equal(batch.images["tokens"], [[1, 0], [1, 1], [0, 0]])


def test_prompts_come_in_order_once() -> None:
    prompts = [Prompt(f"p{i}", (), "x" * (1 + i)) for i in range(5)]
    batches = list(prompt_batches(prompts, Letters(), batch_size=2))
    assert [batch.ids for batch in batches] == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [batch.mask.sum(1).tolist() for batch in batches] == [[2, 3], [4, 5], [6]]  # Letters adds a start
    assert all(batch.images is None for batch in batches)


def test_sft_has_one_branch() -> None:
    prompts = [Prompt(f"p{i}", (), "x", reference="y" * (1 + i)) for i in range(4)]
    batch = next(iter(sft_batches(prompts, Letters(), batch_size=4, seed=0)))
    assert batch.branch_ids.shape == (4, 1, 5)
    np.testing.assert_array_equal(batch.branch_mask[:, 0].sum(-1), 2 + batch.row_index)


def encode_texts(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([[len(text), ord(text[-1])] for text in texts])
    return ids, np.ones_like(ids, bool)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=2, max_size=6))
def test_contrastive_labels(objects: list[set[str]]) -> None:
    prompts = [
        Prompt(str(i), (Image(path=str(i)),), "x", metadata={"objects": sorted(o)}) for i, o in enumerate(objects)
    ]
    vocabulary = set().union(*objects)
    for limit in (256, 7):
        source = contrastive_batches(
            prompts, Pictures(), encode_texts=encode_texts, batch_size=2, seed=0, claim_template="a {claim}",
            max_texts=limit,
        )  # fmt: skip
        batch = next(iter(source))
        texts = [chr(code) for code in batch.text_ids[:, 1]]
        assert len(set(texts)) == len(texts) == min(len(vocabulary), limit)
        assert (batch.text_ids[:, 0] == len("a x")).all()
        for row, i in enumerate(batch.row_index):
            assert (batch.pixel_values[row] == i).all()
            assert {text for text, label in zip(texts, batch.labels[row], strict=True) if label == 1} == objects[i]
            assert set(np.unique(batch.labels[row])) <= {-1, 1}


def claims(metadata: dict[str, Any], images: int = 1) -> Any:
    prompt = Prompt("cat-3", (Image(path="1"),) * images, "x", metadata=metadata)
    return contrastive_batches([prompt], Pictures(), encode_texts=encode_texts, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("make", "message_part"),
    [
        (lambda: pair_batches([], Pictures(), batch_size=2, seed=0), "no row to train on"),
        (lambda: pair_batches(pairs(2), Pictures(), batch_size=0, seed=0), "batch_size"),
        (lambda: pair_batches(pairs(2), Pictures(), batch_size=2, seed=0, length_window=0), "train.length_window"),
        (lambda: pair_batches(pairs(2), Pictures(), batch_size=2, seed=0, max_shapes=0), "train.max_shapes"),
        (
            lambda: pair_batches(pairs(9), Pictures(), batch_size=2, seed=0, max_answer_tokens=3),
            r"pairs:4 \(id 'row-3'\): the answer has 4 tokens",
        ),
        (
            lambda: pair_batches(
                [pairs(1)[0] | {"chosen_token_ids": [5, 2], "reference_chosen_logprobs": [-1.0]}],
                Pictures(), batch_size=1, seed=0,
            ),
            "row-0.*1 reference log-probs for 2 tokens",
        ),
        (
            lambda: pair_batches([pairs(1)[0] | {"chosen_token_ids": []}], Pictures(), batch_size=1, seed=0),
            "no tokens",
        ),
        (
            lambda: sft_batches([Prompt("p", (), "x")], Pictures(), batch_size=1, seed=0),
            "id 'p'.*no reference answer",
        ),
        (lambda: claims({}), "cat-3.*metadata.objects"),
        (lambda: claims({"objects": []}), "no row names an object"),
        (lambda: claims({"objects": ["cat"]}, images=2), "cat-3.*2 images"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_before_anything_runs(make: Any, message_part: str) -> None:
    with pytest.raises(UserError, match=message_part):
        make()


def test_a_bad_image_names_its_row() -> None:
    rows = [row | {"images": [{"bytes": None, "path": "broken"}]} for row in pairs(1)]
    with pytest.raises(UserError, match=r"pairs:1 \(id 'row-0'\): cannot read the image"):
        next(iter(pair_batches(rows, Pictures(), batch_size=1, seed=0)))


def test_answers_without_an_end_are_counted() -> None:
    """The chosen ones of pairs, and those that SFT learns; a rejected one teaches nobody to go on."""
    rows = pairs(4)
    for row, chosen, rejected in zip(
        rows, ([5, 2], [5, 6], [5, 7], [5, 3]), ([5], [5, 2], [5, 2], [5, 2]), strict=True
    ):
        row |= {"chosen_token_ids": chosen, "rejected_token_ids": rejected}
    assert pair_batches(rows, Pictures(), batch_size=2, seed=0).cut_answers == 2
    assert pair_batches(pairs(4), Pictures(), batch_size=2, seed=0).cut_answers == 0
    prompts = [pair_prompt(row) for row in rows]
    answers = [row["chosen_token_ids"] for row in rows]
    assert sft_batches(prompts, Pictures(), batch_size=2, seed=0, answer_ids=answers).cut_answers == 2
