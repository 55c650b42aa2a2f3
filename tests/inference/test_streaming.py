"""Prompts that stream through the lanes: occupancy, independence of the batch, growth, features and errors."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from model_inputs import after_tower
from tiny_llava import make_generator, prompts, take, teacher_forced, tiny_model

from m3po_jax.data.collation import rows_of
from m3po_jax.errors import UserError
from m3po_jax.inference import programs
from m3po_jax.inference.state import StateLayout


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def many():
    """Prompts of several lengths, beyond one bucket too, and their answers from one large batch."""
    return prompts((3, 9, 6, 1, 40, 2, 8, 7, 5, 3, 30, 1))


@pytest.fixture(scope="module")
def whole(model, many):
    return make_generator(model, batch_size=12, stop_bias=2.0, max_new_tokens=30)(many)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_streamed_answers_are_those_of_one_batch(model, many, whole, batch_size):
    out = make_generator(model, batch_size=batch_size, stop_bias=2.0, max_new_tokens=30)(many)
    assert out.ids == whole.ids and len({*out.lengths.flat}) > 5
    np.testing.assert_array_equal(out.token_ids, whole.token_ids)
    np.testing.assert_array_equal(out.lengths, whole.lengths)
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, many, out), atol=1e-4)


def test_lanes_are_busy_where_lengths_differ_tenfold(model):
    """Answers of 5 to 50 tokens, K = 8: at least 85 % of the token slots make tokens, the run's end included."""
    lengths = (4, 6, 9, 13, 19, 27, 37, 49)  # before the end token, which comes as soon as it may
    generator = make_generator(
        model, batch_size=2, num_candidates=8, max_new_tokens=50, stop_bias=100.0, min_new_tokens=lengths
    )
    out = generator(prompts((1, 2, 3, 4, 5, 6) * 5))
    assert (out.lengths == np.array(lengths) + 1).all() and out.lengths.max() == 10 * out.lengths.min()
    assert out.lengths.sum() / out.slot_steps >= 0.85


@pytest.mark.slow
def test_a_cache_in_a_tpus_order_changes_nothing(model, many, whole, monkeypatch):
    monkeypatch.setattr(StateLayout, "answers_kv", property(StateLayout.slots_slowest))
    monkeypatch.setattr(programs, "_programs", programs.Programs)  # none of the usual order
    generator = make_generator(model, batch_size=4, stop_bias=2.0, max_new_tokens=30)
    made = []
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda *given: made.append(given[6].kv[0][0].format) or decode(*given))
    out = generator(many)
    assert {order.layout.major_to_minor for order in made} == {(2, 1, 0, 3)}
    np.testing.assert_array_equal(out.token_ids, whole.token_ids)
    np.testing.assert_allclose(out.log_probs, whole.log_probs, atol=1e-5)


def test_features_stand_for_images(model, many, whole):
    encoded = dataclasses.replace(many, images=after_tower(model, many.images))
    out = make_generator(model, batch_size=4, stop_bias=2.0, max_new_tokens=30)(encoded)
    np.testing.assert_array_equal(out.token_ids, whole.token_ids)


def test_features_stand_for_images_beside_a_blank_one(model, many):
    """Contrastive decoding encodes the blank image itself, so the features of the others are enough."""
    batch = take(many, [0, 1, 4])
    encoded = dataclasses.replace(batch, images=after_tower(model, batch.images))
    options = {"temperature": 0.0, "num_candidates": 1, "stop_bias": 2.0, "max_new_tokens": 30}
    generator = make_generator(model, contrast_alpha=1.0, **options)
    pixels, out = generator(batch), generator(encoded)
    np.testing.assert_array_equal(out.token_ids, pixels.token_ids)
    np.testing.assert_allclose(out.log_probs, pixels.log_probs, atol=1e-5)
    assert (out.token_ids != make_generator(model, **options)(encoded).token_ids).any()


def test_an_error_of_the_source_comes_after_the_answers_before_it(model, many, whole):
    def source():
        yield from rows_of(many)[:5]
        raise UserError("a damaged image", where="row 6")

    made = []
    with pytest.raises(UserError, match="row 6: a damaged image"):
        for answer in make_generator(model, stop_bias=2.0, max_new_tokens=30).stream(source()):
            made.append(answer.id)
    assert sorted(made) == sorted(whole.ids[:5])


def test_a_source_may_wait_for_answers(model, many, whole):
    """Every answer brings one more request, as duplicates do."""
    waiting, answered = rows_of(many), []

    def source():
        given = 0
        while waiting:
            if given <= len(answered):
                given += 1
                yield waiting.pop(0)
            else:
                yield None

    for answer in make_generator(model, stop_bias=2.0, max_new_tokens=30).stream(source()):
        answered.append(answer.id)
    assert answered == whole.ids
    with pytest.raises(ValueError, match="waits for answers"):
        list(make_generator(model).stream(iter([None])))


def test_finished_answers_come_before_the_report_of_a_broken_prompt(model):
    """One prompt's features are NaN: those before it in line are yielded, and the prompt is named."""
    batch = prompts((3, 9, 6, 1))
    batch.images["pixels"][3] = np.nan
    generator = make_generator(model, batch_size=1, num_candidates=1, max_new_tokens=4)
    made = []
    with pytest.raises(UserError, match=r"prompt prompt-1-3: .*not finite"):
        for answer in generator.stream(rows_of(batch)):
            made.append(answer.id)
    assert made and "prompt-1-3" not in made


def test_no_weight_is_held_twice_once_the_model_is_dropped():
    generator = make_generator(tiny_model())
    held = sum(x.size for x in jax.tree.leaves(generator.weights))
    assert held == sum(x.size for x in jax.tree.leaves(nnx.state(tiny_model(), nnx.Param)))
    assert len(generator(take(prompts(), [0])).ids) == 1
